"""Making a new store, and bringing an older one to the present schema.

A SQLite file appears at its place complete or not at all: it is written beside it under another name and linked into
place. Processes that start together on a new path therefore never see a half-made store nor race to switch a file to
WAL, which fails now and then however long they wait.
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

_ADVISORY_LOCK = 0x646F7261  # "dora": any fixed number that other users of the database are unlikely to pick
_CLAIM_SECONDS = 5


def create_file(location: Location, path: Path) -> None:
    """Make a new, empty store at ``path``, unless a file appears there first.

    Raises:
        StoreAccessError: the folder cannot be made or written.
    """
    with new_file(location, path) as fresh:
        write_schema(sqlite_engine(fresh), journal="WAL")
        place(fresh, path)


@contextmanager
def new_file(location: Location, path: Path) -> Iterator[Path]:
    """Yield an empty file of ours beside ``path``, removed at the end (when not moved away).

    Raises:
        StoreAccessError: the folder cannot be made or written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Mode 666 leaves the umask to decide, as for any file: a team's store may be writable by its group.
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
    """Give ``fresh`` the name ``path`` without ever overwriting; return whether the name was free."""
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
    """Give another process that claimed ``path`` (see :func:`place`) the moment it needs to fill it."""
    deadline = time.monotonic() + _CLAIM_SECONDS
    while path.is_file() and path.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.01)


def write_schema(engine: Engine, *, journal: str = "") -> None:
    """Make the tables in a database that has none of them. Concurrent callers on PostgreSQL take turns."""
    if journal:
        with closing(engine.raw_connection()) as connection:  # a journal cannot be changed inside a transaction
            connection.cursor().execute(f"PRAGMA journal_mode = {journal}")
    with for_writing(engine).begin() as connection:
        _take_turns(connection)
        if read_revision(connection) is None:
            schema.version_table.create(connection)
            schema.Base.metadata.create_all(connection)
            connection.execute(insert(schema.version_table).values(version_num=schema.REVISIONS[-1]))


def read_revision(connection: Connection) -> str | None:
    """Return the schema revision the database says it has, None when it holds no store."""
    if not inspect(connection).has_table(schema.VERSION_TABLE):
        return None
    return connection.execute(select(schema.version_table.c.version_num)).scalar()


def settle_schema(location: Location, engine: Engine, *, create: bool, readonly: bool) -> None:
    """Check the schema of an existing database; migrate an older one, and make the tables where asked to.

    A foreign SQLite file is never written to; in a PostgreSQL database the tables may join others.

    Raises:
        NotAStoreError: no store here. NewerStoreError: an unknown schema. OlderStoreError: older, and read-only.
    """
    with engine.connect() as connection:
        revision = read_revision(connection)
    if revision is None and create and location.path is None:
        write_schema(engine)
        return
    if revision is None:
        hint = "name another" if location.path else "make the tables with: doratune tune --store URL"
        raise NotAStoreError(f"store {location}: a database, but not of doratune, and left as it is; {hint}")
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
        if read_revision(connection) != schema.REVISIONS[-1]:  # no other process migrated it meanwhile
            from .migrations import upgrade  # imports Alembic, which reading a store must not cost

            upgrade(connection)


def _take_turns(connection: Connection) -> None:
    """On PostgreSQL wait for other makers and migrators; SQLite's write lock does it by itself."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})


def compact(path: Path) -> None:
    """Make the SQLite file at ``path`` one small file that can be read in a folder that nobody may write."""
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("VACUUM")
