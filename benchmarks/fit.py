"""How many decoder layers of a model fit into the memory of a GPU, and into the time that a user has.

A model of one layer and one of two are built and called. What a model takes is then linear in its layers: the bytes of
its weights and adapters, those of a call, its time. Stock PEFT's DoRA is called, which takes the most of all.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from .adapted import MOST_WARM_UPS, WARM_UPS
from .intervals import LEAST_ROUNDS

MEMORY_SHARE = 0.85
"""Share of the GPU's free memory that is planned for; other implementations keep some of their own."""

CALLS = 1 + WARM_UPS + 3 + LEAST_ROUNDS
"""Calls of a contender: compared with PEFT, warmed up, its memory, the host's time, the fewest rounds that give an
interval. Beyond :data:`~.adapted.WARM_UPS` some are called once or twice more until their kernels are compiled."""
assert WARM_UPS + 1 <= MOST_WARM_UPS


@dataclass(frozen=True)
class Cost:
    """What a model of so many layers takes.

    ``built``: bytes of its weights before they are quantised. ``held``: bytes of weights and adapters. ``peak``: bytes
    that a call adds. ``us``: microseconds of one call of each operation, all together.
    """

    layers: int
    built: float
    held: float
    peak: float
    us: float

    @property
    def bytes(self) -> float:
        """The memory that must be there."""
        return max(self.built, self.held + self.peak)


@dataclass(frozen=True)
class Costs:
    """The costs of a model by its layers, from those of one layer and of two."""

    one: Cost
    two: Cost

    def of(self, layers: int) -> Cost:
        more = layers - self.one.layers
        values = ((getattr(self.one, name), getattr(self.two, name)) for name in ("built", "held", "peak", "us"))
        return Cost(layers, *(a + more * max(0.0, b - a) for a, b in values))


@dataclass(frozen=True)
class Fit:
    """The layers that are measured, the seconds of all their calls, and why not all of them; empty where all are."""

    layers: int
    seconds: float
    cuts: tuple[str, ...] = ()


def fit(costs: Costs, wanted: int, *, memory: float | None, seconds: float, contenders: int) -> Fit:
    """The most layers, up to ``wanted``, whose memory is there and whose calls end in time.

    ``memory`` is in bytes, None for no limit. ``seconds`` are for :data:`CALLS` calls of each of the ``contenders``.
    There is always one layer, also where its calls do not end in time.
    """
    room = math.inf if memory is None else MEMORY_SHARE * memory

    def in_memory(layers: int) -> bool:
        return costs.of(layers).bytes <= room

    def in_seconds(layers: int) -> bool:
        return CALLS * contenders * costs.of(layers).us / 1e6 <= seconds

    by_memory = _most(wanted, in_memory)
    by_time = _most(wanted, in_seconds)
    layers = max(1, min(by_memory, by_time))
    cuts = []
    if by_memory < wanted:
        needed = costs.of(wanted).bytes / 1e9
        cuts.append(f"{layers} of {wanted} layers: all need about {needed:.1f} GB, and {room / 1e9:.1f} GB are there")
    elif layers < wanted:
        needed = CALLS * contenders * costs.of(wanted).us / 1e6
        cuts.append(
            f"{layers} of {wanted} layers: all take about {_seconds(needed)}, and {_seconds(seconds)} are there"
        )
    return Fit(layers, CALLS * contenders * costs.of(layers).us / 1e6, tuple(cuts))


def _most(wanted: int, fits: Callable[[int], bool]) -> int:
    """The most layers that fit, 0 if one does not; whatever fits, fewer layers do, too."""
    return bisect.bisect_left(range(1, wanted + 1), True, key=lambda layers: not fits(layers))


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10.0 else f"{max(0.0, seconds):.1f} s"
