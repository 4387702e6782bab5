"""Connect to a store's database, and turn the database's errors into messages for the user.

Every operation opens its own connection (``NullPool``): a store may then be used from any thread and across a fork,
where a SQLite connection that came along would break its locks.

A file may come from anybody, and a server may stop answering: values are read up to :data:`MOST_BYTES`, functions in a
schema are not run (``trusted_schema``), and every statement has a time limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from ..printable import shortened
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
from .location import Location, passwords_of, without_password
from .recover import HOT_JOURNAL, connect_for_reading, has_log

BUSY_SECONDS = 30
"""How long a lock of another process is waited for."""
CONNECT_SECONDS = 10
"""How long a database server is waited for."""
OPERATION_SECONDS = 60
"""How long a statement may take. A damaged tree of pages may have no end, and a server may never answer."""
LONG_SECONDS = 1800
"""The same for statements that read all of a store: :func:`for_long`."""
MOST_BYTES = 1 << 24
"""Bytes of a value or a row at most. The largest real ones are binaries of 150 kB; to read 900 MB takes 4 GB."""
PACKAGED = Path(__file__).resolve().parent / "prebuilt"

_SQLITE_MAGIC = b"SQLite format 3\x00"
_WRITE = "doratune_write"
_SECONDS = "doratune_seconds"
_HANDLER_STEPS = 20_000
"""Steps of SQLite's machine between two looks at the clock, about 1 ms."""
_LEAST_BYTES = 2**18


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


def for_long(engine: Engine) -> Engine:
    """Return ``engine`` for an operation that reads a whole store."""
    return engine.execution_options(**{_SECONDS: LONG_SECONDS})


class _Connection(sqlite3.Connection):
    """A connection whose statements are interrupted after ``deadline[0]``, a time of ``time.monotonic()``."""

    deadline: list[float]


def sqlite_engine(path: Path, *, readonly: bool = False) -> Engine:
    """Return the engine for the existing SQLite file at the absolute ``path``; a missing file is never created."""
    uri = path.as_uri()

    def connect_with(mode: str) -> sqlite3.Connection:
        # With isolation_level None the listener below begins the transactions. Python's own do not begin before a
        # SELECT or a CREATE TABLE, so neither a read snapshot nor a migration would be one transaction.
        connection = sqlite3.connect(
            f"{uri}?{mode}",
            uri=True,
            timeout=BUSY_SECONDS,
            check_same_thread=False,
            isolation_level=None,
            factory=_Connection,
        )
        deadline = connection.deadline = [time.monotonic() + OPERATION_SECONDS]
        connection.set_progress_handler(lambda: time.monotonic() > deadline[0], _HANDLER_STEPS)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        try:
            for pragma in ("foreign_keys = ON", "trusted_schema = OFF", "cell_size_check = ON"):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection

    def open_connection() -> sqlite3.Connection:
        if not readonly:
            return connect_with("mode=rw")
        if _is_still(path):
            return connect_with("mode=ro&immutable=1")
        return connect_for_reading(path, connect_with)

    engine = create_engine("sqlite://", creator=open_connection, poolclass=NullPool)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "before_cursor_execute", _limit_statement)
    return engine


def _begin(connection: Connection) -> None:
    writing = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _limit_statement(connection: Connection, *_: object) -> None:
    """Give a statement its time; a transaction may have any number of them."""
    seconds = connection.get_execution_options().get(_SECONDS, OPERATION_SECONDS)
    opened: Any = connection.connection.dbapi_connection
    if isinstance(opened, _Connection):
        opened.deadline[0] = time.monotonic() + seconds
    elif isinstance(watch := _watches.get(id(opened)), _Watch):
        watch.start(seconds + BUSY_SECONDS)  # the server's own limits come first: they say more


def first_row(connection: Connection, statement: str, parameter: str) -> tuple[Any, ...] | None:
    """The first row of a SQLite file that ``statement``, with one ``?``, gives; None if there is none.

    The driver is asked directly: SQLAlchemy takes longer to execute a statement than SQLite to find a row.

    Raises:
        DBAPIError, UnicodeError: as an execution of ``connection``.
    """
    opened: Any = connection.connection.dbapi_connection
    opened.deadline[0] = time.monotonic() + OPERATION_SECONDS
    try:
        found: tuple[Any, ...] | None = opened.execute(statement, (parameter,)).fetchone()
    except sqlite3.Error as error:
        raise DBAPIError.instance(statement, (parameter,), error, sqlite3.Error) from error
    return found


def _is_still(path: Path) -> bool:
    """Whether the file cannot be changing: it is packaged, or its folder is read-only and it has no log or journal.

    Reading a WAL file needs a writable folder for its index, unless SQLite opens the file as immutable.
    """
    if path.parent == PACKAGED:
        return True
    return not os.access(path.parent, os.W_OK) and not has_log(path, "-wal") and not has_log(path, "-journal")


def _postgresql_engine(location: Location, *, readonly: bool) -> Engine:
    assert location.url is not None
    try:
        url = make_url(location.url)
    except (ArgumentError, ValueError):  # whose text may quote a part of the password
        raise LocationError(
            f"store {location}: malformed URL; use postgresql://user@host:5432/database, with a number as the port"
        ) from None
    try:
        engine = create_engine(
            url,
            poolclass=NullPool,
            connect_args={"connect_timeout": CONNECT_SECONDS},
            execution_options={"postgresql_readonly": True} if readonly else {},
        )
    except ImportError:
        raise MissingDriverError(
            f"store {location}: the PostgreSQL driver is not installed; run: pip install 'doratune[postgres]'"
        ) from None
    event.listen(engine, "connect", _limit_server)
    event.listen(engine, "begin", _limit_operation)
    event.listen(engine, "before_cursor_execute", _limit_statement)
    event.listen(engine, "close", lambda opened, record: _watches.pop(id(opened), _NO_WATCH).stop())
    return engine


class _Watch:
    """Ends a connection when its time is over, also where the server keeps it open and never answers.

    The server's own limits (``statement_timeout``) do not help there, and TCP's only where the machine is gone.
    """

    def __init__(self, opened: Any) -> None:
        self._socket = socket.socket(fileno=os.dup(opened.fileno()))
        self._deadline = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        if self._thread.ident is None:
            self._thread.start()

    def _run(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._stopped.wait(min(left, 1.0)):  # a later statement may have moved the deadline
                return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        self._stopped.set()
        self._socket.close()


class _NoWatch:
    def stop(self) -> None:
        """Nothing to stop."""


_NO_WATCH = _NoWatch()
_watches: dict[int, _Watch | _NoWatch] = {}
"""By the id of an open connection of psycopg."""


def _limit_server(opened: Any, record: object) -> None:
    """Set the time limits of a new connection to a server; they hold behind a pooler too, unlike start-up options."""
    watch = _watches[id(opened)] = _Watch(opened)
    watch.start(CONNECT_SECONDS)
    opened.autocommit = True
    opened.execute(
        f"SET statement_timeout = '{OPERATION_SECONDS}s'; SET lock_timeout = '{BUSY_SECONDS}s'; "
        f"SET idle_in_transaction_session_timeout = '{LONG_SECONDS}s'"
    )
    opened.autocommit = False
    watch.start(OPERATION_SECONDS)


def _limit_operation(connection: Connection) -> None:
    seconds = connection.get_execution_options().get(_SECONDS, OPERATION_SECONDS)
    if seconds != OPERATION_SECONDS:
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{seconds}s'")


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
    except (UnicodeError, MemoryError) as error:  # a schema's text, which sqlite3 puts into its message; a huge value
        raise _damaged(location, f"{type(error).__name__}: {error}") from error


def costs_one_row(error: Exception) -> bool:
    """Whether ``error`` is of one row that cannot be read, while the next one may: bad text, or too long a value."""
    lower = str(getattr(error, "orig", error)).lower()
    return "could not decode" in lower or "too big" in lower


def _explain(location: Location, error: DBAPIError) -> StoreError:
    # By text: several of these causes share one SQLite error code. SQLite's texts are stable.
    text = without_password(" ".join(str(error.orig).split()))
    lower = text.lower()
    if location.path is not None:
        return _explain_sqlite(location, text, lower)
    for secret in passwords_of(location.url or ""):
        text = text.replace(secret, "***")
    if "read-only transaction" in lower:
        return read_only(location)
    if "permission denied for" in lower:
        return StoreAccessError(f"store {location}: {text}; ask the database's owner for the right")
    if "lock timeout" in lower or "deadlock detected" in lower:
        return StoreAccessError(
            f"store {location}: another session held a lock for over {BUSY_SECONDS} s ({text}); end it or repeat later"
        )
    if "statement timeout" in lower:
        return StoreAccessError(
            f"store {location}: the server took over {OPERATION_SECONDS} s ({text}); repeat when it is less busy"
        )
    if type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout"):
        return UnreachableStoreError(
            f"store {location}: the database cannot be reached, or did not answer in time ({text}); "
            "check that the server runs, and the host, port, user and database of the URL"
        )
    return StoreError(f"store {location}: the database refused: {text}")


def _damaged(location: Location, text: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"store {location}: the file is damaged ({shortened(text, 300)}). Restore it from a copy; or save what is "
        "readable with the sqlite3 command's .recover, move the file away and tune again"
    )


_DAMAGE = (
    "malformed",
    "could not decode",
    "no such table",
    "no such column",
    "too big",
    "has no column",
    "out of memory",
)


def _is_full(path: Path | None) -> bool:
    """Whether the disk has no room for SQLite's own files beside ``path``. Some file systems call that a failure."""
    try:
        return path is not None and shutil.disk_usage(path.parent).free < _LEAST_BYTES
    except OSError:
        return False


def _explain_sqlite(location: Location, text: str, lower: str) -> StoreError:
    if "not a database" in lower:
        return NotAStoreError(f"store {location}: the file is not a SQLite database and is left as it is; name another")
    if any(known in lower for known in _DAMAGE):
        return _damaged(location, text)
    if "interrupted" in lower:
        return StoreAccessError(
            f"store {location}: gave no answer within {OPERATION_SECONDS} s; if it is on a slow disk copy it to "
            "another one, else the file is damaged: restore it from a copy"
        )
    if HOT_JOURNAL in lower:
        return StoreAccessError(
            f"store {location}: a process was killed while it wrote, and its last write must be undone before the file "
            "can be read, which needs the right to write the file and its folder. Open it once as a user who may: "
            f"doratune cache ls --store {location}; or read a copy of both the file and its -journal"
        )
    if "readonly" in lower:
        return read_only(location)
    if "full" in lower or ("i/o error" in lower and _is_full(location.path)):
        return StoreAccessError(
            f"store {location}: the disk is full; a write was dropped, nothing before it. Free space and repeat"
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
