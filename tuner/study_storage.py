"""The database of the Optuna studies: a SQLite file in the user's folder, or whatever URL Optuna takes.

Several processes may use one storage: on PostgreSQL from any host, in a SQLite file from one host. In a SQLite file
every transaction takes the write lock at its start. Optuna reads a trial's state before it changes it, and without the
lock two processes could both find a trial waiting and both take it.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import optuna
import sqlalchemy
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from ..cache.create import keep_log, new_file, place, wait_for_claim
from ..cache.location import Location, without_password
from ..cache.stack import home
from ..errors import DoratuneError

_SQLITE = re.compile(r"sqlite(\+pysqlite)?:", re.IGNORECASE)
_SQLITE_MAGIC = b"SQLite format 3\x00"
_STUDIES = "studies"  # a table of Optuna's
_POSTGRESQL = ("postgresql://", "postgres://", "postgresql+psycopg://")
_BUSY_SECONDS = 60
_ADVISORY_LOCK = 0x646F7261

_CONNECT_ARGS = {
    "connect_timeout": 10,
    # A host that went away without a word is noticed within a minute, where the default is two hours.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


@dataclass
class Heartbeat:
    """Every ``interval`` seconds a worker shows that it is alive; after ``grace`` seconds without, it is not."""

    interval: int
    grace: int


HEARTBEAT = Heartbeat(interval=15, grace=60)

_DAMAGED = (AssertionError, AttributeError, IndexError, KeyError, TypeError, json.JSONDecodeError)
"""What Optuna raises for rows that it would not have written."""

PATIENCE_SECONDS = 30.0
"""How long a database that does not answer is tried again before the run ends."""

T = TypeVar("T")


class StudyStorageError(DoratuneError):
    """The Optuna storage cannot be opened, read or written."""


def default_study_storage() -> str:
    """The path of the user's own study storage, a SQLite file beside the user's store.

    Raises:
        NoHomeError: as :func:`~doratune.cache.stack.home`.
    """
    return str(home() / "studies.sqlite")


def open_study_storage(location: str | None = None) -> optuna.storages.BaseStorage:
    """Open the Optuna storage at ``location``, a SQLite file's path or a URL of SQLAlchemy's. A missing file is made.

    Raises:
        LocationError: it is empty or a database in memory.
        StudyStorageError: it cannot be opened or made.
    """
    location = default_study_storage() if location is None else location
    path = storage_file(location)
    with explained(location):
        if path is not None:
            if not path.exists():
                _create(path)
            wait_for_claim(path)
            _check_file(path)
            return _sqlite_storage(path)
        if location.startswith(_POSTGRESQL):
            return _postgresql_storage(location)
        return _storage(location, {"pool_pre_ping": True})


def check_study_storage(location: str) -> None:
    """Say what is wrong with a study storage at ``location`` without making it.

    Raises:
        LocationError, StudyStorageError: as :func:`open_study_storage`, as far as that can be known.
    """
    path = storage_file(location)
    with explained(location):
        if path is not None and path.exists():
            wait_for_claim(path)
            _check_file(path)


def storage_file(location: str) -> Path | None:
    """The file of a study storage at a path or a ``sqlite:///`` URL; None for another database.

    Raises:
        LocationError: the location is empty or a database in memory.
    """
    if "://" in location and not _SQLITE.match(location):
        return None
    return Location.parse(location, "study storage").path


def _storage(url: str, engine_kwargs: dict[str, object]) -> optuna.storages.RDBStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
        return optuna.storages.RDBStorage(
            url, engine_kwargs=engine_kwargs, heartbeat_interval=HEARTBEAT.interval, grace_period=HEARTBEAT.grace
        )


def fail_stale(study: optuna.Study) -> None:
    """Fail the study's running trials without a heartbeat in the last :data:`HEARTBEAT` ``.grace`` seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _postgresql_storage(location: str) -> optuna.storages.RDBStorage:
    url = f"postgresql+psycopg://{location.partition('://')[2]}"
    try:
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, connect_args=_CONNECT_ARGS)
    except ImportError:
        raise ValueError("the PostgreSQL driver is not installed; run: pip install 'doratune[postgres]'") from None
    kwargs = {"pool_pre_ping": True, "connect_args": _CONNECT_ARGS}
    with engine.begin() as connection:
        if not _has_studies(connection):
            # Processes that start together on an empty database would race for Optuna's tables.
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
            release(_storage(url, dict(kwargs)))
    storage = _storage(url, kwargs)

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def in_utc(connection: object, record: object) -> None:
        # Heartbeats are stored without a time zone, in that of the session.
        with connection.cursor() as cursor:  # type: ignore[attr-defined]
            cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()  # type: ignore[attr-defined]

    storage.engine.dispose()  # connections made before the listener
    return storage


def _has_studies(connection: sqlalchemy.Connection) -> bool:
    """Whether Optuna's tables are complete: the last thing it writes is their version."""
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return False
    return connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).first() is not None


def _create(path: Path) -> None:
    # Created completely under another name, in WAL mode: processes that start together would race for both.
    with new_file(Location.parse(path), path) as fresh:
        release(_sqlite_storage(fresh))
        keep_log(fresh)
        place(fresh, path)


def _check_file(path: Path) -> None:
    """Refuse a file that Optuna must not add its tables to.

    Raises:
        ValueError: it is no SQLite database, or one of another application, such as a store.
    """
    if not path.is_file():  # to open a pipe would wait for whoever writes to it
        raise ValueError("it is not a file; name one")
    with path.open("rb") as file:
        head = file.read(len(_SQLITE_MAGIC))
    if head != _SQLITE_MAGIC:
        raise ValueError("the file is not a SQLite database and is left as it is")
    with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and _STUDIES not in tables:
        raise ValueError(f"the database is of another application (its tables: {', '.join(sorted(tables))[:200]})")


def _sqlite_storage(path: Path) -> optuna.storages.RDBStorage:
    def connect() -> sqlite3.Connection:
        # Without the file's name in a URL, whose text Optuna formats: a name may contain any character.
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
        # In WAL mode NORMAL loses nothing when the process dies, and at a power cut only the latest trials.
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    storage = _storage("sqlite://", {"creator": connect, "poolclass": sqlalchemy.QueuePool})

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def relax(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # the listener below begins the transactions

    @sqlalchemy.event.listens_for(storage.engine, "begin")
    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections made before the listener
    return storage


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Raise a failure of the database inside the block as a StudyStorageError with its cause and what to do."""
    try:
        yield
    except _DAMAGED as error:
        raise StudyStorageError(
            f"study storage {without_password(url)}: what Optuna reads there makes no sense to it "
            f"({type(error).__name__}: {_first_line(error)}); it is damaged or of another version of Optuna. "
            "Move it away, or name another with --study-storage"
        ) from error
    except RuntimeError as error:  # Optuna's schema check
        raise StudyStorageError(
            f"study storage {without_password(url)}: {_first_line(error)} Or name another storage with --study-storage"
        ) from error
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.OptunaError, ImportError, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error  # Optuna's message hides it
        reason = without_password(_first_line(getattr(cause, "orig", None) or cause))
        damaged = "malformed" in reason or "no such" in reason or "has no column" in reason
        remedy = "it is damaged: move it away" if damaged else "check the path or URL and its permissions"
        raise StudyStorageError(
            f"study storage {without_password(url)}: {reason}; {remedy}, or name another with --study-storage"
        ) from error


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def patiently(url: str, work: Callable[[], T]) -> T:
    """Do ``work`` with the storage at ``url``, again for :data:`PATIENCE_SECONDS` while the database does not answer.

    ``work`` must be right to repeat: when a connection breaks during a commit, nobody knows whether it was made.

    Raises:
        StudyStorageError: the database refused, or did not answer in time.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    pause = 0.1
    with explained(url):
        while True:
            try:
                return work()
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                if not _may_pass(cause) or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def _may_pass(cause: BaseException | None) -> bool:
    """Whether a failure may be gone when the work is tried again."""
    if not isinstance(cause, (OperationalError, InterfaceError)):
        return False
    return not isinstance(cause.orig, sqlite3.Error) or "locked" in str(cause.orig)


def release(storage: optuna.storages.BaseStorage) -> None:
    """Close the storage's connections."""
    storage.remove_session()
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.engine.dispose()


def quiet() -> None:
    """Keep Optuna's own log off the screen; warnings stay."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
