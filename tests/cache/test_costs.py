"""What a lookup and a listing cost, counted in calls of Python and C functions, which no other process changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sqlalchemy import Engine, event

from doratune.cache.store import Store
from doratune.codegen.spec import TOKEN_BUCKETS
from doratune.tuner.report import entries_of, entries_table

from .world import a_spec, an_entry, with_final

EXACT_CALLS = 700
"""611 were counted, which take 110 µs; through SQLAlchemy and with slower checks it were 1,040 and 230 µs."""
LISTED_CALLS = 720
"""For each entry: 684 were counted, which take 0.14 ms. Laid out by rich it were 5,980."""

SPECS = [a_spec(d_out=64 * size, tokens=tokens) for size in range(1, 11) for tokens in TOKEN_BUCKETS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    path = tmp_path_factory.mktemp("costs") / "store.sqlite"
    with Store.open(path, create=True) as made:
        made.put_all(with_final(an_entry(spec)) for spec in SPECS)
    with Store.open(path, readonly=True) as opened:
        yield opened


def calls(action: Callable[[], object]) -> int:
    """How many functions a second run of ``action`` calls."""
    action()
    count = 0

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def test_an_exact_lookup_takes_few_calls(store: Store) -> None:
    assert store.get(SPECS[7]) == with_final(an_entry(SPECS[7]))
    assert calls(lambda: store.get(SPECS[7])) <= EXACT_CALLS


def test_an_exact_lookup_costs_the_same_in_a_larger_store(store: Store, tmp_path: Path) -> None:
    with Store.open(tmp_path / "small.sqlite", create=True) as small:
        small.put(with_final(an_entry(SPECS[7])))
    with Store.open(tmp_path / "small.sqlite", readonly=True) as small:
        assert calls(lambda: small.get(SPECS[7])) == calls(lambda: store.get(SPECS[7]))


def test_a_listing_takes_few_calls_for_each_entry(store: Store) -> None:
    def listing() -> str:
        found, damaged = entries_of(store, op="lora_compose", gpu="h200")
        assert (len(found), damaged) == (len(SPECS), [])
        return "\n".join(entries_table(found).lines())

    assert all(str(spec) in listing() for spec in SPECS[:3])
    assert calls(listing) / len(SPECS) <= LISTED_CALLS


@pytest.mark.parametrize("filters", [{"op": "lora_compose"}, {"gpu": "h200"}, {"op": "lora_compose", "gpu": "h200"}])
def test_a_listing_has_no_rows_sorted(store: Store, filters: dict[str, str]) -> None:
    """A row has the source of its kernel: to sort rows takes twice as long as to read them."""
    plans: list[str] = []

    def planned(cursor: Any, statement: str, parameters: Any) -> None:
        plans.extend(step for *_, step in cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall())

    def listen(conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        if "doratune_entries" in statement:
            planned(conn.connection.dbapi_connection.cursor(), statement, parameters)

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        found, damaged = store.readable_entries(**filters)
    finally:
        event.remove(Engine, "before_cursor_execute", listen)
    assert (len(found), damaged) == (len(SPECS), [])
    assert any("doratune_entries" in step for step in plans)
    assert [step for step in plans if "TEMP B-TREE" in step] == []
