"""The search for a method's learning rate: powers of two around a guess, until the best one's neighbours are worse."""

from __future__ import annotations

import math
from collections.abc import Mapping

GRID = range(-8, 9)
"""Exponents of two; the rate is :data:`UNIT` times that power."""
UNIT = 1e-3


def rate_of(exponent: int) -> float:
    """The learning rate of a place on the grid."""
    return float(UNIT * 2.0**exponent)


def next_exponent(losses: Mapping[int, float], guess: int, grid: range = GRID) -> int | None:
    """The exponent to try next, given the ``losses`` of those tried (infinite where training diverged); None: no more.

    Three are tried around ``guess``, then neighbours of the best.
    """
    for exponent in (guess, guess - 1, guess + 1):
        if exponent in grid and exponent not in losses:
            return exponent
    best = best_exponent(losses)
    for exponent in (best - 1, best + 1):
        if exponent in grid and exponent not in losses:
            return exponent
    return None


def best_exponent(losses: Mapping[int, float]) -> int:
    """That of the lowest loss; of equal ones the smallest."""
    return min(sorted(losses), key=lambda exponent: losses[exponent])


def at_the_edge(losses: Mapping[int, float]) -> bool:
    """Whether the best is not shown to be the best: a neighbour was not tried, or is no worse."""
    best = best_exponent(losses)
    lowest = losses[best]
    return any(not losses.get(neighbour, -math.inf) > lowest for neighbour in (best - 1, best + 1))
