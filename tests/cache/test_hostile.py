"""A store may come from anybody: a bad row costs that row with its reason, what is no plain table is refused, nothing
takes long or much memory, and ``verify`` finds every changed value."""

from __future__ import annotations

import json
import resource
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from doratune.cache import connect, schema
from doratune.cache.entry import Entry
from doratune.cache.errors import CorruptStoreError, StoreAccessError, StoreError
from doratune.cache.lookup import Resolution, lookup
from doratune.cache.store import Store
from doratune.codegen.spec import Config, KernelSpec
from doratune.runtime import loader

from .mutations import spoil
from .world import DEFAULT_CONFIG, a_binary, a_spec, an_entry, with_final

GOOD, BAD = a_spec(rank=64), a_spec(rank=16)
WANTED = a_spec(rank=32)
DEEP = "[" * 900 + "]" * 900
CONFIG = '{"variant": "tile", "num_warps": 4, "num_stages": 3, %s}'
FINAL = (
    '{"contenders": [{"config": %s, "origins": ["search"], "samples_us": [%s]}], "confidence": 1, "noise": 0, '
    '"settled": true, "notices": ["%s"]}'
)

HOSTILE_VALUES: list[tuple[str, object]] = [
    ("spec", "lora_compose/d_out=" + "9" * 5000 + "/rank=16@h200"),
    ("spec", "[/b]"),
    ("config", CONFIG % f'"block_n": {2**62}'),
    ("config", CONFIG % f'"block_n": {10**4000}'),
    ("config", CONFIG % '"[/b]": 1'),
    ("config", CONFIG % '"cls": 1'),
    ("config", (CONFIG % '"block_n": 128, "block_t": 64').replace("4", "4.0", 1)),
    ("config", '{"variant": ["tile"], "num_warps": 4, "num_stages": 3}'),
    ("config", '{"variant": "\\ud800", "num_warps": 4, "num_stages": 3}'),
    ("config", DEEP),
    ("config", b"\xff\xfe"),
    ("samples_us", "[" + "1" * 4000 + "]"),
    ("samples_us", "[1e999]"),
    ("samples_us", "[NaN]"),
    ("samples_us", DEEP),
    ("final", FINAL % (DEEP, "1.0", "")),
    ("final", FINAL % (CONFIG % '"block_n": 64', "0.0", "")),
    ("final", FINAL % (CONFIG % '"block_n": 64', "7" * 4200, "")),
    ("final", FINAL % (CONFIG % '"block_n": 64', "1.0", "\\ud800")),
    ("final", FINAL % (CONFIG % '"block_n": 64', "1.0", "\\u001b[2J")),
    ("gpu_name", "NVIDIA H200\nstep      exact: forged"),
    ("driver", "\x1b]0;owned\x07"),
    ("torch", "\u202e0.31.2"),
    ("tuned_gpu", "[bold]"),
    ("created_at", "yesterday"),
    ("provenance", "best"),
    ("us", 1e-9),
    ("us", -1.0),
    ("us", float("inf")),
    ("us", 0.5),  # its floor is 16
    ("floor_us", 5e-324),
    ("error", 1e300),
    ("trials", 2**63 - 1),
    ("registers", -1),
    ("d_out", -4096),
    ("d_out", 2**62),
    ("lookup_regret", -2.0),
    ("source", "x" * 3_000_000),
    ("source", b"\x00" * 100),
    ("template_digest", ""),
    ("bias", 7),
    ("digest", "0" * 64),
]


def _store(path: Path) -> Store:
    store = Store.open(path, create=True)
    store.put_all(with_final(an_entry(spec)) for spec in (GOOD, BAD))
    store.put_binary(a_binary())
    return store


def _spoil(path: Path, column: str, value: object, *, raw: bool = False) -> None:
    spoil(path, "doratune_entries", 2, column, value, raw=raw)


def _lookup(spec: KernelSpec, store: Store) -> Resolution:
    def carry(config: Config, source: KernelSpec) -> tuple[Config, ...]:
        return (config,)

    return lookup(
        spec,
        [store],
        defaults=[DEFAULT_CONFIG],
        architecture="sm_90",
        accepts=lambda spec, config: None,
        template_digest=lambda op, variant: "template-1",
        carry=carry,
    )


def _costs_only_itself(path: Path) -> None:
    """Every step goes on without the row of BAD, and says why."""
    with Store.open(path, readonly=True) as store:
        entries, damaged = store.readable_entries()
        assert [entry.spec for entry in entries] == [GOOD]
        assert len(damaged) == 1
        assert len(str(damaged[0])) <= 1000
        assert str(damaged[0]).isprintable()
        assert any("doratune_entries" in problem or "entry 2" in problem for problem in store.verify())
        assert store.get(GOOD) is not None
        exact = _lookup(BAD, store)
        assert exact.entry is None or exact.entry.spec == GOOD
        near = _lookup(WANTED, store)
        assert near.entry is not None
        assert near.entry.spec == GOOD
        assert near.explain().replace("\n", "").isprintable()
    with Store.open(path) as store:
        store.prune_binaries()
        assert store.put(an_entry(GOOD))


@pytest.mark.parametrize(("column", "value"), HOSTILE_VALUES)
def test_a_bad_value_costs_its_row(tmp_path: Path, column: str, value: object) -> None:
    path = tmp_path / "store.sqlite"
    _store(path).close()
    _spoil(path, column, value)
    _costs_only_itself(path)


@pytest.mark.parametrize("column", ["spec", "config", "source", "gpu_name", "final", "template_digest"])
def test_text_that_is_not_utf_8_costs_its_row(tmp_path: Path, column: str) -> None:
    path = tmp_path / "store.sqlite"
    _store(path).close()
    _spoil(path, column, b"\xc3\x28\xed\xa0\x80", raw=True)
    _costs_only_itself(path)


def test_a_row_of_a_hundred_megabytes_costs_its_row_and_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    _store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE doratune_entries SET source = zeroblob(100000000) WHERE id = 2")
        connection.commit()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _costs_only_itself(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_a_lookup_that_meets_a_damaged_row_warns_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    _store(path).close()
    _spoil(path, "us", -1.0)
    with Store.open(path, readonly=True) as store:
        resolution = _lookup(BAD, store)
    assert len(resolution.damaged) == 1
    assert "us must be a finite number" in resolution.explain()
    assert ("exact", 1) in resolution.refused


def test_load_kernel_warns_of_damaged_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    resolution = Resolution(BAD, "default", DEFAULT_CONFIG, None, None, None, (), (), (), damaged=("row 2 is damaged",))

    class NoBinaries:
        def warn(self) -> None: ...

    monkeypatch.setattr(loader, "resolve_binaries", lambda spec, store: (resolution, None, NoBinaries()))
    monkeypatch.setattr(loader, "Kernel", lambda *parts: parts)
    with pytest.warns(RuntimeWarning, match="row 2 is damaged"):
        loader._load(BAD, torch.device("cuda", 0), None)


def test_a_damaged_row_is_replaced_whatever_its_provenance(place: str) -> None:
    with Store.open(place, create=True) as store:
        store.put(an_entry())
        with store._writer.begin() as connection:
            connection.execute(text("UPDATE doratune_entries SET us = 17.5"))
        assert store.readable(a_spec()) is None
        assert store.put(an_entry(provenance="predicted"))
        assert store.entries() == [an_entry(provenance="predicted")]


def test_a_value_of_a_subclass_is_sealed_as_what_comes_back(place: str) -> None:
    """As PyTorch's version is one of str, and NumPy's numbers of float."""

    class Version(str): ...

    class Time(float): ...

    entry = an_entry()
    special = replace(
        entry,
        environment=replace(entry.environment, torch=Version("2.13.0")),
        evaluation=replace(entry.evaluation, us=Time(20.0)),
    )
    with Store.open(place, create=True) as store:
        store.put(special)
        assert store.verify() == []
        assert store.get(entry.spec) == entry


def _other_value(column: Any) -> str:
    kind = str(column.type)
    if kind in ("TEXT",):
        return f"{column.name} || 'x'" if not column.nullable else "'{}'"
    if kind == "BOOLEAN":
        return f"NOT {column.name}"
    return f"COALESCE({column.name}, 0) + 1"


SEALED = [column for column in schema.EntryRow.__table__.columns if column.name != "id"]


@pytest.mark.parametrize("column", SEALED, ids=lambda column: str(column.name))
def test_verify_finds_every_changed_value(place: str, column: Any) -> None:
    with Store.open(place, create=True) as store:
        store.put_all([with_final(), an_entry(GOOD)])
        assert store.verify() == []
        with store._writer.begin() as connection:
            statement = f"UPDATE doratune_entries SET {column.name} = {_other_value(column)} WHERE id = 1"
            connection.execute(text(statement))
        [problem] = store.verify()
        assert "entry 1" in problem
        assert store.readable_entries()[0] == [an_entry(GOOD)]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"


def _view(table: str, columns: str) -> Callable[[sqlite3.Connection], object]:
    def make(connection: sqlite3.Connection) -> None:
        connection.execute(f"ALTER TABLE {table} RENAME TO other")
        connection.execute(f"CREATE VIEW {table} AS {ENDLESS} {columns} FROM n")

    return make


def _statements(*statements: str) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: [connection.execute(statement) for statement in statements]


def _rewritten(old: str, new: str) -> Callable[[sqlite3.Connection], object]:
    return _statements(
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_master SET sql = replace(sql, '{old}', '{new}') WHERE name = 'doratune_entries'",
    )


@pytest.mark.parametrize(
    "spoil",
    [
        _view("doratune_schema", "'0006' AS version_num"),
        _view("doratune_entries", ", ".join(f"i AS {column.name}" for column in schema.EntryRow.__table__.columns)),
        _statements("ALTER TABLE doratune_entries RENAME TO o", "CREATE VIEW Doratune_Entries AS SELECT * FROM o"),
        _statements("CREATE TRIGGER t AFTER INSERT ON doratune_binaries BEGIN DELETE FROM doratune_entries; END"),
        _statements(
            "ALTER TABLE doratune_entries DROP COLUMN driver",
            "ALTER TABLE doratune_entries ADD COLUMN driver TEXT AS (hex(zeroblob(100000000))) VIRTUAL",
        ),
        _statements(
            "ALTER TABLE doratune_entries ADD COLUMN more TEXT AS (hex(zeroblob(100000000))) VIRTUAL",
        ),
        _statements("DROP TABLE doratune_binaries", "CREATE VIRTUAL TABLE doratune_binaries USING fts5(image)"),
        _statements("CREATE INDEX i ON doratune_entries (hex(spec))"),
        _statements("ALTER TABLE doratune_entries RENAME COLUMN us TO ns"),
        _statements("DELETE FROM doratune_schema"),
        _rewritten("CONSTRAINT pk", "CHECK (length(spec) > 0), CONSTRAINT pk"),
        _rewritten("spec TEXT", "spec TEXT COLLATE NOCASE"),
        _rewritten("spec TEXT NOT NULL", "spec TEXT NOT NULL DEFAULT (hex(1))"),
    ],
)
@pytest.mark.parametrize("readonly", [False, True])
def test_what_is_no_plain_table_is_refused_at_once(
    tmp_path: Path, spoil: Callable[[sqlite3.Connection], object], readonly: bool
) -> None:
    path = tmp_path / "store.sqlite"
    _store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        spoil(connection)
        connection.commit()
    start = time.monotonic()
    with pytest.raises(CorruptStoreError, match=r"its tables are not those of a doratune store|damaged") as caught:
        Store.open(path, readonly=readonly)
    assert time.monotonic() - start < 5.0
    assert len(str(caught.value)) <= 1000


def test_a_query_without_an_end_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "OPERATION_SECONDS", 0.2)
    with (
        _store(tmp_path / "store.sqlite") as store,
        pytest.raises(StoreAccessError, match="gave no answer within"),
        connect.explained(store._where),
        store._reading() as connection,
    ):
        connection.exec_driver_sql(f"SELECT count(*) FROM ({ENDLESS} i FROM n)").all()


def test_a_damaged_schema_text_is_called_damaged(tmp_path: Path) -> None:
    """SQLite quotes the text in its message, which need not be UTF-8."""
    path, copy = tmp_path / "store.sqlite", tmp_path / "copy.sqlite"
    with _store(tmp_path / "made.sqlite") as store:
        store.export(path)
    content = path.read_bytes()
    for old, new in (
        (b"CREATE TABLE doratune_e", b"CREATE TABLE\xff\xfe\xfdratune_e"),
        (b"spec TEXT", b"sp\xc3( TEXT"),
    ):
        copy.write_bytes(content.replace(old, new[: len(old)].ljust(len(old)), 1))
        for readonly in (False, True):
            with pytest.raises(StoreError, match=r"damaged|not those of a doratune store") as caught:
                Store.open(copy, readonly=readonly)
            assert str(caught.value).isprintable()


def test_the_exact_lookup_and_a_listing_by_gpu_use_an_index(tmp_path: Path) -> None:
    with _store(tmp_path / "store.sqlite") as store, closing(sqlite3.connect(tmp_path / "store.sqlite")) as connection:
        for where, index in (
            ("spec = 'a'", "sqlite_autoindex_doratune_entries_1"),
            ("op = 'a' AND gpu = 'b'", "ix_doratune_entries_op_gpu"),
            ("op = 'a' AND (gpu = 'b' OR architecture = 'c')", "ix_doratune_entries_op"),
        ):
            plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM doratune_entries WHERE {where}").fetchall()
            assert index in str(plan)
    assert isinstance(store.readable(GOOD), Entry | None)


def test_nothing_of_a_hostile_store_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    _store(path).close()
    shutil.copy(path, tmp_path / "copy.sqlite")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        store = Store.open(tmp_path / "copy.sqlite", readonly=True)
        store.get(GOOD)
        store.close()
        assert not store._kept


def test_a_config_that_only_equals_a_good_one_is_none(tmp_path: Path) -> None:
    """1, 1.0 and true are equal in Python."""
    _store(tmp_path / "store.sqlite").close()
    for value in ("1.0", "true"):
        with Store.open(tmp_path / "store.sqlite", create=True) as store:
            store.put_all([an_entry(GOOD, warps=1), an_entry(BAD, warps=1)])
        text = json.dumps(an_entry(BAD, warps=1).config.to_dict(), sort_keys=True)  # as it is stored
        _spoil(tmp_path / "store.sqlite", "config", text.replace('"num_warps": 1', f'"num_warps": {value}'))
        with Store.open(tmp_path / "store.sqlite", readonly=True) as store:
            entries, damaged = store.readable_entries()
            assert [entry.spec for entry in entries] == [GOOD]
            assert "num_warps must be an integer" in str(damaged[0])
