"""A time that a whole command keeps to: shared among what is measured; a call that goes beyond it is ended."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from ..errors import DoratuneError


class TimeUpError(DoratuneError):
    """A call was ended because its time was up."""


class _Stop(BaseException):
    """Not an Exception: compilers catch those, and go on in another way."""


@dataclass
class Budget:
    """The seconds of a whole command, shared among its runs; ``began`` on the monotonic clock."""

    seconds: float
    began: float

    @classmethod
    def begin(cls, seconds: float) -> Budget:
        return cls(seconds, time.monotonic())

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def share(self, weights: Sequence[float]) -> float:
        """The seconds of the first of the runs with these weights, all of which are still to come."""
        return self.left * weights[0] / sum(weights)


@contextlib.contextmanager
def time_limit(until: float | None) -> Iterator[None]:
    """End the block at the second ``until`` of the monotonic clock, in Python code, such as that of torch.compile.

    Without a limit where ``until`` is None, and outside of the main thread, where no signal arrives.

    Raises:
        TimeUpError: the time was up.
    """
    if until is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop

    begin = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    waiting, _ = signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - begin))
    try:
        yield
    except _Stop:
        raise TimeUpError("the time was up") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        if waiting:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, waiting - (time.monotonic() - begin)))
