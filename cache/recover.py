"""Read a SQLite file whose disk is full or whose last writer was killed.

Reading is more than reading: a file in WAL mode needs an index beside it, and what a killed writer left in a rollback
journal must be undone first. Where SQLite cannot do that with the rights of a reader, this module does what can be
done safely.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

HOT_JOURNAL = "hot rollback journal"
"""In the text of the error for a file whose journal must be undone by someone who may write it."""

Connect = Callable[[str], sqlite3.Connection]
"""Opens the file with the parameters of a SQLite URI."""


def connect_for_reading(path: Path, connect: Connect) -> sqlite3.Connection:
    """Open ``path`` read-only so that its tables can be read.

    If a writer was killed in the middle of a transaction, the transaction is undone, as SQLite does for any writer. If
    no index can be made beside a file in WAL mode and its log is empty, the file is read as one that does not change.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    connection = connect("mode=ro")
    try:
        _read(connection)
    except sqlite3.OperationalError as problem:
        connection.close()
        if has_log(path, "-journal"):
            _undo(path, connect, problem)
            return connect("mode=ro")
        if has_log(path, "-wal") or "locked" in str(problem) or "interrupted" in str(problem):
            raise
        connection = connect("mode=ro&immutable=1")
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA schema_version").fetchone()


def _undo(path: Path, connect: Connect, problem: sqlite3.Error) -> None:
    try:
        if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
            raise problem
        with closing(connect("mode=rw")) as connection:
            _read(connection)
    except sqlite3.Error as error:
        raise sqlite3.OperationalError(f"{HOT_JOURNAL}: {error}") from error


def has_log(path: Path, suffix: str) -> bool:
    """Whether there is a log (``-wal``) or rollback journal (``-journal``) with something in it beside ``path``."""
    try:
        return path.with_name(path.name + suffix).stat().st_size > 0
    except OSError:
        return False
