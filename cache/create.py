"""Create a store, and migrate an older one to the current schema.

A SQLite file appears complete or not at all: it is written under another name in the same folder and linked into place.
Processes that start together on a new path therefore never see an incomplete store, and never race to switch a file to
WAL, which sometimes fails however long they wait.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, inspect, select, text

from . import schema
from .connect import BUSY_SECONDS, explained, for_writing, sqlite_engine
from .errors import NewerStoreError, NotAStoreError, OlderStoreError, StoreAccessError
from .location import Location

_ADVISORY_LOCK = 0x646F7261  # "dora": a fixed number that other users of the database are unlikely to choose
_CLAIM_SECONDS = 5


def create_file(location: Location, path: Path) -> None:
    """Create an empty store at ``path``, unless another process creates one first.

    Raises:
        StoreAccessError: the folder cannot be made or written.
    """
    with new_file(location, path) as fresh:
        write_schema(sqlite_engine(fresh), journal="WAL")
        place(fresh, path)


@contextmanager
def new_file(location: Location, path: Path) -> Iterator[Path]:
    """Yield a new empty file in the folder of ``path``, and delete it at the end unless it was moved.

    Raises:
        StoreAccessError: the folder cannot be made or written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # With mode 666 the umask decides, as for any file: a team's store may be writable by its group.
        os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    except OSError as error:
        raise StoreAccessError(
            f"store {location}: cannot be made in {path.parent} ({error.strerror}); "
            "name a folder that you can write, or set DORATUNE_HOME"
        ) from None
    try:
        with explained(location):
            yield fresh
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); check the disk and the folder's permissions"
        raise StoreAccessError(f"store {location}: {reason}") from error
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)


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


def write_schema(engine: Engine, *, journal: str = "") -> None:
    """Create the tables in a database that has none of them. Concurrent callers on PostgreSQL run one at a time."""
    if journal:
        with closing(engine.raw_connection()) as connection:  # the journal mode cannot be changed inside a transaction
            connection.cursor().execute(f"PRAGMA journal_mode = {journal}")
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
            store is read-only.
    """
    with engine.connect() as connection:
        revision = read_revision(connection)
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
            f"store {location}: written by a newer doratune (schema {revision}; this one knows up to "
            f"{schema.REVISIONS[-1]}); upgrade doratune or use another store"
        )
    if readonly:
        raise OlderStoreError(
            f"store {location}: written by an older doratune (schema {revision}, now {schema.REVISIONS[-1]}); "
            "any command that writes to it migrates it, such as: doratune tune --store LOCATION"
        )
    with for_writing(engine).begin() as connection:
        _take_turns(connection)
        if read_revision(connection) != schema.REVISIONS[-1]:  # another process may have migrated it
            from .migrations import upgrade  # here, so that reading a store does not import Alembic

            upgrade(connection)


def _take_turns(connection: Connection) -> None:
    """Wait until no other process creates or migrates on PostgreSQL; SQLite's write lock does that already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})


def compact(path: Path) -> None:
    """Compact the SQLite file at ``path`` into one file that can be read in a read-only folder."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
