"""Means of a few values: intervals by Student's t, and Holm's correction for many comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ...tuner import student


@dataclass(frozen=True)
class Interval:
    """A mean with a 95 % interval, and the two-sided p of a mean of 0; of fewer than two values only the mean."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], level: float = 0.95) -> Interval:
        """Of independent values, taken for normal."""
        n, mean = len(values), statistics.fmean(values)
        if n < 2:
            return cls(n, mean)
        error = statistics.stdev(values) / math.sqrt(n)
        if error == 0.0:
            return cls(n, mean, mean, mean, 0.0 if mean else 1.0)
        half = student.quantile(0.5 + level / 2.0, n - 1) * error
        return cls(n, mean, mean - half, mean + half, 2.0 * (1.0 - student.cdf(abs(mean) / error, n - 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each, in the order given: at 0.05 all are right with a probability of at least 95 %."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - done) * ps[index]))
        adjusted[index] = largest
    return adjusted
