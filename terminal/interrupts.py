"""Ctrl-C while a command runs: exit code 130 within seconds, and no process or temporary file left.

The first Ctrl-C (or SIGTERM) asks: Python raises ``KeyboardInterrupt`` in the main thread, unless what runs handles the
signal itself, as ``doratune tune`` does to finish the candidates under evaluation. A second one ends the process and
its children at once, and so does a process that still runs :data:`GRACE_SECONDS` after the first. A thread sees to
that: the main thread may be waiting inside a database or a compiler, where Python runs no handler.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

GRACE_SECONDS = 3.5
"""How long a command may take to end after the first Ctrl-C."""

_PRINT_SECONDS = 1.0
_STOPS = (signal.SIGINT, signal.SIGTERM)

_seen = threading.Event()
_raised = threading.Event()
_watching = threading.Event()
_printing = threading.Lock()


def watch() -> None:
    """Begin to watch for Ctrl-C and SIGTERM, for the rest of this process. To be called in the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's background jobs set it
            signal.signal(number, _raise)
    sys.unraisablehook = _print_unless_interrupted
    _watching.set()
    threading.Thread(target=_watch, args=(reader,), name="doratune interrupts", daemon=True).start()


def seen() -> bool:
    """Whether a watched Ctrl-C or SIGTERM has come."""
    return _seen.is_set() or _raised.is_set()


@contextmanager
def printing() -> Iterator[None]:
    """Let the output that is written in the block be complete before a Ctrl-C ends the process."""
    with _printing:
        yield


def end(code: int = INTERRUPTED) -> NoReturn:
    """End this process now, with its children and theirs, and without what :mod:`..temporaries` is to remove."""
    _printing.acquire(timeout=_PRINT_SECONDS)
    kill_descendants(os.getpid())
    temporaries = sys.modules.get(f"{__package__.partition('.')[0]}.temporaries")  # if it is loaded
    if temporaries is not None:
        temporaries.remove_mine()
    os._exit(code)


def end_at_once_from_now_on() -> None:
    """Let a Ctrl-C end the process without an exception: for the interpreter's own shutdown, which would print it."""
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: end())


def kill_descendants(parent: int) -> None:
    """Kill the children of a process and theirs, all of them at one moment. Does nothing where there is no ``/proc``.

    Multiprocessing's resource tracker is spared: it ends by itself, after it has removed what the others leave.
    """
    stopped: set[int] = set()
    while found := _descendants(parent) - stopped:
        for pid in found:  # a stopped process starts no other one
            _send(pid, signal.SIGSTOP)
        stopped |= found
    for pid in stopped:
        _send(pid, signal.SIGKILL)


def _descendants(parent: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, above = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(above), []).append(int(folder.name))
    found: set[int] = set()
    left = [parent]
    while left:
        below = [child for child in children.get(left.pop(), ()) if child != _tracker()]
        found.update(below)
        left += below
    return found


def _tracker() -> int | None:
    module = sys.modules.get("multiprocessing.resource_tracker")
    return getattr(getattr(module, "_resource_tracker", None), "_pid", None)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _raise(number: int, frame: FrameType | None) -> None:
    if not _raised.is_set():  # at the second the watch ends the process, which may be cleaning up
        _raised.set()
        silence_logs()
        raise KeyboardInterrupt


def _print_unless_interrupted(unraisable: Any) -> None:
    """Print what Python cannot raise, in a finaliser for example, but not a Ctrl-C, nor what comes of one.

    Such a Ctrl-C is lost, and the watch ends the process.
    """
    if not seen():
        sys.__unraisablehook__(unraisable)


def take_as_request() -> bool:
    """Call this where a handler of one's own takes a Ctrl-C as a request to stop; returns whether a watch is on.

    Then it ends the process at the next one, which must raise nothing: what it came to might print it.
    """
    silence_logs()
    if _watching.is_set():
        _raised.set()
    return _watching.is_set()


def silence_logs() -> None:
    """Let no package log that it is interrupted: SQLAlchemy does, with a traceback, while it closes a connection."""
    logging = sys.modules.get("logging")
    if logging is not None:
        logging.disable(logging.CRITICAL)


def _watch(reader: int) -> None:
    _comes(reader, None)
    _seen.set()
    _comes(reader, GRACE_SECONDS)
    end()


def _comes(reader: int, seconds: float | None) -> None:
    """Return when the next Ctrl-C or SIGTERM has come, or after ``seconds``."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], left)[0]:
            return
        if os.read(reader, 1)[0] in _STOPS:  # one at a time: each counts
            return
