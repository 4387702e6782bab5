"""Judge the schema of a database before anything is read from it: plain tables of the known columns, and nothing else.

A SQLite file may come from anybody. In the place of a table there may be a view without an end, a virtual table, or one
whose columns compute their values; triggers run at every write. So the texts of the schema are compared with the tables
of :mod:`.schema`, whatever order their columns have: a migrated store has other ones than a new one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Boolean, Connection, Double, Integer, LargeBinary, String, Table, Text, text

from ..printable import brief
from . import schema

_TYPES = {Text: "TEXT", BigInteger: "BIGINT", Boolean: "BOOLEAN", Double: "DOUBLE", Integer: "INTEGER"}
_TYPES |= {LargeBinary: "BLOB"}

_CREATE_TABLE = re.compile(r'CREATE TABLE "?(\w+)"? \((.*)\)')
_CREATE_INDEX = re.compile(r'CREATE (?:UNIQUE )?INDEX "?\w+"? ON "?\w+"? \("?\w+"?(?:, "?\w+"?)*\)')
_DEFAULT = re.compile(r" DEFAULT (?:'[^']*'|\d+)")
_PLAIN_COLUMN = re.compile(r'"?\w+"? [A-Z]+(?:\(\d+\))?(?: NOT NULL)?')
_SPACE = re.compile("[ \\t\\n\\r]+")
"""What doratune and SQLite write between words. Other white space is a change."""
_MOST_OBJECTS = 1000

Item = tuple[Any, Any, Any, Any]
"""A row of ``sqlite_master``: type, name, table's name, SQL."""


def tables() -> tuple[Table, ...]:
    """The tables of a store."""
    return (schema.version_table, *schema.Base.metadata.tables.values())


def read_items(connection: Connection) -> list[Item]:
    """What a SQLite file's schema has under the names of a store's tables, or on these tables."""
    names = ", ".join(f"'{table.name}'" for table in tables())
    # lower(): names of SQLite are equal whatever their case.
    found = connection.exec_driver_sql(
        f"SELECT type, name, tbl_name, sql FROM sqlite_master WHERE lower(name) IN ({names}) "
        f"OR lower(tbl_name) IN ({names}) LIMIT {_MOST_OBJECTS}"
    )
    return [(row[0], row[1], row[2], row[3]) for row in found]


def has_store(items: Iterable[Item]) -> bool:
    """Whether there is anything under the name of the table of the schema's version."""
    return any(str(name).lower() == schema.VERSION_TABLE for _, name, _, _ in items)


def version_fault(items: Sequence[Item]) -> str | None:
    """Say why the schema's version cannot be read, or None."""
    return next(_faults(schema.version_table, items, {}), None)


def faults(items: Sequence[Item], revision: str) -> Iterator[str]:
    """Say what is wrong with the schema of a store of this revision."""
    for table in tables():
        if not _newer(table.name, revision):
            yield from _faults(
                table, items, {c.name: _newer(f"{table.name}.{c.name}", revision) for c in table.columns}
            )
    for kind, name, owner, sql in items:
        if kind == "index" and sql is not None and not _CREATE_INDEX.fullmatch(_plain(sql)):
            yield f"index {brief(name)} of table {brief(owner)} computes its values"
        elif kind not in ("table", "index"):
            yield f"there is a {brief(kind)} {brief(name)} on table {brief(owner)}"


def deviations(items: Sequence[Item]) -> Iterator[str]:
    """Say which tables and indexes of the present schema a SQLite file lacks, and which others it has on its tables."""
    wanted: dict[tuple[object, object, object], str] = {}
    for table in tables():
        wanted[("table", table.name, table.name)] = ""
        wanted[("index", f"sqlite_autoindex_{table.name}_1", table.name)] = ""
        for index in table.indexes:
            columns = ", ".join(column.name for column in index.columns)
            wanted[("index", index.name, table.name)] = f"CREATE INDEX {index.name} ON {table.name} ({columns})"
    found = {(kind, name, owner): _plain(sql) for kind, name, owner, sql in items}
    for key in sorted(wanted.keys() - found.keys(), key=str):
        yield f"{key[0]} {key[1]} of table {key[2]} is missing"
    for key in sorted(found.keys() - wanted.keys(), key=str):
        yield f"there is an unknown {brief(key[0])} {brief(key[1])} of table {brief(key[2])}"
    for key in wanted.keys() & found.keys():
        if wanted[key] and found[key] != wanted[key]:
            yield f"index {key[1]} is another one: {brief(found[key])}"


def marks(connection: Connection) -> Iterator[str]:
    """Say which numbers of other software stand in a SQLite file's header: doratune writes none."""
    for name in ("application_id", "user_version"):
        found = connection.exec_driver_sql(f"PRAGMA {name}").scalar()
        if found != 0:
            yield f"the header's {name} is {brief(found)}, not 0: other software wrote it, or the file was changed"


def server_fault(connection: Connection) -> str | None:
    """Say which of a store's names in a PostgreSQL database is no table, or None."""
    names = [table.name for table in tables()]
    query = text(
        "SELECT relname, relkind FROM pg_class "
        "WHERE oid IN (SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS name)"
    )
    for name, kind in connection.execute(query, {"names": names}):
        if (kind.decode() if isinstance(kind, bytes) else kind) not in ("r", "p"):
            return f"{name} is not a table"
    return None


def _newer(name: str, revision: str) -> bool:
    since = schema.SINCE.get(name)
    return since is not None and schema.REVISIONS.index(since) > schema.REVISIONS.index(revision)


def _faults(table: Table, items: Sequence[Item], newer: Mapping[str, bool]) -> Iterator[str]:
    named = [item for item in items if str(item[1]).lower() == table.name]
    if len(named) != 1 or named[0][0] != "table" or named[0][2] != table.name:
        kinds = ", ".join(brief(item[0]) for item in named[:3]) or "nothing"
        yield f"{table.name} must be one table, found {kinds}"
        return
    create = _CREATE_TABLE.fullmatch(_plain(named[0][3]))
    if create is None or create[1] != table.name:
        yield f"{table.name} is not a plain table"
        return
    wanted = {part for name, part in _parts(table).items() if not newer.get(name)}
    found = [_DEFAULT.sub("", part) for part in _split(create[2])]
    for part in sorted(wanted.difference(found)):
        yield f"table {table.name} lacks {part!r}"
    for part in found:
        if part not in wanted and not _PLAIN_COLUMN.fullmatch(part):
            yield f"table {table.name} has {brief(part)}"


@functools.cache
def _parts(table: Table) -> dict[str, str]:
    """The definitions in the text that makes ``table`` in SQLite, by the names of columns and constraints."""
    found = {}
    for column in table.columns:
        kind = f"VARCHAR({column.type.length})" if type(column.type) is String else _TYPES[type(column.type)]
        found[column.name] = f"{column.name} {kind}" + ("" if column.nullable else " NOT NULL")
    key = ", ".join(column.name for column in table.primary_key)
    name = f"CONSTRAINT {table.primary_key.name} " if table.primary_key.name else ""
    found["primary key"] = f"{name}PRIMARY KEY ({key})"
    for constraint in table.constraints:
        if constraint is not table.primary_key:
            columns = ", ".join(column.name for column in constraint.columns)  # type: ignore[attr-defined]
            found[str(constraint.name)] = f"CONSTRAINT {constraint.name} UNIQUE ({columns})"
    return found


def _plain(sql: object) -> str:
    return _SPACE.sub(" ", sql).strip(" ") if isinstance(sql, str) else ""


def _split(text: str) -> list[str]:
    """The parts of a list between commas that are in no parentheses."""
    parts, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [re.sub(r"\"(\w+)\"", r"\1", part.strip(" ")) for part in (*parts, text[start:])]
