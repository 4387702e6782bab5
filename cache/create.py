"""Create a store, and migrate an older one to the current schema.

A SQLite file appears complete or not at all: it is written under another name in the same folder and linked into place.
Processes that start together on a new path therefore never see an incomplete store, and never race to switch a file to
WAL, which sometimes fails however long they wait.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, insert, inspect, select, text, type_coerce
from sqlalchemy.types import NULLTYPE

from ..printable import shortened
from ..temporaries import forget, remove_at_end, remove_orphans, temporary_name
from . import schema, shape
from .connect import BUSY_SECONDS, explained, for_long, for_writing, sqlite_engine
from .errors import CorruptStoreError, NewerStoreError, NotAStoreError, OlderStoreError, StoreAccessError
from .location import Location

_ADVISORY_LOCK = 0x646F7261  # "dora": a fixed number that other users of the database are unlikely to choose
_CLAIM_SECONDS = 5


def create_missing(location: Location, path: Path) -> None:
    """Create an empty store at ``path``, unless there is a file already or another process creates one first.

    Raises:
        StoreAccessError: the folder cannot be made or written, or its disk is full.
    """
    try:
        there = path.exists()
    except OSError as error:
        raise _cannot_be_made(location, path, error) from None
    if not there:
        with new_file(location, path) as fresh:
            write_schema(sqlite_engine(fresh))
            keep_log(fresh)
            place(fresh, path)
    wait_for_claim(path)


@contextmanager
def new_file(location: Location, path: Path) -> Iterator[Path]:
    """Yield a new empty file in the folder of ``path``, and delete it at the end unless it was moved.

    Raises:
        StoreAccessError: the folder cannot be made or written.
    """
    fresh = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(path.parent)
        remove_at_end(fresh)
        # With mode 666 the umask decides, as for any file: a team's store may be writable by its group.
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    except OSError as error:
        raise _cannot_be_made(location, path, error) from None
    try:
        with explained(location):
            yield fresh
    except sqlite3.OperationalError as error:
        raise StoreAccessError(
            f"store {location}: cannot be made ({error}); free space on the disk and repeat"
        ) from None
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); check the disk and the folder's permissions"
        raise StoreAccessError(f"store {location}: {reason}") from error
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
        forget(fresh)


def _cannot_be_made(location: Location, path: Path, error: OSError) -> StoreAccessError:
    return StoreAccessError(
        f"store {location}: cannot be made in {path.parent} ({error.strerror}); "
        "name a folder that you can write, or set DORATUNE_HOME"
    )


def keep_log(fresh: Path) -> None:
    """Switch a complete SQLite file that nobody else has open to WAL mode.

    A file that is in WAL mode while its tables are made has them in its log, which moves into the file when the last
    connection closes: where the disk is full it stays behind, without an error.

    Raises:
        sqlite3.OperationalError: the disk is full or fails.
    """
    with closing(sqlite3.connect(fresh, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


def place(fresh: Path, path: Path) -> bool:
    """Rename ``fresh`` to ``path`` without overwriting; return whether the name was free."""
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: claim the name with an empty file, then replace the claim.
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(fresh, path)
    return True


def wait_for_claim(path: Path) -> None:
    """Wait while another process that claimed ``path`` (see :func:`place`) fills it."""
    deadline = time.monotonic() + _CLAIM_SECONDS
    while path.is_file() and path.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.01)


def write_schema(engine: Engine) -> None:
    """Create the tables in a database that has none of them. Concurrent callers on PostgreSQL run one at a time."""
    with for_writing(engine).begin() as connection:
        _take_turns(connection)
        if read_revision(connection) is None:
            schema.version_table.create(connection)
            schema.Base.metadata.create_all(connection)
            connection.execute(insert(schema.version_table).values(version_num=schema.REVISIONS[-1]))


def read_revision(connection: Connection) -> str | None:
    """Return the database's schema revision, or None when it holds no store."""
    if not inspect(connection).has_table(schema.VERSION_TABLE):
        return None
    return connection.execute(select(schema.version_table.c.version_num)).scalar()


def settle_schema(location: Location, engine: Engine, *, create: bool, readonly: bool) -> None:
    """Check the schema of an existing database; migrate an older one; with ``create``, create missing tables.

    Tables are created in a PostgreSQL database beside other tables, but never in a SQLite file of another application.

    Raises:
        NotAStoreError: there is no store. NewerStoreError: the schema is unknown. OlderStoreError: it is older and the
            store is read-only. CorruptStoreError: its tables are not those of its revision.
    """
    if location.path is not None and not readonly:
        remove_orphans(location.path.parent)
    with engine.connect() as connection:
        revision = _judged_revision(location, connection)
    if revision is None and create and location.path is None:
        write_schema(engine)
        return
    if revision is None:
        hint = "name another" if location.path else "make the tables with: doratune tune --store URL"
        raise NotAStoreError(f"store {location}: this database holds no doratune store and is left as it is; {hint}")
    if revision == schema.REVISIONS[-1]:
        return
    if revision not in schema.REVISIONS:
        raise NewerStoreError(
            f"store {location}: written by a newer doratune (schema {shortened(revision, 40)}; this one knows up to "
            f"{schema.REVISIONS[-1]}); upgrade doratune or use another store"
        )
    if readonly:
        raise OlderStoreError(
            f"store {location}: written by an older doratune (schema {revision}, now {schema.REVISIONS[-1]}); "
            "any command that writes to it migrates it, such as: doratune tune --store LOCATION"
        )
    with for_long(for_writing(engine)).begin() as connection:
        _take_turns(connection)
        if read_revision(connection) != schema.REVISIONS[-1]:  # another process may have migrated it
            from .migrations import upgrade  # here, so that reading a store does not import Alembic

            upgrade(connection)


def _judged_revision(location: Location, connection: Connection) -> str | None:
    """The revision of a database whose tables are those that this revision has; None when it holds no store."""
    if location.path is None:
        fault = shape.server_fault(connection)
        if fault is not None:
            raise _strange(location, fault)
        return read_revision(connection)
    items = shape.read_items(connection)
    if not shape.has_store(items):
        return None
    fault = shape.version_fault(items)
    revision: Any = None
    if fault is None:
        found = connection.execute(select(type_coerce(schema.version_table.c.version_num, NULLTYPE)).limit(2)).all()
        revision = found[0][0] if len(found) == 1 else None
        if not isinstance(revision, str) or not revision.isalnum():
            fault = f"{schema.VERSION_TABLE} must hold one revision"
    if fault is None and revision in schema.REVISIONS:
        fault = next(shape.faults(items, revision), None)
    if fault is not None:
        raise _strange(location, fault)
    return str(revision)


def _strange(location: Location, fault: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"store {location}: its tables are not those of a doratune store: {fault}. Restore it from a copy, or move it "
        "away and tune again"
    )


def _take_turns(connection: Connection) -> None:
    """Wait until no other process creates or migrates on PostgreSQL; SQLite's write lock does that already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})


def compact(path: Path) -> None:
    """Compact the SQLite file at ``path`` into one file that can be read in a read-only folder."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
