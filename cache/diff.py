"""Say in which entries and binaries two stores differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..codegen.spec import KernelSpec
from .entry import BinaryKey, Entry
from .store import Store

FIRST, SECOND, BOTH = "first", "second", "both"


@dataclass(frozen=True)
class Difference:
    """One spec in which two stores differ: an entry in one alone, or one in both that are not the same."""

    spec: KernelSpec
    first: Entry | None
    second: Entry | None

    @property
    def where(self) -> str:
        """``first`` or ``second`` where only that store has an entry, else ``both``."""
        if self.first is not None and self.second is not None:
            return BOTH
        return SECOND if self.first is None else FIRST

    @property
    def fields(self) -> tuple[str, ...]:
        """What differs between two entries: config, source, time, provenance, environment, age."""
        if self.first is None or self.second is None:
            return ()
        pairs: Mapping[str, tuple[object, object]] = {
            name: (value, _facts(self.second)[name]) for name, value in _facts(self.first).items()
        }
        return tuple(name for name, (one, other) in pairs.items() if one != other)


@dataclass(frozen=True)
class Differences:
    """How two stores differ; ``damaged`` are the rows of either that cannot be read."""

    entries: tuple[Difference, ...]
    binaries: tuple[frozenset[BinaryKey], frozenset[BinaryKey]]
    same: int
    damaged: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether the stores differ in anything that can be read."""
        return bool(self.entries or self.binaries[0] or self.binaries[1])


def diff(first: Store, second: Store) -> Differences:
    """Compare two stores. A damaged row costs that row.

    Raises:
        StoreError: a store cannot be read.
    """
    damaged: list[str] = []
    tables = []
    for store in (first, second):
        entries, bad = store.readable_entries()
        damaged += map(str, bad)
        tables.append({entry.spec: entry for entry in entries})
    specs = sorted({*tables[0], *tables[1]}, key=str)
    compared = [Difference(spec, tables[0].get(spec), tables[1].get(spec)) for spec in specs]
    entries_apart = tuple(one for one in compared if one.where != BOTH or one.fields)
    keys = frozenset(first.binary_keys()), frozenset(second.binary_keys())
    return Differences(
        entries_apart, (keys[0] - keys[1], keys[1] - keys[0]), len(compared) - len(entries_apart), tuple(damaged)
    )


def _facts(entry: Entry) -> dict[str, object]:
    evaluation = entry.evaluation
    return {
        "config": entry.config,
        "source": entry.source_digest,
        "time": (evaluation.us, evaluation.samples_us),
        "provenance": evaluation.provenance,
        "environment": entry.environment,
        "age": entry.created_at,
    }
