"""The database of the Optuna studies: a SQLite file in the user's folder, or whatever URL Optuna takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import sqlalchemy
from sqlalchemy.exc import SQLAlchemyError

from ..cache.create import new_file, place, wait_for_claim
from ..cache.location import Location, without_password
from ..cache.stack import home
from ..errors import DoratuneError

_SQLITE = "sqlite:///"
_BUSY_SECONDS = 60


class StudyStorageError(DoratuneError):
    """The Optuna storage cannot be opened, read or written."""


def default_study_storage() -> str:
    """The URL of the user's own study storage, a SQLite file beside the user's store.

    Raises:
        NoHomeError: as :func:`~doratune.cache.stack.home`.
    """
    return f"sqlite:///{home() / 'studies.sqlite'}"


def open_study_storage(location: str | None = None) -> optuna.storages.BaseStorage:
    """Open the Optuna storage at ``location``, a SQLite file's path or a URL of SQLAlchemy's. A missing file is made.

    Raises:
        StudyStorageError: it cannot be opened or made.
    """
    location = location or default_study_storage()
    with explained(location):
        if "://" in location and not location.startswith(_SQLITE):
            return optuna.storages.RDBStorage(location)
        try:
            path = Path(location.removeprefix(_SQLITE)).expanduser().absolute()
        except RuntimeError as error:  # a ~ of a user without a home
            raise ValueError(str(error)) from None
        if not path.exists():
            _create(path)
        wait_for_claim(path)
        return _sqlite_storage(path)


def _url_of(path: Path) -> sqlalchemy.URL:
    return sqlalchemy.URL.create("sqlite", database=str(path))


def _create(path: Path) -> None:
    # Created completely under another name, in WAL mode: processes that start together would race for both.
    with new_file(Location.parse(path), path) as fresh:
        engine = sqlalchemy.create_engine(_url_of(fresh))
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        engine.dispose()
        release(_sqlite_storage(fresh))
        place(fresh, path)


def _sqlite_storage(path: Path) -> optuna.storages.RDBStorage:
    url = _url_of(path).render_as_string()
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _BUSY_SECONDS}})

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def relax(connection: object, record: object) -> None:
        # In WAL mode NORMAL loses nothing when the process dies, and at a power cut only the latest trials.
        connection.execute("PRAGMA synchronous = NORMAL")  # type: ignore[attr-defined]

    storage.engine.dispose()  # connections made before the listener
    return storage


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Raise a failure of the database inside the block as a StudyStorageError with its cause and what to do."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error  # Optuna's message hides it
        reason = without_password(str(getattr(cause, "orig", None) or cause).strip().splitlines()[0])
        raise StudyStorageError(
            f"study storage {without_password(url)}: {reason}; check the path or URL and its permissions, "
            "or name another with --study-storage"
        ) from error


def release(storage: optuna.storages.BaseStorage) -> None:
    """Close the storage's connections."""
    storage.remove_session()
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.engine.dispose()


def quiet() -> None:
    """Keep Optuna's own log off the screen; warnings stay."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
