"""Whatever is wrong with a store, the user gets a typed error that says what, where and what to do, and no file of
theirs is touched."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from doratune.cache import connect
from doratune.cache.errors import (
    CorruptStoreError,
    LocationError,
    MissingDriverError,
    MissingStoreError,
    NewerStoreError,
    NotAStoreError,
    ReadOnlyStoreError,
    StoreAccessError,
    StoreError,
    UnreachableStoreError,
)
from doratune.cache.location import Location
from doratune.cache.store import Store

from .world import a_binary, a_spec, an_entry

MODES = [{"create": True}, {}, {"readonly": True}]


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")  # as an Optuna study has
        connection.commit()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_bytes(b""), "empty"),
        (_bytes(b"SQLite"), "not a SQLite database"),
        (_bytes(b"my thesis\n" * 1000), "not a SQLite database"),
        (_other_database, "holds no doratune store"),
        (Path.mkdir, "folder"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_store_is_refused_and_left_as_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], object],
    complaint: str,
    mode: dict[str, bool],
) -> None:
    monkeypatch.setattr("doratune.cache.create._CLAIM_SECONDS", 0)
    path = tmp_path / "precious"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(NotAStoreError, match=complaint) as caught:
        Store.open(path, **mode)
    assert str(path) in str(caught.value)
    assert [*tmp_path.iterdir()] == [path]
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("readonly", [False, True])
def test_a_missing_store_is_named_with_the_command_that_makes_it(tmp_path: Path, readonly: bool) -> None:
    path = tmp_path / "none.sqlite"
    with pytest.raises(MissingStoreError, match=r"doratune tune --store .*none\.sqlite"):
        Store.open(path, readonly=readonly)
    assert not path.exists()


def _large_store(path: Path) -> None:
    with Store.open(path, create=True) as store:
        store.put_all(an_entry(a_spec(rank=rank)) for rank in range(1, 65))
        store.put_binary(a_binary(image=random.Random(1).randbytes(200_000)))


def test_a_truncated_store_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    _large_store(path)
    os.truncate(path, 40_000)
    with pytest.raises(CorruptStoreError, match=r"damaged.*Restore") as caught, Store.open(path) as store:
        store.binaries()
    assert str(path) in str(caught.value)


def test_a_store_overwritten_in_part_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    _large_store(path)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * 40_000)
    with pytest.raises(CorruptStoreError, match="damaged"), Store.open(path, readonly=True) as store:
        store.entries()


@pytest.mark.parametrize("mode", MODES)
def test_a_store_of_a_newer_doratune_is_refused(place: str, mode: dict[str, bool]) -> None:
    with Store.open(place, create=True) as store, store._writer.begin() as connection:
        connection.exec_driver_sql("UPDATE doratune_schema SET version_num = '0042'")
    with pytest.raises(NewerStoreError, match=r"newer doratune \(schema 0042.*upgrade doratune or use another store"):
        Store.open(place, **mode)


def test_a_place_where_nothing_can_be_made_is_named() -> None:
    with pytest.raises(StoreAccessError, match=r"/proc/doratune.*DORATUNE_HOME"):
        Store.open("/proc/doratune/store.sqlite", create=True)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StoreAccessError, match="file"):
        Store.open(tmp_path / "file" / "store.sqlite", create=True)


def test_a_file_that_may_not_be_written_is_refused_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite"
    Store.open(path, create=True).close()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ReadOnlyStoreError, match="cannot be written"):
        Store.open(path)


# Everything is imported by the first store, for the other user may not be able to read where doratune is installed.
READ_AS_ANOTHER = """
import os, sys
from doratune.cache.errors import ReadOnlyStoreError
from doratune.cache.store import Store
with Store.open(sys.argv[2], create=True) as store:
    store.export(sys.argv[2] + "-copy")
    store.entries()
os.setgid(65534)
os.setuid(65534)
with Store.open(sys.argv[1], readonly=True) as store:
    print(len(store.entries()))
try:
    Store.open(sys.argv[1])
except ReadOnlyStoreError:
    print("refused")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without rights")
def test_a_wal_store_in_a_folder_one_may_not_write_can_be_read(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="doratune-shared-"))
    try:
        with Store.open(folder / "store.sqlite", create=True) as store:
            store.put(an_entry())
        folder.chmod(0o755)
        arguments = [str(folder / "store.sqlite"), str(tmp_path / "first.sqlite")]
        reader = subprocess.run([sys.executable, "-c", READ_AS_ANOTHER, *arguments], capture_output=True, text=True)
        assert reader.stdout.split() == ["1", "refused"], reader.stderr
        assert [path.name for path in folder.iterdir()] == ["store.sqlite"]
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("sqlite_says", "kind", "remedy"),
    [
        ("attempt to write a readonly database", ReadOnlyStoreError, "--store"),
        ("unable to open database file", StoreAccessError, "folder"),
        ("disk I/O error", StoreAccessError, "check the disk"),
        ("database or disk is full", StoreAccessError, "Free space"),
        ("database is locked", StoreAccessError, "repeat later"),
        ("database disk image is malformed", CorruptStoreError, "Restore"),
        ("file is not a database", NotAStoreError, "name another"),
        ("something new", StoreError, "something new"),
    ],
)
def test_what_sqlite_says_becomes_what_to_do(sqlite_says: str, kind: type[StoreError], remedy: str) -> None:
    with pytest.raises(kind, match=remedy) as caught, connect.explained(Location.parse("/data/store.sqlite")):
        raise OperationalError("INSERT", {}, sqlite3.OperationalError(sqlite_says))
    assert type(caught.value) is kind
    assert "/data/store.sqlite" in str(caught.value)


def test_a_full_disk_drops_the_write_and_nothing_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.sqlite"
    with Store.open(path, create=True) as store:
        store.put(an_entry())
        real = sqlite3.connect

        def small(*args: object, **options: object) -> sqlite3.Connection:
            connection = real(*args, **options)  # type: ignore[call-overload]
            connection.execute("PRAGMA max_page_count = 1")  # no growth beyond what is there
            return connection  # type: ignore[no-any-return]

        monkeypatch.setattr(sqlite3, "connect", small)
        with pytest.raises(StoreAccessError, match="full"):
            store.put_binary(a_binary(image=random.Random(1).randbytes(1_000_000)))
        monkeypatch.undo()
        assert store.entries() == [an_entry()]
        assert store.verify() == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a full disk, for this process: no file grows beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kilobytes", [0, 1, 4, 20, 36, 40, 56, 76, 200])
def test_a_store_made_on_a_full_disk_is_complete_or_not_there(kilobytes: int, tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with suppress(StoreError), files_of_at_most(kilobytes * 1024):
        Store.open(path, create=True).close()
    for found in tmp_path.iterdir():
        assert found.name.startswith("store.sqlite")
    with Store.open(path, create=True) as store:
        assert store.put(an_entry())
        assert store.verify() == []


def test_a_store_on_a_full_disk_can_be_read_where_it_has_no_log(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with Store.open(path, create=True) as store:
        store.put(an_entry())
    with files_of_at_most(0), Store.open(path, readonly=True) as store:
        assert store.entries() == [an_entry()]


KILLED_WRITER = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # pages go to the file before the commit
connection.execute("BEGIN IMMEDIATE")
connection.execute("DELETE FROM doratune_entries")
connection.execute("CREATE TABLE filler (a)")
for _ in range(100):
    connection.execute("INSERT INTO filler VALUES (zeroblob(4000))")
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def with_hot_journal(tmp_path: Path) -> Path:
    """An export whose writer was killed in the middle of a transaction."""
    path = tmp_path / "exported.sqlite"
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put(an_entry())
        store.export(path)
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)], check=False)
    assert path.with_name("exported.sqlite-journal").stat().st_size > 0
    return path


def test_what_a_killed_writer_did_not_finish_is_undone_by_the_next_reader(with_hot_journal: Path) -> None:
    with Store.open(with_hot_journal, readonly=True) as store:
        assert store.entries() == [an_entry()]
        assert store.verify() == []


def test_a_reader_who_may_not_undo_it_is_told_who_can(with_hot_journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = with_hot_journal.read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(StoreAccessError, match=r"killed while it wrote.*doratune cache ls --store"):
        Store.open(with_hot_journal, readonly=True).entries()
    assert with_hot_journal.read_bytes() == before


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000, "x" * 5000])
@pytest.mark.parametrize("mode", MODES)
def test_a_path_that_is_too_long_is_named_in_few_words(name: str, mode: dict[str, bool], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="File name too long") as caught:
        Store.open(tmp_path / name / "store.sqlite", **mode)
    assert len(str(caught.value)) <= 1000


def test_what_a_killed_export_left_is_removed_by_the_next_open(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    Store.open(path, create=True).close()
    code = "from doratune.temporaries import temporary_name; print(temporary_name('exported.sqlite'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    left = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip()
    for suffix in ("", "-journal"):
        (tmp_path / f"{left}{suffix}").write_text("half")
    Store.open(path, readonly=True).close()  # a reader writes nothing
    assert (tmp_path / left).exists()
    Store.open(path).close()
    assert [found.name for found in tmp_path.iterdir()] == ["store.sqlite"]


def test_a_lock_held_too_long_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "BUSY_SECONDS", 0.1)
    path = tmp_path / "store.sqlite"
    with Store.open(path, create=True) as store, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreAccessError, match="write lock"):
            store.put(an_entry())


def test_an_export_leaves_existing_files_alone(tmp_path: Path) -> None:
    precious, earlier = tmp_path / "thesis", tmp_path / "earlier.sqlite"
    precious.write_text("precious")
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.export(earlier)
        store.put(an_entry())
        with pytest.raises(StoreAccessError, match="exists"):
            store.export(earlier)
        with pytest.raises(NotAStoreError):
            store.export(precious, replace=True)
        store.export(earlier, replace=True)
    with Store.open(earlier, readonly=True) as copy:
        assert copy.entries() == [an_entry()]
    assert precious.read_text() == "precious"


def test_an_unreachable_server_is_named_without_the_password() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    with pytest.raises(UnreachableStoreError, match=r"127\.0\.0\.1:1/db.*check that the server runs") as caught:
        Store.open("postgresql://me:s3cret@127.0.0.1:1/db", create=True)
    assert "s3cret" not in str(caught.value)


def test_a_missing_driver_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingDriverError, match=r"pip install 'doratune\[postgres\]'"):
        Store.open("postgresql://me@127.0.0.1:1/db")


def test_a_malformed_url_is_a_usage_error() -> None:
    with pytest.raises(LocationError, match="malformed"):
        Store.open("postgresql://me@host:port/db")


def test_a_postgresql_database_without_tables_says_how_to_make_them(postgresql_url: str) -> None:
    with pytest.raises(NotAStoreError, match="doratune tune --store URL"):
        Store.open(postgresql_url)
    with Store.open(postgresql_url, create=True) as store:
        assert store.entries() == []
