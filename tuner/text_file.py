"""Read a text file that a user named."""

from __future__ import annotations

import os
import stat
from pathlib import Path

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
    return data.decode("utf-8-sig")
