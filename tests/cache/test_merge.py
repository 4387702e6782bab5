"""A merge takes over what is better and nothing else, its plan says what and why before anything is written, and a
damaged row costs that row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from doratune.cache.entry import DEFAULT, MEASURED, PREDICTED, Entry
from doratune.cache.errors import MergeConflictError
from doratune.cache.merge import ADD, FASTER, KEEP, NEWER, REFUSE, REPLACE, Plan, carry_out, plan
from doratune.cache.store import Store

from .world import a_binary, a_spec, an_entry

SPEC = a_spec()
LATER = "2026-11-25T10:00:00+00:00"


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Store, Store, Store]]:
    made = [Store.open(tmp_path / f"{name}.sqlite", create=True) for name in ("target", "one", "two")]
    yield made[0], made[1], made[2]
    for store in made:
        store.close()


def planned(target: Store | None, *sources: Store, prefer: str = FASTER) -> Plan:
    return plan(sources, target, prefer=prefer)


def only(found: Plan) -> tuple[str, str]:
    (change,) = found.changes
    return change.action, change.why


def test_what_the_target_lacks_is_added_and_what_it_has_is_left(stores: tuple[Store, Store, Store]) -> None:
    target, one, two = stores
    for store in (target, one):
        store.put(an_entry())
    one.put(an_entry(a_spec(tokens=1)))
    two.put(an_entry(a_spec(tokens=16)))
    found = planned(target, one, two)
    assert [(change.spec.tokens, change.action) for change in found.changes] == [(1, ADD), (16, ADD)]
    assert found.equal == 1
    assert [entry.spec.tokens for entry in target.entries()] == [4096], "a plan writes nothing"
    assert carry_out(found, target) == 2
    assert {entry.spec.tokens for entry in target.entries()} == {1, 16, 4096}
    assert not planned(target, one, two).changes, "a second merge has nothing to do"


@pytest.mark.parametrize(
    ("known", "offered", "prefer", "action", "why"),
    [
        (an_entry(us=20.0), an_entry(us=19.0, warps=8), FASTER, REPLACE, "19 us is faster than 20 us"),
        (an_entry(us=19.0), an_entry(us=20.0, warps=8), FASTER, KEEP, "19 us is faster than 20 us"),
        (an_entry(us=20.0), an_entry(us=19.9, warps=8), FASTER, KEEP, "a tie: 19.9 and 20 us"),
        (an_entry(us=19.0), replace(an_entry(us=20.0), created_at=LATER), NEWER, REPLACE, f"of {LATER}, the newer one"),
        (replace(an_entry(us=20.0), created_at=LATER), an_entry(us=19.0), NEWER, KEEP, f"of {LATER}, the newer one"),
        (an_entry(provenance=PREDICTED), an_entry(us=90.0), NEWER, REPLACE, "measured goes before predicted"),
        (an_entry(us=90.0), an_entry(provenance=PREDICTED, us=16.0), FASTER, KEEP, "measured goes before predicted"),
        (
            an_entry(provenance=DEFAULT, us=None),
            an_entry(provenance=PREDICTED),
            REFUSE,
            REPLACE,
            "predicted goes before",
        ),
        (
            an_entry(us=10.0),
            replace(an_entry(us=20.0, template="template-2"), created_at=LATER),
            FASTER,
            REPLACE,
            "templates differ",
        ),
    ],
)
def test_provenance_decides_first_and_then_the_preference(
    known: Entry, offered: Entry, prefer: str, action: str, why: str, stores: tuple[Store, Store, Store]
) -> None:
    target, one, _ = stores
    target.put(known)
    one.put(offered)
    found = planned(target, one, prefer=prefer)
    assert only(found)[0] == action
    assert why in only(found)[1]
    carry_out(found, target)
    assert target.get(SPEC) == (offered if action == REPLACE else known)


def test_the_best_of_several_sources_is_taken_whatever_their_order(stores: tuple[Store, Store, Store]) -> None:
    target, one, two = stores
    one.put(an_entry(us=21.0, warps=2))
    two.put(an_entry(us=18.0, warps=8))
    for sources in ((one, two), (two, one)):
        (change,) = planned(target, *sources).changes
        assert (change.entry.evaluation.us, change.action, change.source) == (18.0, ADD, two.location)


def test_refuse_merges_nothing_where_entries_differ_and_names_them(stores: tuple[Store, Store, Store]) -> None:
    target, one, _ = stores
    target.put(an_entry())
    one.put(an_entry(us=18.0, warps=8))
    one.put(an_entry(a_spec(tokens=1)))
    with pytest.raises(MergeConflictError, match=r"1 specs have entries that differ.*tokens=4096"):
        planned(target, one, prefer=REFUSE)
    assert not planned(one, one, prefer=REFUSE).changes, "equal ones are no conflict"


def test_a_damaged_row_is_skipped_and_listed(stores: tuple[Store, Store, Store]) -> None:
    target, one, _ = stores
    one.put(an_entry())
    one.put(an_entry(a_spec(tokens=1)))
    with one._engine.begin() as connection:
        connection.execute(text("UPDATE doratune_entries SET config = '{' WHERE tokens = 1"))
    found = planned(target, one)
    assert [change.spec.tokens for change in found.changes] == [4096]
    assert len(found.skipped) == 1
    assert "tokens=1/" in found.skipped[0]


def test_binaries_come_with_their_entries_and_only_from_sources_that_may_supply_them(
    stores: tuple[Store, Store, Store],
) -> None:
    target, one, two = stores
    entry = an_entry()
    for store in (one, two):
        store.put(entry)
        store.put_binary(a_binary(entry.code_digest, b"\x7fELF" + store.location.encode()))
        store.put_binary(a_binary("of no entry"))
    refused = plan([one], target, refusal=lambda store: "anybody can write it")
    assert refused.binaries == ()
    assert refused.skipped == (f"{one.location}: its 1 binaries are not taken: anybody can write it",)
    signed = plan([one], target, refusal=lambda store: "anybody can write it", signed=lambda store, found: [True])
    assert len(signed.binaries) == 1
    found = plan([one, two], target)
    assert [binary.image for binary in found.binaries] == [b"\x7fELF" + one.location.encode()], "the first one's"
    carry_out(found, target)
    assert len(target.binaries()) == 1
    assert not plan([two], target).binaries, "the target's own stay"


def test_without_a_target_everything_is_new(stores: tuple[Store, Store, Store]) -> None:
    _, one, _ = stores
    one.put(an_entry())
    assert only(planned(None, one)) == (ADD, "the store has no entry of it")
    assert planned(None, one).taken[0].evaluation.provenance == MEASURED
