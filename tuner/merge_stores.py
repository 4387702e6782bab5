"""``doratune cache merge`` and ``cache diff``: open the stores, and print what :mod:`doratune.cache` finds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.diff import Differences, diff
from ..cache.entry import Binary, Entry
from ..cache.errors import MissingStoreError
from ..cache.location import Location
from ..cache.merge import ADD, FASTER, KEEP, REPLACE, Plan, carry_out, plan
from ..cache.signing import signers
from ..cache.stack import user_store_path
from ..cache.store import Store
from ..cache.trust import trust
from ..terminal.tables import Table


@dataclass(frozen=True)
class Merged:
    """A merge: its plan, the store, and whether it was only planned."""

    plan: Plan
    store: str
    dry_run: bool

    def summary(self) -> str:
        planned = self.plan
        verb = "would be added" if self.dry_run else "added"
        parts = [
            f"{planned.count(ADD)} entries {verb}, {planned.count(REPLACE)} replaced, {planned.count(KEEP)} kept, "
            f"{planned.equal} the same",
            f"{len(planned.binaries)} binaries {verb}",
        ]
        if planned.skipped:
            parts.append(f"{len(planned.skipped)} skipped")
        return f"{'; '.join(parts)}: {self.store}"

    def values(self) -> dict[str, Any]:
        """For JSON. Times are microseconds."""
        return {
            "store": self.store,
            "dry_run": self.dry_run,
            "changes": [
                {
                    "spec": str(change.spec),
                    "action": change.action,
                    "source": change.source,
                    "why": change.why,
                    **_facts("", change.entry),
                    **_facts("other_", change.other),
                }
                for change in self.plan.changes
            ],
            "equal": self.plan.equal,
            "binaries": len(self.plan.binaries),
            "skipped": list(self.plan.skipped),
        }


def merge_stores(
    sources: Sequence[str],
    store: str | None = None,
    *,
    prefer: str = FASTER,
    dry_run: bool = False,
    trusted: Sequence[str] = (),
) -> Merged:
    """Merge stores into ``store``, which is made if it is missing; None means the user's own.

    Binaries come from sources that this user trusts (:mod:`doratune.cache.trust`), or if a trusted key signed them.

    Raises:
        StoreError: a source cannot be opened, or the store cannot be written. LocationError, NoHomeError: a location
            does not name a store. MergeConflictError: as :func:`~doratune.cache.merge.plan`.
    """
    believed = trust(trusted)
    where = Location.parse(store or user_store_path())

    def signed(source: Store, binaries: Sequence[Binary]) -> list[bool]:
        return [key is not None for key in signers(source, binaries, believed.keys)]

    with contextlib.ExitStack() as opened:
        found = [opened.enter_context(Store.open(source, readonly=True)) for source in sources]
        target: Store | None
        if dry_run:
            try:
                target = opened.enter_context(Store.open(store or user_store_path(), readonly=True))
            except MissingStoreError:
                target = None
        else:
            target = opened.enter_context(Store.open(store or user_store_path(), create=True))
        planned = plan(found, target, prefer=prefer, refusal=believed.refusal, signed=signed if believed.keys else None)
        if target is not None and not dry_run:
            carry_out(planned, target)
        return Merged(planned, str(where), dry_run)


def merge_table(planned: Plan) -> Table:
    """The changes of a plan."""
    table = Table(title="merge")
    for name in ("action", "spec"):
        table.add_column(name)
    for name in ("us", "instead of"):
        table.add_column(name, justify="right")
    table.add_column("because")
    for change in planned.changes:
        cells = (change.action, str(change.spec), _time(change.entry), _time(change.other), change.why)
        table.add_row(*cells)
    return table


def diff_stores(first: str, second: str) -> Differences:
    """Compare two stores by their locations.

    Raises:
        StoreError: one cannot be opened or read. LocationError: a location does not name a store.
    """
    with Store.open(first, readonly=True) as one, Store.open(second, readonly=True) as other:
        return diff(one, other)


def diff_table(found: Differences) -> Table:
    """The specs in which two stores differ."""
    table = Table(title="A and B")
    for name in ("spec", "A", "B", "differ in"):
        table.add_column(name)
    for one in found.entries:
        cells = (str(one.spec), _time(one.first), _time(one.second), ", ".join(one.fields))
        table.add_row(*cells)
    return table


def diff_values(found: Differences) -> dict[str, Any]:
    """For JSON. Times are microseconds."""
    return {
        "entries": [
            {
                "spec": str(one.spec),
                "where": one.where,
                "fields": list(one.fields),
                **_facts("first_", one.first),
                **_facts("second_", one.second),
            }
            for one in found.entries
        ],
        "binaries": {
            name: [key._asdict() for key in sorted(keys)]
            for name, keys in zip(("first", "second"), found.binaries, strict=True)
        },
        "same": found.same,
        "damaged": list(found.damaged),
    }


def _time(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    us, provenance = entry.evaluation.us, entry.evaluation.provenance
    return provenance if us is None else f"{us:.4g} {provenance}"


def _facts(prefix: str, entry: Entry | None) -> dict[str, Any]:
    return {
        f"{prefix}config": None if entry is None else str(entry.config),
        f"{prefix}us": None if entry is None else entry.evaluation.us,
        f"{prefix}provenance": None if entry is None else entry.evaluation.provenance,
        f"{prefix}created_at": None if entry is None else entry.created_at,
    }
