"""Quantiles of Student's t are those of tables."""

from __future__ import annotations

import pytest

from doratune.tuner import student


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)]
)
def test_the_quantiles_of_t_are_those_of_tables(df: int, quantile: float) -> None:
    assert student.quantile(0.975, df) == pytest.approx(quantile, rel=2e-6)
    assert student.cdf(-quantile, df) == pytest.approx(0.025, rel=1e-4)
