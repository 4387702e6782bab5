"""What a report rests on: the versions here, and each store, study storage and results file that was read."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .. import __version__
from ..benchmarks.results import measured_commit
from ..cache.entry import Entry, Environment
from ..cache.stack import PREBUILT, Place, open_place, stack_places
from ..internals.versions import installed
from ..runtime.present import gpus_here

_PACKAGES = ("torch", "triton", "optuna", "plotly", "peft", "transformers")


@dataclass(frozen=True)
class StoreRead:
    """A store that was read: where it is, who named it, its entries, and what could not be read."""

    location: str
    origin: str
    entries: tuple[Entry, ...]
    damaged: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """The store as values for JSON, with the number of its entries."""
        return {**vars(self), "entries": len(self.entries), "damaged": list(self.damaged)}


@dataclass(frozen=True)
class Here:
    """The environment that made the report; ``gpus`` are the slugs of the GPUs here."""

    created_at: str
    doratune: str
    commit: str
    python: str
    packages: tuple[tuple[str, str], ...]
    gpus: tuple[str, ...]

    def values(self) -> dict[str, Any]:
        """The environment as values for JSON."""
        return {**vars(self), "packages": dict(self.packages), "gpus": list(self.gpus)}


def read_stores(store: str | None, *, prebuilt: bool) -> list[StoreRead]:
    """Read ``store``, or else those of ``DORATUNE_CACHE_PATH`` and the user's own; ``prebuilt``: all of a lookup's.

    Raises:
        StoreError: one cannot be opened. LocationError: a location is none.
    """
    places = [place for place in stack_places(store) if place.origin != PREBUILT or prebuilt]
    if store is not None and not prebuilt:
        places = places[:1]
    return [_read(place) for place in places]


def _read(place: Place) -> StoreRead:
    opened = open_place(place)
    try:
        entries, damaged = opened.readable_entries()
        return StoreRead(opened.location, place.origin, tuple(entries), tuple(map(str, damaged)))
    finally:
        opened.close()


def here() -> Here:
    """The environment of this process."""
    versions = [(name, version) for name in _PACKAGES if (version := installed(name)) is not None]
    return Here(
        datetime.now(UTC).isoformat(timespec="seconds"),
        __version__,
        measured_commit(),
        platform.python_version(),
        tuple(versions),
        tuple(sorted(gpus_here())),
    )


def environments(entries: Iterable[Entry]) -> Sequence[tuple[Environment, int]]:
    """The environments that entries are from, with how many are, the most frequent first."""
    return Counter(entry.environment for entry in entries).most_common()
