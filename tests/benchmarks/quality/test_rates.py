"""A learning rate is the best one only where its neighbours are worse."""

from __future__ import annotations

import math
from typing import Any

import pytest

from doratune.benchmarks.quality.rates import at_the_edge, best_exponent, next_exponent


def search(loss: Any, guess: int, grid: range) -> dict[int, float]:
    tried: dict[int, float] = {}
    while (exponent := next_exponent(tried, guess, grid)) is not None:
        tried[exponent] = loss(exponent)
    return tried


@pytest.mark.parametrize("guess", [-5, 0, 5])
def test_the_best_rate_has_a_worse_one_on_either_side(guess: int) -> None:
    tried = search(lambda exponent: (exponent - 2) ** 2, guess, range(-8, 9))
    assert best_exponent(tried) == 2
    assert not at_the_edge(tried)
    assert len(tried) <= abs(guess - 2) + 3


def test_a_best_rate_at_the_end_of_the_grid_or_among_equals_is_at_its_edge() -> None:
    falling = search(lambda exponent: -exponent, 0, range(-3, 4))
    assert best_exponent(falling) == 3
    assert at_the_edge(falling)
    assert at_the_edge(search(lambda exponent: 1.0, 0, range(-1, 2)))
    assert at_the_edge({0: 1.0, 1: 2.0}), "one neighbour was not tried"


def test_a_rate_at_which_training_diverged_is_the_worst() -> None:
    tried = search(lambda exponent: math.inf if exponent > 0 else -exponent, 4, range(-8, 9))
    assert best_exponent(tried) == 0
    assert not at_the_edge(tried)
