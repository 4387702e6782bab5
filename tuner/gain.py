"""What a search gained over what ran before, by its final."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..cache.entry import Contender, Entry, Final
from ..codegen.spec import KernelSpec

SHOWN = 5
"""How many of the best and of the worst gains are listed."""

_BEFORE = ({"exact"}, {"nearest", "architecture"}, {"default"})
"""The origins of what a lookup gave before a search: the first of these that a contender has."""


def ran_before(final: Final) -> Contender | None:
    """What a lookup gave before the search: its own entry, else a neighbour's config, else the built-in default.

    None if it did not play, as when it was rejected.
    """
    for origins in _BEFORE:
        for contender in final.contenders:
            if origins.intersection(contender.origins):
                return contender
    return None


def gain(entry: Entry) -> float | None:
    """The time of what ran before over the winner's, both from the final: 1.02 is a gain of 2 %, 1.0 none.

    None without a final, or if what ran before did not play.
    """
    before = ran_before(entry.final) if entry.final is not None else None
    if before is None or entry.final is None:
        return None
    return before.us / entry.final.winner.us


@dataclass(frozen=True)
class Gained:
    """The gain of one kernel; ``before`` ran before, ``now`` is the winner."""

    spec: KernelSpec
    before: Contender
    now: Contender

    @property
    def gain(self) -> float:
        """As :func:`gain`."""
        return self.before.us / self.now.us

    @property
    def stayed(self) -> bool:
        """Whether what ran before won."""
        return self.before.config == self.now.config

    def values(self) -> dict[str, Any]:
        """The gain as values for JSON; times are microseconds."""
        return {
            "spec": str(self.spec),
            "before": str(self.before.config),
            "origins": list(self.before.origins),
            "before_us": self.before.us,
            "us": self.now.us,
            "gain": self.gain,
        }


@dataclass(frozen=True)
class Gains:
    """The gains of a run's kernels, the worst first. ``unknown`` counts the kernels whose gain was not measured."""

    kernels: tuple[Gained, ...]
    unknown: int = 0

    @property
    def moved(self) -> tuple[Gained, ...]:
        """Those that run another config than before, the worst first."""
        return tuple(one for one in self.kernels if not one.stayed)

    @property
    def stayed(self) -> int:
        """How many kernels stayed with what ran before."""
        return len(self.kernels) - len(self.moved)

    @property
    def median(self) -> float | None:
        """The median gain, with those that stayed; None if no gain was measured."""
        return statistics.median(one.gain for one in self.kernels) if self.kernels else None

    @property
    def worst(self) -> tuple[Gained, ...]:
        """The least gains of those that moved, the worst first; at most :data:`SHOWN`, none of :attr:`best`."""
        return self.moved[: max(0, min(SHOWN, len(self.moved) - SHOWN))]

    @property
    def best(self) -> tuple[Gained, ...]:
        """The largest gains of those that moved, the best first; at most :data:`SHOWN`."""
        return self.moved[::-1][:SHOWN]

    def values(self) -> dict[str, Any]:
        """The gains as values for JSON."""
        return {
            "kernels": len(self.kernels),
            "stayed": self.stayed,
            "unknown": self.unknown,
            "median": self.median,
            "worst": [one.values() for one in self.worst],
            "best": [one.values() for one in self.best],
        }

    def sentence(self) -> str:
        """The gains in a sentence; empty if none was measured."""
        if self.median is None:
            return ""
        parts = [f"{self.stayed} of {len(self.kernels)} kernels stayed with what ran before"]
        parts.append(f"median gain {percent(self.median)}")
        if self.moved:
            least, most = percent(self.moved[0].gain), percent(self.moved[-1].gain)
            parts.append(f"from {least} to {most} where the config changed")
        if self.unknown:
            parts.append(f"{self.unknown} not compared with what ran before")
        return ", ".join(parts)


def gains_of(entries: Iterable[Entry]) -> Gains:
    """The gains that the finals of ``entries`` show."""
    found, unknown = [], 0
    for entry in entries:
        before = ran_before(entry.final) if entry.final is not None else None
        if entry.final is None or before is None:
            unknown += 1
        else:
            found.append(Gained(entry.spec, before, entry.final.winner))
    return Gains(tuple(sorted(found, key=lambda one: (one.gain, str(one.spec)))), unknown)


def percent(gain: float) -> str:
    """A gain in words: 1.021 is ``2.1 %``."""
    return f"{100.0 * (gain - 1.0):.1f} %".replace("-0.0 %", "0.0 %")
