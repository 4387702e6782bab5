"""Intervals and corrections are those of textbooks and tables."""

from __future__ import annotations

import pytest

from doratune.benchmarks.quality.intervals import Interval, holm


def test_an_interval_is_that_of_the_t_test() -> None:
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.low, found.high) == (pytest.approx(1.036757), pytest.approx(4.963243))
    assert found.p == pytest.approx(0.013236, rel=1e-3)  # t = 3 / (sqrt(2.5) / sqrt(5)) = 4.2426, 4 degrees of freedom
    assert Interval.of([2.0]) == Interval(1, 2.0)
    assert Interval.of([0.5, 0.5]).p == 0.0
    assert Interval.of([0.0, 0.0]).p == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
