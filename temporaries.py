"""Temporary files and folders whose names tell which process made them, so that a later one can remove what a killed
process left.

A name ends in ``PID-START-MACHINE-RANDOM.new``, where START is when the process started, in clock ticks since the boot,
and MACHINE stands for the boot and the container that process numbers are unique in. What a process of this machine
left is removed as soon as that process has ended; what another machine left on a shared disk, after a day.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import time
from pathlib import Path

ORPHAN_SECONDS = 86_400.0
"""How old a temporary file is whose process cannot be looked up, before it counts as left behind."""

_MOST = 60  # characters of the name that are kept, since file systems limit a name to 255 bytes

_NAME = re.compile(
    r"\..+\.(?P<pid>\d+)-(?:(?P<start>\d+)-(?P<machine>[0-9a-f]{8})-)?[0-9a-f]{8}\.new(?:-wal|-shm|-journal)?"
)
"""Earlier versions wrote neither START nor MACHINE."""

_mine: set[str] = set()


def temporary_name(name: str) -> str:
    """A new name for a temporary file or folder of this process that has to do with ``name``."""
    pid = os.getpid()
    mark = hashlib.sha256(machine().encode()).hexdigest()[:8]
    return f".{name[:_MOST]}.{pid}-{started(pid) or 0}-{mark}-{secrets.token_hex(4)}.new"


def remove_at_end(path: str | Path) -> None:
    """Have :func:`remove_mine` remove a temporary file, with SQLite's files beside it, or a folder."""
    _mine.add(str(path))


def forget(path: str | Path) -> None:
    """Take back :func:`remove_at_end`: the file was removed, or has its own name now."""
    _mine.discard(str(path))


def remove_mine() -> None:
    """Remove what :func:`remove_at_end` was told, as this process ends at once. Never raises OSError."""
    for path in [*_mine]:
        shutil.rmtree(path, ignore_errors=True)
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(OSError):
                os.unlink(path + suffix)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file wholly or not at all, in a folder that is made if it is missing; a link to a file stays one.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    target = Path(os.path.realpath(path))
    if target.is_char_device():  # /dev/null, or a terminal: there is nothing to replace
        target.write_text(text, encoding="utf-8")
        return
    fresh = target.with_name(temporary_name(target.name))
    remove_at_end(fresh)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        if target.exists():
            shutil.copymode(target, fresh)
        os.replace(fresh, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # and not the temporary file's name
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink()
        forget(fresh)


def remove_orphans(folder: Path) -> None:
    """Remove the temporary files and folders directly in ``folder`` whose process has ended. Never raises OSError."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            found = _NAME.fullmatch(entry.name)
            if found is not None and _is_orphan(entry, found):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)


def _is_orphan(entry: os.DirEntry[str], found: re.Match[str]) -> bool:
    here = hashlib.sha256(machine().encode()).hexdigest()[:8]
    if machine() and found["machine"] == here:
        return started(int(found["pid"])) != found["start"]
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > ORPHAN_SECONDS
    except OSError:
        return False


@functools.cache
def machine() -> str:
    """What process numbers are unique in: a boot of a machine and, in containers, their namespace. Empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks since the boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
