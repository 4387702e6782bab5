"""Where this user's processes on this host agree on who compiles what: a folder that nobody else can write.

In a folder that others share, such as ``/tmp``, somebody could take the name before this user does: they could then
hold the locks for ever, or put links in their place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..cache.errors import NoHomeError
from ..cache.permissions import why_folder_not_own
from ..cache.stack import home

RUNTIME = "XDG_RUNTIME_DIR"
"""The environment variable of the folder that the system makes for a user at login, on this host alone."""


def lock_folder() -> Path | None:
    """The folder, made if it is missing; None if none is this user's own. Then a kernel may be compiled twice.

    It is ``doratune`` in the user's run-time folder where the system has made one, else ``locks`` in the user's
    doratune folder (``DORATUNE_HOME``).
    """
    for folder in _candidates():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            resolved = folder.resolve(strict=True)
            if _is_private(resolved) and why_folder_not_own(resolved) is None:
                return resolved
    return None


def _candidates() -> Iterator[Path]:
    runtime = Path(os.environ.get(RUNTIME, ""))
    if runtime.is_absolute() and runtime.is_dir() and _is_private(runtime):
        yield runtime / "doratune"
    with contextlib.suppress(NoHomeError):
        yield home() / "locks"


def _is_private(folder: Path) -> bool:
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o077
