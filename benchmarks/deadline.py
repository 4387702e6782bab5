"""A time that a whole command keeps to, shared among what is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Budget:
    """The seconds of a whole command, shared among its runs; ``began`` on the monotonic clock."""

    seconds: float
    began: float

    @classmethod
    def begin(cls, seconds: float) -> Budget:
        return cls(seconds, time.monotonic())

    @property
    def until(self) -> float:
        """The second of the monotonic clock at which they are spent."""
        return self.began + self.seconds

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.spent)

    def share(self, weights: Sequence[float]) -> float:
        """The seconds of the first of the runs with these weights, all of which are still to come."""
        return self.left * weights[0] / sum(weights)
