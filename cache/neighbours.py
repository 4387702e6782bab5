"""What a store has around a spec: the entries that could substitute for it, and what lookups lost there.

Plain values, as in :mod:`.entry`: no database code.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..codegen.spec import Config, KernelSpec


@dataclass(frozen=True)
class Candidate:
    """The part of an entry that lookup weighs it by, without source text and samples.

    ``distance`` is that from the wanted spec. ``beaten`` are the runners-up of the final that the config won, with
    their times over the winner's.
    """

    spec: KernelSpec
    config: Config
    template_digest: str
    provenance: str
    us: float | None = None
    floor_us: float | None = None
    lookup_regret: float | None = None
    distance: float = 0.0
    beaten: tuple[tuple[Config, float], ...] = ()


@dataclass(frozen=True)
class Regret:
    """What a lookup without it would have cost at a measured spec: the entry's ``lookup_regret``, and where that is."""

    gpu: str
    spec: str
    distance: float
    regret: float


@dataclass(frozen=True)
class Neighbourhood:
    """What a store has for specs like the wanted one: the nearest ``candidates``, and the ``regrets`` of all.

    ``damaged`` has a message for each row that could not be used.
    """

    candidates: tuple[Candidate, ...]
    regrets: tuple[Regret, ...]
    damaged: tuple[str, ...] = ()
