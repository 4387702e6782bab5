"""Write a file or folder as a whole or not at all: beside its place first, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConversionError


@contextmanager
def new_target(target: Path, *, folder: bool) -> Iterator[Path]:
    """A path to write to, which takes the place of ``target`` when the block ends without an error.

    It is an empty folder, or the name of a file.

    Raises:
        ConversionError: ``target`` exists, or its folder does not.
    """
    check_target(target)
    made: Path | None = None
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        path = made / target.name
        if folder:
            path.mkdir()
        yield path
        check_target(target)
        os.rename(path, target)
    except OSError as error:
        raise ConversionError(
            f"{target}: cannot be written ({error.strerror or error}); nothing is left of it. Choose a folder that "
            "can be written and has the space"
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise a ConversionError unless ``target`` can be made: nothing is ever overwritten."""
    if target.exists() or target.is_symlink():
        raise ConversionError(f"{target} exists already; name another target, or remove it first")
    if not target.parent.is_dir():
        raise ConversionError(f"{target.parent}: no such folder; make it first")
