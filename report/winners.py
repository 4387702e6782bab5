"""The winners of the stores: each beside its floor, and beside what ran before its search."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.entry import DEFAULT, MEASURED, PREDICTED, Contender, Entry
from ..codegen.render import template_digest
from ..codegen.spec import FLAGS, KernelSpec, SpecError
from ..tuner.gain import gain, ran_before
from ..tuner.report import row_of

_USUAL = "bf16"
_ORDER = {MEASURED: 0, PREDICTED: 1, DEFAULT: 2}


@dataclass(frozen=True)
class Winner:
    """An entry, the location of its store, and how many other stores have one for its spec too."""

    entry: Entry
    store: str
    others: int = 0

    @property
    def spec(self) -> KernelSpec:
        return self.entry.spec

    @property
    def us(self) -> float | None:
        """Microseconds of GPU time, measured or predicted."""
        return self.entry.evaluation.us

    @property
    def over_floor(self) -> float | None:
        """Its time over the least that bytes and flops allow at attainable rates; None if either is not known."""
        floor = self.entry.evaluation.floor_us
        return self.us / floor if self.us and floor else None

    @property
    def measured(self) -> bool:
        return self.entry.evaluation.provenance == MEASURED

    @property
    def other_template(self) -> bool:
        """Whether it was tuned with another template than the installed one, or its variant is gone."""
        try:
            return self.entry.template_digest != template_digest(self.spec.op, self.entry.config.variant)
        except SpecError:
            return True

    @property
    def before(self) -> Contender | None:
        """What ran before its search, if that played in its final."""
        return ran_before(self.entry.final) if self.entry.final is not None else None

    @property
    def gain(self) -> float | None:
        """The time of what ran before over the winner's, from the final."""
        return gain(self.entry)

    @property
    def stayed(self) -> bool:
        """Whether what ran before won."""
        return self.before is not None and self.before.config == self.entry.config

    def gain_spread(self) -> tuple[float, float] | None:
        """The 20th and 80th percentile of the gain over the rounds of the final; None with fewer than two rounds."""
        before, final = self.before, self.entry.final
        if before is None or final is None:
            return None
        rounds = zip(before.samples_us, final.winner.samples_us, strict=False)
        ratios = [theirs / ours for theirs, ours in rounds if ours > 0.0]
        if len(ratios) < 2:
            return None
        low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
        return low, high

    def values(self) -> dict[str, Any]:
        """The winner as values for JSON."""
        spread = self.gain_spread()
        final = self.entry.final
        return {
            "store": self.store,
            **row_of(self.entry),
            "gpu": self.spec.gpu,
            "gain_p20": None if spread is None else spread[0],
            "gain_p80": None if spread is None else spread[1],
            "settled": None if final is None else final.settled,
            "notices": [] if final is None else list(final.notices),
            "lookup_regret": self.entry.lookup_regret,
            "created_at": self.entry.created_at,
            "other_template": self.other_template,
            "other_stores": self.others,
        }


def shape_text(spec: KernelSpec) -> str:
    """The sizes of a spec, with dtypes other than bf16 and with flags: ``4096×14336 r 16, 1 token, bias``."""
    sizes = "+".join(map(str, spec.widths)) + (f"×{spec.d_in}" if spec.d_in else "")
    parts = [f"{spec.layers} of {sizes}" if spec.layers else sizes]
    parts[0] += f" r {spec.rank}" if spec.rank else ""
    if spec.tokens:
        parts.append(f"{spec.tokens} token{'' if spec.tokens == 1 else 's'}")
    dtype = spec.weight or spec.activation
    if dtype not in ("", _USUAL):
        parts.append(dtype)
    if spec.adapter not in ("", dtype):
        parts.append(f"{spec.adapter} adapters")
    return ", ".join([*parts, *(flag for flag in FLAGS if getattr(spec, flag))])


def best_of(stored: Iterable[tuple[str, Entry]]) -> list[Winner]:
    """One winner for each spec, by spec; ``stored`` are entries with their stores, in the order of the search.

    As in a lookup a measured entry goes before a predicted one, and among equals the earlier store wins.
    """
    by_spec: dict[KernelSpec, list[tuple[str, Entry]]] = {}
    for store, entry in stored:
        by_spec.setdefault(entry.spec, []).append((store, entry))
    found = []
    for several in by_spec.values():
        store, entry = min(several, key=lambda pair: _ORDER.get(pair[1].evaluation.provenance, len(_ORDER)))
        found.append(Winner(entry, store, len(several) - 1))
    return sorted(found, key=lambda winner: str(winner.spec))


def median_gain(winners: Sequence[Winner]) -> float | None:
    """The median of the gains that the finals show, those of kernels that stayed included."""
    gains = [winner.gain for winner in winners if winner.gain is not None]
    return statistics.median(gains) if gains else None
