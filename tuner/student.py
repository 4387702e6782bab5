"""Student's t: how far the mean of a few values may be from what many would give."""

from __future__ import annotations

import functools
import math


def cdf(t: float, df: int) -> float:
    """P(T ≤ t) for Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if df < 1:
        raise ValueError(f"df must be at least 1, got {df}")
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(odd, df - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    inside = 2.0 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + 0.5 * inside


@functools.cache
def quantile(probability: float, df: int) -> float:
    """The t with P(T ≤ t) = ``probability``, above 1/2 and below 1."""
    low, high = 0.0, 1.0
    while cdf(high, df) < probability:
        low, high = high, 2.0 * high
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if cdf(middle, df) < probability else (low, middle)
    return high
