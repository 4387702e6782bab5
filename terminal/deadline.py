"""A second of the clock after which what runs is ended: Python code by an exception, native code with the process."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from ..errors import DoratuneError
from . import interrupts

NATIVE_SECONDS = 1.0
"""How long a call into native code, which answers no signal, may go on after its time."""


class TimeUpError(DoratuneError):
    """A call was ended because its time was up."""


class _Stop(BaseException):
    """Not an Exception: compilers catch those, and go on in another way."""


@contextlib.contextmanager
def time_limit(until: float | None, *, last_words: DoratuneError | None = None) -> Iterator[None]:
    """End the block at the second ``until`` of the monotonic clock, in Python code, such as that of torch.compile.

    One operation of PyTorch may take hours and runs no Python code. With ``last_words``, if the block is inside one
    :data:`NATIVE_SECONDS` later, the process prints this error and ends with its exit code.

    Without a limit where ``until`` is None, and outside of the main thread, where no signal arrives.

    Raises:
        TimeUpError: the time was up.
    """
    if until is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    begin, waiting = time.monotonic(), 0.0
    handler = signal.signal(signal.SIGALRM, stop)
    watch = threading.Timer(max(0.0, until - begin) + NATIVE_SECONDS, _end, (last_words,))
    watch.daemon = True
    try:
        if last_words is not None:
            watch.start()
        waiting, _ = signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - begin))
        yield
    except _Stop:
        raise TimeUpError("the time was up") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        watch.cancel()
        signal.signal(signal.SIGALRM, handler)
        if waiting:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, waiting - (time.monotonic() - begin)))


def _end(last_words: DoratuneError) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"Error: {last_words}", file=sys.stderr, flush=True)
    interrupts.end(last_words.exit_code)
