"""The losses of counting, which a trained model is compared with."""

from __future__ import annotations

import math

import pytest

from doratune.benchmarks.quality.ngrams import ngram_loss

TEXT, HELD_OUT = b"aab", b"aba"  # predicted are the b and the second a


@pytest.mark.parametrize(("order", "probabilities"), [(1, (2 / 259, 3 / 259)), (2, (2 / 258, 1 / 256))])
def test_the_loss_is_that_of_counts_with_one_added(order: int, probabilities: tuple[float, float]) -> None:
    expected = -sum(map(math.log, probabilities)) / 2
    assert ngram_loss(TEXT, HELD_OUT, order) == pytest.approx(expected, rel=1e-6)
