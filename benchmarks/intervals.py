"""How sure a ratio of two times is: its mean over the rounds of a run, and the confidence interval of that.

Both times of a round come from the same seconds, so clocks that drift over a run cancel in their ratio. The mean is
that of the logarithms of the ratios, trimmed, so that an interrupt or another process hardly moves it: of every five
rounds the lowest and the highest take no part. Its interval is that of Tukey and McLaughlin (1963): Student's, with the
winsorised deviation.
It says how well the run knows the ratio, not how much it differs from process to process.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..tuner import student
from ..tuner.final import RESOLUTION
from ..tuner.machine import Machine, find_disturbance

CONFIDENCE = 0.95
LEAST_ROUNDS = 6
"""Rounds that an interval needs: of fewer, their deviation is hardly known."""

TRIMMED = 0.2
"""The share of the rounds that is left out at each end."""


@dataclass(frozen=True)
class Interval:
    """A ratio, and between which bounds it is with :data:`CONFIDENCE`."""

    mean: float
    low: float
    high: float


def interval(times: Sequence[float], others: Sequence[float]) -> Interval | None:
    """The mean of ``times`` over ``others``, round by round, with its interval; None below :data:`LEAST_ROUNDS` rounds.

    It is a geometric mean: that of the inverse ratios is its inverse.
    """
    if len(times) < LEAST_ROUNDS:
        return None
    logs = sorted(math.log(a / b) for a, b in zip(times, others, strict=True))
    out = int(TRIMMED * len(logs))
    kept = logs[out : len(logs) - out]
    deviation = max(statistics.stdev([kept[0]] * out + kept + [kept[-1]] * out), RESOLUTION)
    error = deviation / ((1.0 - 2.0 * TRIMMED) * math.sqrt(len(logs)))
    mean, reach = statistics.fmean(kept), student.quantile((1.0 + CONFIDENCE) / 2.0, len(kept) - 1) * error
    return Interval(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach))


def disturbance(case: str, times: Sequence[Sequence[float]], machine: Machine | None) -> list[str]:
    """A note if the rounds show moving clocks or interruptions, or if the GPU is shared; with the driver's reasons.

    ``times`` are microseconds, for each contender one a round. ``machine`` is the GPU; None for a CPU, whose times mean
    nothing.
    """
    if machine is None or not times or len(times[0]) < LEAST_ROUNDS:
        return []
    found = find_disturbance(times)
    if found is not None:
        return [f"{case}: {found}, {'; '.join(machine.causes()) or 'for no reason that the driver tells'}"]
    others = machine.other_processes()
    return [f"{case}: other processes on the GPU: {', '.join(map(str, others))}"] if others else []
