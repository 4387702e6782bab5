"""Connect to a store's database, and turn the database's errors into messages for the user.

Every operation opens its own connection (``NullPool``): a store may then be used from any thread and across a fork,
where a SQLite connection that came along would break its locks.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from .errors import (
    CorruptStoreError,
    LocationError,
    MissingDriverError,
    MissingStoreError,
    NotAStoreError,
    ReadOnlyStoreError,
    StoreAccessError,
    StoreError,
    UnreachableStoreError,
)
from .location import Location, without_password

BUSY_SECONDS = 30
CONNECT_SECONDS = 10
PACKAGED = Path(__file__).resolve().parent / "prebuilt"

_SQLITE_MAGIC = b"SQLite format 3\x00"
_WRITE = "doratune_write"


def connect(location: Location, *, readonly: bool) -> Engine:
    """Return the engine for ``location``. A SQLite file is checked; no connection is opened.

    Raises:
        StoreError: the file is missing, is not a SQLite database or cannot be accessed; the driver is not installed.
        LocationError: the URL is malformed.
    """
    if location.path is not None:
        check_file(location, location.path, readonly=readonly)
        return sqlite_engine(location.path, readonly=readonly)
    return _postgresql_engine(location, readonly=readonly)


def for_writing(engine: Engine) -> Engine:
    """Return ``engine`` with transactions that take the write lock at their start.

    A SQLite transaction that reads first and writes later fails at once if another writer came between; one that
    starts as a writer waits for the lock.
    """
    return engine.execution_options(**{_WRITE: True})


def sqlite_engine(path: Path, *, readonly: bool = False) -> Engine:
    """Return the engine for the existing SQLite file at the absolute ``path``; a missing file is never created."""
    mode = "mode=rw"
    if readonly:
        mode = "mode=ro&immutable=1" if _is_still(path) else "mode=ro"
    uri = f"{path.as_uri()}?{mode}"

    def open_connection() -> sqlite3.Connection:
        # With isolation_level None the listener below begins the transactions. Python's own do not begin before a
        # SELECT or a CREATE TABLE, so neither a read snapshot nor a migration would be one transaction.
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    engine = create_engine("sqlite://", creator=open_connection, poolclass=NullPool)
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    writing = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _is_still(path: Path) -> bool:
    """Whether the file cannot be changing: it is packaged, or its folder is read-only and it has no pending log.

    Reading a WAL file needs a writable folder for its index, unless SQLite opens the file as immutable.
    """
    if path.parent == PACKAGED:
        return True
    log = path.with_name(path.name + "-wal")
    return not os.access(path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)


def _postgresql_engine(location: Location, *, readonly: bool) -> Engine:
    assert location.url is not None
    try:
        url = make_url(location.url)
    except (ArgumentError, ValueError) as error:
        raise LocationError(f"store {location}: malformed URL ({without_password(str(error))})") from None
    try:
        return create_engine(
            url,
            poolclass=NullPool,
            connect_args={"connect_timeout": CONNECT_SECONDS},
            execution_options={"postgresql_readonly": True} if readonly else {},
        )
    except ImportError:
        raise MissingDriverError(
            f"store {location}: the PostgreSQL driver is not installed; run: pip install 'doratune[postgres]'"
        ) from None


def check_file(location: Location, path: Path, *, readonly: bool) -> None:
    """Raise the :class:`StoreError` that says why ``path`` is not a usable SQLite file; return if it is one."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise NotAStoreError(f"store {location}: this is a folder; name a file, such as {path / 'store.sqlite'}")
        if not stat.S_ISREG(mode):
            raise NotAStoreError(f"store {location}: this is not a regular file; name a file")
        with path.open("rb") as file:
            head = file.read(len(_SQLITE_MAGIC))
    except FileNotFoundError:
        raise MissingStoreError(
            f"store {location}: there is no such file; check the path, "
            f"or make the store with: doratune tune --store {location}"
        ) from None
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); check the path and its permissions"
        raise StoreAccessError(f"store {location}: {reason}") from None
    if not head:
        raise NotAStoreError(
            f"store {location}: the file is empty; delete it so that a store can be made there, or name another"
        )
    if head != _SQLITE_MAGIC:
        raise NotAStoreError(f"store {location}: the file is not a SQLite database and is left as it is; name another")
    if not readonly and not os.access(path, os.W_OK):
        raise read_only(location)


def read_only(location: Location) -> ReadOnlyStoreError:
    """The error for a file, disk or database that refuses writes."""
    return ReadOnlyStoreError(
        f"store {location}: cannot be written (read-only file, disk or database user); "
        "write to another store with --store, or change the permissions"
    )


@contextmanager
def explained(location: Location) -> Iterator[None]:
    """Raise a database error inside the block as the :class:`StoreError` that tells the user what to do."""
    try:
        yield
    except DBAPIError as error:
        raise _explain(location, error) from error


def _explain(location: Location, error: DBAPIError) -> StoreError:
    # By text: several of these causes share one SQLite error code. SQLite's texts are stable.
    text = without_password(" ".join(str(error.orig).split()))
    lower = text.lower()
    if location.path is not None:
        return _explain_sqlite(location, text, lower)
    if "read-only transaction" in lower:
        return read_only(location)
    if "permission denied for" in lower:
        return StoreAccessError(f"store {location}: {text}; ask the database's owner for the right")
    if type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout"):
        return UnreachableStoreError(
            f"store {location}: the database cannot be reached ({text}); "
            "check that the server runs, and the host, port, user and database of the URL"
        )
    return StoreError(f"store {location}: the database refused: {text}")


def _explain_sqlite(location: Location, text: str, lower: str) -> StoreError:
    if "not a database" in lower:
        return NotAStoreError(f"store {location}: the file is not a SQLite database and is left as it is; name another")
    if "malformed" in lower or "could not decode" in lower or "no such table" in lower or "no such column" in lower:
        return CorruptStoreError(
            f"store {location}: the file is damaged ({text}). Restore it from a copy; or save what is readable with "
            f"the sqlite3 command's .recover, move the file away and tune again"
        )
    if "readonly" in lower:
        return read_only(location)
    if "full" in lower:
        return StoreAccessError(
            f"store {location}: the disk is full; this write was dropped, nothing before it. Free space and repeat"
        )
    if "locked" in lower:
        return StoreAccessError(
            f"store {location}: another process held the write lock for over {BUSY_SECONDS} s; end it or repeat later"
        )
    if "unable to open" in lower:
        return StoreAccessError(
            f"store {location}: cannot be opened; check that the folder exists and can be written "
            "(SQLite keeps its log beside the file)"
        )
    if "i/o error" in lower:
        return StoreAccessError(f"store {location}: the disk failed ({text}); check the disk, then repeat")
    return StoreError(f"store {location}: SQLite refused: {text}")
