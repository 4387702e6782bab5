"""What processes that compile for another process have in common: their number, their limits and their end."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

COMPILE_SECONDS = 60
"""A compile that uses more processor time is ended: a kernel of this package takes one to three seconds."""

STUCK_SECONDS = 180
"""A compile that takes this long by the clock is ended too: the machine may be busy, or a disk may hang."""

INTERPRETER = "TRITON_INTERPRET"
"""The environment variable that switches on Triton's CPU interpreter; with it nothing compiles."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def starting() -> Iterator[None]:
    """For starting processes that call :func:`end_with_parent`: until then a Ctrl-C must not reach them either.

    The switch of Triton's CPU interpreter is unset: with it nothing compiles, and a spawned process first imports the
    parent's main module, which may import Triton.
    """
    resource_tracker.ensure_running()  # a worker's queues start it, and multiprocessing then lets Ctrl-C through again
    switch = os.environ.pop(INTERPRETER, None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; one that comes now waits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if switch is not None:
            os.environ[INTERPRETER] = switch


def end_with_parent(parent: int) -> None:
    """Make this process end when the thread that started it does, and leave Ctrl-C to process ``parent``.

    Ctrl-C on a terminal goes to a whole process group, so this process and its tools get one of their own. What they
    print goes to standard error: standard output is for the parent's results.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):  # it leads one already
        os.setsid()
    os.dup2(2, 1)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def prepare_worker(parent: int, temporary: str | None = None) -> None:
    """Make this process ready for :func:`time_limit`, and end with its ``parent``.

    ``temporary`` is the folder for the temporary files of the compilers, which leave some behind when they fail.
    """
    if temporary is not None:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary
    for timer in (signal.SIGALRM, signal.SIGPROF):  # end the process even inside LLVM, where no Python handler runs
        signal.signal(timer, signal.SIG_DFL)
    end_with_parent(parent)


@contextmanager
def time_limit() -> Iterator[None]:
    """End this process by a signal if the block exceeds :data:`COMPILE_SECONDS` or :data:`STUCK_SECONDS`."""
    signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)
    signal.alarm(STUCK_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
