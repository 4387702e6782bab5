"""The schema made directly, the one made by the migrations and the one in the models are the same; an older store is
migrated by its next writer; and a reader of a present store pays for none of it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from doratune.cache import create, migrations, schema
from doratune.cache.errors import OlderStoreError
from doratune.cache.stack import open_stack, prebuilt_paths, user_store_path
from doratune.cache.store import Store

from .world import a_binary, a_spec, an_entry, with_final

NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "9999", "{newest}"


def upgrade() -> None:
    op.add_column("doratune_entries", sa.Column("remark", sa.Text(), nullable=True))
    {then}
"""


def _differences(connection: Connection) -> list[object]:
    options = {"version_table": schema.VERSION_TABLE, "compare_type": True}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), schema.Base.metadata))


def _shape(connection: Connection) -> dict[str, object]:
    seen = inspect(connection)
    return {
        table: (
            [(column["name"], str(column["type"]), column["nullable"]) for column in seen.get_columns(table)],
            sorted((index["name"] or "", *index["column_names"]) for index in seen.get_indexes(table)),
            sorted((unique["name"] or "", *unique["column_names"]) for unique in seen.get_unique_constraints(table)),
            seen.get_pk_constraint(table)["constrained_columns"],
        )
        for table in seen.get_table_names()
    }


def test_down_to_nothing_and_up_again_gives_the_schema_of_the_models(place: str) -> None:
    with Store.open(place, create=True) as store:
        with store._writer.begin() as connection:
            made = _shape(connection)
            assert _differences(connection) == []
            migrations.downgrade(connection, "base")
            assert [*_shape(connection)] == [schema.VERSION_TABLE]
            migrations.upgrade(connection)
        with store._writer.begin() as connection:
            assert _shape(connection) == made
            assert _differences(connection) == []
        assert store.put(an_entry())
    with Store.open(place, readonly=True) as store:
        assert store.get(a_spec()) == an_entry()


def test_the_listed_revisions_are_those_in_the_folder(place: str) -> None:
    with Store.open(place, create=True) as store, store._engine.connect() as connection:
        scripts = ScriptDirectory.from_config(migrations.configuration(connection))
    assert tuple(script.revision for script in scripts.walk_revisions())[::-1] == schema.REVISIONS


RELEASED = sorted((Path(__file__).parent / "released").glob("*.sql"))


def test_a_store_of_every_released_schema_is_kept_here() -> None:
    assert tuple(path.stem for path in RELEASED) == schema.REVISIONS[:-1]


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: str(path.stem))
def test_a_store_of_a_released_schema_keeps_all_its_rows(released: Path, tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(released.read_text(encoding="utf-8"))
    with pytest.raises(OlderStoreError, match=rf"schema {released.stem}, now.*doratune tune --store"):
        Store.open(path, readonly=True)
    entries = [an_entry(), an_entry(a_spec("h100", tokens=16, bias=True), "predicted")]
    if released.stem >= "0003":
        entries.append(with_final(an_entry(a_spec(rank=64))))
    with Store.open(path) as store:
        assert store.entries() == sorted(entries, key=lambda entry: str(entry.spec))
        assert store.binaries() == [a_binary()]
        assert store.verify() == []
        assert store.put(an_entry(a_spec(rank=8)))
    with Store.open(path, readonly=True) as store:
        assert len(store.entries()) == len(entries) + 1


def test_a_bad_row_of_an_older_store_costs_that_row(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(RELEASED[-1].read_text(encoding="utf-8"))
        connection.execute("UPDATE doratune_entries SET gpu_name = CAST(x'c328' AS TEXT) WHERE id = 1")
        connection.execute("UPDATE doratune_entries SET us = 'fast' WHERE id = 2")
        connection.commit()
    with Store.open(path) as store:
        found, damaged = store.readable_entries()
        assert (len(found), len(damaged)) == (1, 2)


def test_the_shipped_stores_are_of_the_present_schema() -> None:
    for path in prebuilt_paths():
        with Store.open(path, readonly=True) as store, store._engine.connect() as connection:
            assert create.read_revision(connection) == schema.REVISIONS[-1]
            assert store.verify() == []


def _release_next_version(monkeypatch: pytest.MonkeyPatch, folder: Path, then: str = "pass") -> None:
    (folder / "versions").mkdir()
    for released in (migrations.HERE / "versions").glob("rev_*.py"):
        (folder / "versions" / released.name).write_text(released.read_text())
    newest = schema.REVISIONS[-1]
    (folder / "versions" / "rev_9999.py").write_text(NEXT_REVISION.format(then=then, newest=newest))
    configuration = migrations.configuration
    monkeypatch.setattr(
        migrations, "configuration", lambda connection: configuration(connection, versions=folder / "versions")
    )
    monkeypatch.setattr(schema, "REVISIONS", (*schema.REVISIONS, "9999"))


def test_an_older_store_keeps_its_entries_when_its_next_writer_migrates_it(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Store.open(place, create=True) as store:
        store.put(an_entry())
    _release_next_version(monkeypatch, tmp_path)
    with pytest.raises(OlderStoreError, match=r"older doratune \(schema \d+, now 9999\).*doratune tune"):
        Store.open(place, readonly=True)
    with Store.open(place) as store:
        assert store.entries() == [an_entry()]
    with Store.open(place, readonly=True) as store, store._engine.connect() as connection:
        assert create.read_revision(connection) == "9999"
        assert "remark" in {column["name"] for column in inspect(connection).get_columns("doratune_entries")}


def test_a_store_of_the_first_schema_keeps_its_entries_and_learns_of_unfused_times(place: str) -> None:
    fused = replace(an_entry().evaluation, unfused_us=30.0)
    with Store.open(place, create=True) as store:
        store.put(an_entry())
        with store._writer.begin() as connection:
            migrations.downgrade(connection, "0001")
    with pytest.raises(OlderStoreError, match="schema 0001"):
        Store.open(place, readonly=True)
    with Store.open(place) as store:
        assert store.entries() == [an_entry()]
        assert store.put(replace(an_entry(), evaluation=fused))
    with Store.open(place, readonly=True) as store:
        assert store.entries() == [replace(an_entry(), evaluation=fused)]


def test_a_store_of_the_second_schema_keeps_its_entries_and_learns_of_finals(place: str) -> None:
    with Store.open(place, create=True) as store:
        store.put(an_entry())
        with store._writer.begin() as connection:
            migrations.downgrade(connection, "0002")
    with Store.open(place) as store:
        assert store.entries() == [an_entry()]
        assert store.put(with_final())
    with Store.open(place, readonly=True) as store:
        assert store.entries() == [with_final()]


def test_an_export_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    shipped = tmp_path / "shipped.sqlite"
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put(an_entry())
        store.export(shipped)
        with Store.open(shipped) as older, older._writer.begin() as connection:
            migrations.downgrade(connection, "0001")
        store.export(shipped, replace=True)
    with Store.open(shipped, readonly=True) as replaced:
        assert replaced.entries() == [an_entry()]


def test_a_migration_that_fails_leaves_the_older_store_as_it_was(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Store.open(place, create=True) as store:
        store.put(an_entry())
    with monkeypatch.context() as released:
        _release_next_version(released, tmp_path, then="raise RuntimeError('power cut')")
        with pytest.raises(RuntimeError, match="power cut"):
            Store.open(place)
    with Store.open(place) as store, store._engine.connect() as connection:
        assert "remark" not in {column["name"] for column in inspect(connection).get_columns("doratune_entries")}
        assert store.entries() == [an_entry()]


def test_the_users_own_store_is_migrated_when_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Store.open(user_store_path(), create=True) as store:
        store.put(an_entry())
    _release_next_version(monkeypatch, tmp_path)
    monkeypatch.setattr("doratune.cache.stack.prebuilt_paths", list)
    [own] = open_stack()
    assert own.get(a_spec()) == an_entry()


def test_the_tables_may_join_those_of_an_optuna_study(postgresql_url: str) -> None:
    with Store.open(postgresql_url, create=True) as store, store._writer.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('v3.2.0.a')"))
    with Store.open(postgresql_url) as store:
        assert store.put(an_entry())


IMPORTED = """
import sys
import doratune, doratune.cache.entry, doratune.cache.stack, doratune.cache.lookup, doratune.cache.location
print("sqlalchemy" in sys.modules, "alembic" in sys.modules)
from doratune.cache.store import Store
with Store.open(sys.argv[1], readonly=True) as store:
    print(len(store.entries()))
print("sqlalchemy" in sys.modules, "alembic" in sys.modules)
"""


def test_reading_imports_no_alembic_and_the_paths_need_no_sqlalchemy(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put(an_entry())
    reader = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(tmp_path / "store.sqlite")], capture_output=True, text=True, check=True
    )
    assert reader.stdout.splitlines() == ["False False", "1", "True False"]
