"""How much a lookup may lose: the loss that 95 % of the measured lookups around it did not exceed.

Each search ends in a final in which the config also plays that the lookup gave without it (``Entry.lookup_regret``), so
every measured entry is one sample of what the lookup of its operation loses.

With n samples, the k-th smallest is exceeded by the next one with probability ``1 - k / (n + 1)``, whatever the
distribution is (conformal prediction). For 95 % that needs 19 samples. With fewer the largest one is stretched by
:func:`stretch`, which is right where losses are exponentially distributed, and meets the exact rule at 19. Real losses
have a longer tail, so such a bound is widened by :data:`MARGIN`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .neighbours import Regret

LEVEL = 0.95
"""The share of lookups that lose no more than the bound."""
LEAST_MEASURED = 5
"""With fewer samples there is no bound: the largest would have to be doubled, and more."""
ENOUGH_MEASURED = 19
MARGIN = 2.0
"""The factor for fewer than :data:`ENOUGH_MEASURED`, whose bound rests on the tail that :func:`stretch` assumes. With
more the rule assumes nothing of the losses, but that the wanted shape is drawn as the measured ones are. Where it is
not, it held of the shipped H100 losses for 96 %: those of a shape, a rank or a token bucket by the others'."""
MOST_LOSS = 10.0
"""A lookup that lost more counts as this much: a store may come from anybody."""
LEAST_LOSS = 0.01
"""No bound is below this: two measurements of one kernel differ by as much."""


@dataclass(frozen=True)
class Bound:
    """The bound of a lookup's loss, as a share of the best config's time: None where too few lookups were measured.

    ``measured`` is the number of lookups that it rests on, and ``gpus`` are those where they were measured.
    """

    op: str
    loss: float | None
    measured: int
    gpus: tuple[str, ...]
    unlike: bool = False
    """Whether the choice is of another kind than what was measured: of an entry that is far, or far from every one."""

    def __str__(self) -> str:
        lookups = f"measured lookup{'' if self.measured == 1 else 's'} of {self.op}"
        on = f"on {' and '.join(self.gpus)}"
        if self.unlike and self.measured:
            return f"unknown: the {self.measured} {lookups} {on} are of shapes with entries near"
        if self.loss is not None:
            return f"≤ {math.ceil(100 * self.loss - 1e-9)} % ({100 * LEVEL:.0f} % of {self.measured} {lookups} {on})"
        return f"unknown: only {self.measured} {lookups} {on}" if self.measured else f"unknown: no {lookups} {on}"


FAR_DISTANCE = 8.0
"""Entries at a greater distance say nothing of the loss; see :func:`~.distance.distance`."""


def without_neighbours(bound: Bound) -> Bound:
    """The bound of a choice that no entry near supports: none, whatever was measured elsewhere."""
    return replace(bound, loss=None, unlike=True)


def bound_of(op: str, gpu: str, regrets: Iterable[Regret]) -> Bound:
    """The bound for a lookup of ``op`` on ``gpu``: from the lookups on it, else from those on sister GPUs too.

    Of several regrets of one spec, from several stores, the largest counts.
    """
    largest: dict[tuple[str, str], float] = {}
    for each in regrets:
        key = (each.gpu, each.spec)
        largest[key] = max(largest.get(key, 0.0), min(each.regret - 1.0, MOST_LOSS))
    own = [loss for (where, _), loss in largest.items() if where == gpu]
    if len(own) >= LEAST_MEASURED or len(own) == len(largest):
        return Bound(op, _quantile(own), len(own), (gpu,))
    return Bound(op, _quantile(largest.values()), len(largest), tuple(sorted({where for where, _ in largest})))


def _quantile(losses: Iterable[float]) -> float | None:
    ordered = sorted(losses)
    count = len(ordered)
    if count < LEAST_MEASURED:
        return None
    rank = math.ceil(LEVEL * (count + 1))
    loss = ordered[rank - 1] if rank <= count else ordered[-1] * stretch(count)
    return max(loss if count >= ENOUGH_MEASURED else MARGIN * loss, LEAST_LOSS)


@functools.cache
def stretch(count: int) -> float:
    """The factor k with which ``count`` exponential samples' maximum is exceeded by another one with probability 5 %.

    The probability is ``count * B(k + 1, count)`` with the beta function B; at 19 samples k is 1.
    """

    def exceeded(factor: float) -> float:
        return math.exp(
            math.log(count) + math.lgamma(factor + 1) + math.lgamma(count) - math.lgamma(factor + 1 + count)
        )

    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeded(middle) > 1 - LEVEL else (low, middle)
    return max(high, 1.0)
