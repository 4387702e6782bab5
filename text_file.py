"""Read a text or JSON file that a user named."""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""Far more than any config or results file has."""


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file, without the byte order mark that some editors write.

    Raises:
        FileNotFoundError: there is none. OSError: it cannot be read.
        ValueError: it is no regular file (a pipe or a device could block for ever), too large or not UTF-8.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # NONBLOCK, for a pipe that nobody writes to
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("not a regular file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES >> 20} MB")
    return decoded(data)


def decoded(data: bytes) -> str:
    """The text of UTF-8 bytes, without a byte order mark.

    Raises:
        ValueError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("UTF-16 text; save it as UTF-8") from error
        raise ValueError(f"not UTF-8 text (byte {error.start})") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error
    except RecursionError:
        raise ValueError("not readable as JSON (nested too deeply)") from None
    except ValueError as error:  # Python converts no integer of more digits
        raise ValueError("not readable as JSON (a number has too many digits)") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError, OSError: as :func:`read_text`. ValueError: it holds none; the message says what it holds.
    """
    value = parse_json(read_text(path))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {json_type(value)}")
    return value


def is_results(path: Path) -> bool:
    """Whether a file is empty, or a JSON object with the fields of a results file of ``doratune bench``."""
    try:
        if path.stat().st_size == 0:
            return True
        return {"schema", "rows"} <= read_object(path).keys()
    except (OSError, ValueError):
        return False


def json_type(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list) else "a string" if isinstance(value, str) else "a number"


def reason_of(error: Exception) -> str:
    """Why a file could not be read, without the path, which the caller names, and Python's error numbers."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
