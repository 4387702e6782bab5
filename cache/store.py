"""The store: entries and binaries in a SQLite file or a PostgreSQL database, with the same code.

Source text in a store is for reading and is never run; a config is a validated value.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    CursorResult,
    Engine,
    Executable,
    Select,
    bindparam,
    case,
    delete,
    or_,
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstrumentedAttribute, Session, sessionmaker

from ..codegen.digest import code_digest
from ..codegen.spec import TILE_DTYPES, KernelSpec
from ..printable import printable, shortened
from . import create as making
from . import shape
from .connect import connect, costs_one_row, explained, first_row, for_long, for_writing, sqlite_engine
from .entry import DEFAULT, MEASURED, Binary, BinaryKey, Entry, Signature
from .errors import (
    CorruptRowError,
    CorruptStoreError,
    LocationError,
    OlderStoreError,
    ReadOnlyStoreError,
    StoreAccessError,
)
from .location import Location
from .neighbours import Candidate, Neighbourhood, Regret
from .rows import (
    BINARY_COLUMNS,
    CANDIDATE_COLUMNS,
    ENTRY_COLUMNS,
    KEY_COLUMNS,
    PLACE_COLUMNS,
    PROVENANCES,
    SIGNATURE_COLUMNS,
    SOURCE_COLUMNS,
    binary_of,
    binary_values,
    candidate_of,
    distance_to,
    entry_of,
    entry_values,
    key_of,
    signature_of,
    signature_values,
    unreadable,
)
from .schema import REVISIONS, Base, BinaryRow, EntryRow, SignatureRow
from .signing import SigningKey, row_digest

T = TypeVar("T")

_ONE_ENTRY = {
    server: select(*ENTRY_COLUMNS[server]).where(EntryRow.__table__.c.spec == bindparam("wanted"))
    for server in (False, True)
}
"""Made once: to make and to hash a statement takes longer than to execute it."""
_ONE_ENTRY_OF_FILE = str(_ONE_ENTRY[False].compile(dialect=sqlite.dialect()))
_ENTRY_NAMES = tuple(column.name for column in ENTRY_COLUMNS[False])
_BEFORE_ALL = -(1 << 63)
_ROWS_AT_ONCE = 500
"""Rows that a server sends at once."""
_BINARY_COLUMNS = ("source_digest", "kernel", "triton", "architecture")
"""The columns of a :class:`~doratune.cache.entry.BinaryKey`."""

_ASKED_BY_DIGEST = 100
"""Signatures of more rows than this are read all at once: databases limit the number of values in a query."""


class Store:
    """An open store. Safe to use from several threads and processes, and across a fork.

    Open one with :meth:`open`; use it as a context manager or :meth:`close` it. Every method raises a
    :class:`~doratune.cache.errors.StoreError` when the database fails; one that writes raises a
    :class:`~doratune.cache.errors.ReadOnlyStoreError` on a store that was opened read-only.
    """

    def __init__(self, location: Location, engine: Engine, *, readonly: bool) -> None:
        self._where = location
        self._engine = engine
        self._writer = for_writing(engine)
        self.readonly = readonly
        self._server = engine.dialect.name != "sqlite"
        self._kept: dict[tuple[int, int], Connection] = {}

    @classmethod
    def open(cls, location: str | Path, *, create: bool = False, readonly: bool = False) -> Store:
        """Open the store at a path or URL (``sqlite:///…``, ``postgresql://user@host:port/database``).

        ``create`` creates a missing store; without it a missing one is an error. A store with an older schema is
        migrated, unless ``readonly``.

        Raises:
            LocationError: the text is not a location, or ``create`` and ``readonly`` are both given.
            MissingStoreError, NotAStoreError, CorruptStoreError, NewerStoreError, OlderStoreError,
            ReadOnlyStoreError, StoreAccessError, UnreachableStoreError, MissingDriverError: see their docstrings.
        """
        where = Location.parse(location)
        if create and readonly:
            raise LocationError(f"store {where}: a new store cannot be read-only; open it for writing once")
        if create and where.path is not None:
            making.create_missing(where, where.path)
        engine = connect(where, readonly=readonly)
        with explained(where):
            making.settle_schema(where, engine, create=create, readonly=readonly)
        return cls(where, engine, readonly=readonly)

    @property
    def location(self) -> str:
        """The path or URL, without a password."""
        return self._where.text

    def close(self) -> None:
        """Release the database."""
        for owner in [owner for owner in self._kept if owner[0] == os.getpid()]:
            kept = self._kept.pop(owner, None)
            if kept is not None:
                kept.close()
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.location!r}{', readonly' if self.readonly else ''})"

    def put(self, entry: Entry) -> bool:
        """Store ``entry`` as its spec's winner; return whether it was stored.

        The better provenance stays: measured over predicted over default, the newer among equals. An entry tuned with
        another template (``template_digest``) and a damaged one are always replaced. An empty ``created_at`` becomes
        the present time.

        Raises:
            InvalidEntryError: a field of the entry has the wrong type or range.
        """
        return self.put_all([entry]) == 1

    def put_all(self, entries: Iterable[Entry]) -> int:
        """Store the entries as :meth:`put` does, in one transaction: all or none. Return how many were stored."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [entry_values(entry if entry.created_at else replace(entry, created_at=now)) for entry in entries]
        stored = 0
        with explained(self._where), self._writing() as session:
            for values in rows:
                new = self._insert(EntryRow).values(values)
                changed = {name: new.excluded[name] for name in values if name != "spec"}
                other_template = EntryRow.template_digest != new.excluded.template_digest
                no_worse = _provenance_order(new.excluded.provenance) <= _provenance_order(EntryRow.provenance)
                # One statement, so that two writers of one spec cannot both decide by what they read before.
                upsert = new.on_conflict_do_update(
                    index_elements=["spec"], set_=changed, where=or_(other_template, no_worse)
                )
                changed_rows = _changed_rows(session, upsert)
                if not changed_rows and self._is_damaged(session.connection(), values["spec"]):
                    session.execute(delete(EntryRow).where(EntryRow.spec == values["spec"]))
                    changed_rows = _changed_rows(session, self._insert(EntryRow).values(values))
                stored += changed_rows
        return stored

    def get(self, spec: KernelSpec) -> Entry | None:
        """Return the entry of exactly this spec, or None.

        Raises:
            CorruptRowError: its row is damaged.
        """
        with explained(self._where), self._reading() as connection:
            return self._get(connection, str(spec))

    def readable(self, spec: KernelSpec) -> Entry | None:
        """Return the entry of exactly this spec, or None where there is none or its row is damaged."""
        try:
            return self.get(spec)
        except CorruptRowError:
            return None

    def entries(self, op: str | None = None, gpu: str | None = None, architecture: str | None = None) -> list[Entry]:
        """Return the entries, all or those of an op, GPU slug and architecture, sorted by spec text.

        Raises:
            CorruptRowError: a row is damaged.
        """
        found, damaged = self.readable_entries(op, gpu, architecture)
        if damaged:
            raise damaged[0]
        return found

    def readable_entries(
        self, op: str | None = None, gpu: str | None = None, architecture: str | None = None
    ) -> tuple[list[Entry], list[CorruptRowError]]:
        """Return what :meth:`entries` does, and the errors of the damaged rows beside it."""
        wanted = ((EntryRow.op, op), (EntryRow.gpu, gpu), (EntryRow.architecture, architecture))
        where = [column == value for column, value in wanted if value is not None]
        found: list[tuple[str, Entry]] = []
        damaged: list[CorruptRowError] = []

        def named(row: Mapping[Any, Any], store: str) -> tuple[str, Entry]:
            entry = entry_of(row, store)
            return row["spec"], entry

        with explained(self._where), self._reading(for_long(self._engine)) as connection:
            for each in self._each(connection, EntryRow, ENTRY_COLUMNS, named, *where, long_rows=True):
                if isinstance(each, CorruptRowError):
                    damaged.append(each)
                else:
                    found.append(each)
        # Sorted here, because databases differ in their collation.
        return [entry for _, entry in sorted(found, key=itemgetter(0))], damaged

    def without(self, spec: KernelSpec) -> Store:
        """Return this store as a lookup would see it if it had no entry of exactly ``spec``; for reading only."""
        return _Without(self, spec)

    def neighbours(self, spec: KernelSpec, architecture: str, *, count: int) -> Neighbourhood:
        """Return the entries that could substitute for ``spec``, the nearest first, without ``spec`` itself.

        They have the same op and dtypes, and are for the same GPU or for another one of ``architecture``. The
        magnitude's dtype may differ: it is one more vector, whereas the other dtypes determine the tiles. ``count`` of
        each GPU are read at most, measured ones before others; one that was never tuned says nothing of other specs.
        The regrets are those of all measured entries.
        """
        where = [EntryRow.op == spec.op, EntryRow.spec != str(spec), EntryRow.provenance != DEFAULT]
        where.append(or_(EntryRow.gpu == spec.gpu, EntryRow.architecture == architecture))
        where += [getattr(EntryRow, role) == getattr(spec, role) for role in TILE_DTYPES]
        ranked: dict[str, list[tuple[int, float, str, int]]] = {}
        regrets, found, damaged = [], [], []

        def apart_from(row: Mapping[Any, Any], store: str) -> tuple[Mapping[Any, Any], float]:
            return row, distance_to(spec, row, store)

        with explained(self._where), self._reading() as connection:
            for each in self._each(connection, EntryRow, PLACE_COLUMNS, apart_from, *where):
                if isinstance(each, CorruptRowError):
                    damaged.append(str(each))
                    continue
                row, apart = each
                order = PROVENANCES.index(row["provenance"]) if row["provenance"] in PROVENANCES else len(PROVENANCES)
                ranked.setdefault(row["gpu"], []).append((order, apart, row["spec"], row["id"]))
                if row["lookup_regret"] is not None and row["provenance"] == MEASURED:
                    regrets.append(Regret(row["gpu"], row["spec"], apart, row["lookup_regret"]))
            distances = {row_id: apart for rows in ranked.values() for _, apart, _, row_id in sorted(rows)[:count]}

            def candidate(row: Mapping[Any, Any], store: str) -> Candidate:
                return candidate_of(row, distances[row["id"]], store)

            chosen = EntryRow.id.in_(distances)
            for one in self._each(connection, EntryRow, CANDIDATE_COLUMNS, candidate, chosen) if distances else ():
                if isinstance(one, Candidate):
                    found.append(one)
                else:
                    damaged.append(str(one))
        nearest = sorted(found, key=lambda candidate: (candidate.distance, str(candidate.spec)))
        return Neighbourhood(tuple(nearest), tuple(sorted(regrets, key=lambda each: each.spec)), tuple(damaged))

    def remove(self, spec: KernelSpec) -> bool:
        """Delete the entry of exactly this spec; return whether there was one."""
        with explained(self._where), self._writing() as session:
            return _changed_rows(session, delete(EntryRow).where(EntryRow.spec == str(spec))) == 1

    def put_binary(self, binary: Binary) -> None:
        """Store a compiled kernel; replace an earlier one for the same code, Triton and architecture.

        Raises:
            InvalidEntryError: its metadata is not a JSON object, its image is empty, or a part of its key is empty.
        """
        values = binary_values(binary)
        with explained(self._where), self._writing() as session:
            new = self._insert(BinaryRow).values(values)
            changed = {name: new.excluded[name] for name in ("metadata", "image")}
            session.execute(new.on_conflict_do_update(index_elements=_BINARY_COLUMNS, set_=changed))

    def get_binary(self, code_digest: str, kernel: str, triton: str, architecture: str) -> Binary | None:
        """Return the kernel compiled from exactly this code by this Triton for this architecture, or None.

        Raises:
            CorruptRowError: its row is damaged.
        """
        key = BinaryKey(code_digest, kernel, triton, architecture)
        where = [getattr(BinaryRow, name) == value for name, value in key._asdict().items()]
        with explained(self._where), self._reading() as connection:
            found = next(
                self._each(connection, BinaryRow, BINARY_COLUMNS, binary_of, *where), None
            )  # one, if it has more
        if isinstance(found, CorruptRowError):
            raise found
        return found

    def has_binaries(self, code_digest: str, triton: str, architecture: str) -> bool:
        """Whether there is any kernel of this code, Triton version and architecture; nothing of it is read."""
        query = select(BinaryRow.id).where(*_matching(code_digest, triton, architecture)).limit(1)
        with explained(self._where), self._reading() as session:
            return session.execute(query).first() is not None

    def binaries(
        self, code_digest: str | None = None, triton: str | None = None, architecture: str | None = None
    ) -> list[Binary]:
        """Return the compiled kernels, all or those of one code, Triton version and architecture, sorted by their key.

        Raises:
            CorruptRowError: a row is damaged.
        """
        found = self._binaries(*_matching(code_digest, triton, architecture))
        return sorted(found, key=lambda binary: tuple(getattr(binary, name) for name in BinaryKey._fields))

    def binary_keys(
        self, code_digest: str | None = None, triton: str | None = None, architecture: str | None = None
    ) -> list[BinaryKey]:
        """Return the keys of these compiled kernels, sorted, without reading the images. Damaged ones are left out."""
        where = _matching(code_digest, triton, architecture)
        with explained(self._where), self._reading() as connection:
            return sorted(
                each
                for each in self._each(connection, BinaryRow, KEY_COLUMNS, key_of, *where)
                if isinstance(each, BinaryKey)
            )

    def _binaries(self, *where: ColumnElement[bool]) -> list[Binary]:
        found = []
        with explained(self._where), self._reading() as connection:
            for each in self._each(connection, BinaryRow, BINARY_COLUMNS, binary_of, *where):
                if isinstance(each, CorruptRowError):
                    raise each
                found.append(each)
        return found

    def put_signatures(self, signatures: Iterable[Signature]) -> None:
        """Store signatures of rows: new ones (:meth:`~doratune.cache.signing.SigningKey.sign`) or another store's."""
        with explained(self._where), self._writing() as session:
            for signature in signatures:
                new = self._insert(SignatureRow).values(signature_values(signature))
                changed = {"signature": new.excluded.signature}
                session.execute(new.on_conflict_do_update(index_elements=["digest", "key"], set_=changed))

    def signatures(self, digests: Collection[str] | None = None, keys: Collection[str] | None = None) -> set[Signature]:
        """Return the signatures, all or those of rows with these digests by keys with these fingerprints.

        They are not checked: see :func:`~doratune.cache.signing.signers`.
        """
        where = [] if keys is None else [SignatureRow.key.in_(keys)]
        if digests is not None and len(digests) <= _ASKED_BY_DIGEST:
            where.append(SignatureRow.digest.in_(digests))
        with explained(self._where), self._reading() as connection:
            found = self._each(connection, SignatureRow, SIGNATURE_COLUMNS, signature_of, *where)
            signatures = {each for each in found if isinstance(each, Signature)}
        return signatures if digests is None else {each for each in signatures if each.digest in digests}

    def prune_binaries(self, *, triton: str | None = None) -> int:
        """Delete the compiled kernels whose code no entry has; return how many.

        With ``triton``, a version, also delete those of other versions.
        """
        with explained(self._where), self._writing(for_long(self._writer)) as session:
            connection = session.connection()
            read = self._each(connection, EntryRow, SOURCE_COLUMNS, lambda row, _: row["source"])
            used = {code_digest(source) for source in read if isinstance(source, str)}
            keys = self._each(connection, BinaryRow, KEY_COLUMNS, lambda row, _: dict(row))
            stale = [
                each.row_id if isinstance(each, CorruptRowError) else each["id"]
                for each in keys
                if isinstance(each, CorruptRowError)
                or each["source_digest"] not in used
                or triton not in (None, each["triton"])
            ]
            deleted = 0
            for row_id in stale:
                try:
                    session.execute(delete(BinaryRow).where(BinaryRow.id == row_id))
                    deleted += 1
                except DBAPIError as error:  # a key too long to be found in its index: the row stays, and serves nobody
                    if not costs_one_row(error):
                        raise
            return deleted

    def verify(self) -> list[str]:
        """Check the file, its schema and every row; return the problems found."""
        problems: list[str] = []
        try:
            with explained(self._where), self._reading(for_long(self._engine)) as connection:
                if not self._server:
                    results = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
                    problems += [f"{self.location}: {result}" for result in results if result != "ok"]
                    items = shape.read_items(connection)
                    faults = (*shape.faults(items, REVISIONS[-1]), *shape.deviations(items), *shape.marks(connection))
                    problems += [f"{self.location}: {fault}" for fault in faults]
                entries = self._each(connection, EntryRow, ENTRY_COLUMNS, entry_of)
                problems += [str(each) for each in entries if isinstance(each, CorruptRowError)]
                binaries = self._each(connection, BinaryRow, BINARY_COLUMNS, binary_of)
                problems += [str(each) for each in binaries if isinstance(each, CorruptRowError)]
                signatures = self._each(connection, SignatureRow, SIGNATURE_COLUMNS, signature_of)
                problems += [str(each) for each in signatures if isinstance(each, CorruptRowError)]
        except (CorruptStoreError, StoreAccessError) as error:  # the rest cannot be read
            problems.append(str(error))
        return [shortened(printable(problem)) for problem in problems]

    def export(
        self, path: str | Path, *, replace: bool = False, binaries: bool = True, sign: SigningKey | None = None
    ) -> None:
        """Write a compact copy: one file that can be shipped and read in a read-only folder.

        Equal entries give equal bytes. The file appears complete or not at all. An existing file is only replaced with
        ``replace``, and only if it is a store. Signatures of what is exported come along; with ``sign``
        (:func:`~doratune.cache.signing.read_signing_key`) every entry and binary is also signed with that key.

        Raises:
            StoreAccessError: the file exists, or its folder cannot be written.
            NotAStoreError: ``replace`` is given, but the existing file is not a store.
            CorruptRowError: a row is damaged; nothing is exported.
        """
        target = self.check_export(path, replace=replace)
        assert target.path is not None
        with making.new_file(target, target.path) as fresh:
            making.write_schema(sqlite_engine(fresh))
            with Store(Location.parse(fresh), sqlite_engine(fresh), readonly=False) as copy:
                copy.put_all(self.entries())
                for binary in self.binaries() if binaries else ():
                    copy.put_binary(binary)
                copy.put_signatures(sorted(self._signatures_for(copy, sign)))
            making.compact(fresh)
            if replace:
                os.replace(fresh, target.path)
            elif not making.place(fresh, target.path):
                raise _exists(target)

    @staticmethod
    def check_export(path: str | Path, *, replace: bool = False) -> Location:
        """Return the location of an export to ``path``, before the work of minutes that it ends.

        Raises:
            LocationError, StoreAccessError, NotAStoreError: as :meth:`export`.
        """
        target = Location.parse(path)
        if target.path is None:
            raise LocationError(f"export to {target}: an export is a file; name a path")
        if target.path.exists() and replace:
            with contextlib.suppress(OlderStoreError):  # an older store may be replaced too
                Store.open(target.path, readonly=True).close()  # raises for a file that is not a store
        elif target.path.exists():
            raise _exists(target)
        folder = next(each for each in target.path.absolute().parents if each.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            reason = "you may not write there" if folder.is_dir() else f"{folder} is a file"
            raise StoreAccessError(
                f"store {target}: cannot be made in {target.path.parent} ({reason}); name a folder that you can write"
            )
        return target

    def _signatures_for(self, copy: Store, key: SigningKey | None) -> set[Signature]:
        """The signatures of the rows of ``copy``: those that are known here, and new ones with ``key``."""
        known = self.signatures()
        if not known and key is None:
            return set()
        rows: list[Entry | Binary] = [*copy.entries(), *copy.binaries()]
        digests = {row_digest(row) for row in rows}
        made = set() if key is None else {key.sign(digest) for digest in digests}
        renewed = {signature[:2] for signature in made}
        return made | {one for one in known if one.digest in digests and one[:2] not in renewed}

    def _get(self, connection: Connection, spec: str) -> Entry | None:
        try:
            row: Mapping[Any, Any] | None
            if self._server:
                row = connection.execute(_ONE_ENTRY[True], {"wanted": spec}).mappings().first()
            else:
                values = first_row(connection, _ONE_ENTRY_OF_FILE, spec)
                row = None if values is None else dict(zip(_ENTRY_NAMES, values, strict=True))
        except (DBAPIError, UnicodeError) as error:
            if not costs_one_row(error):
                raise
            row_id = connection.execute(select(EntryRow.id).where(EntryRow.spec == spec)).scalar()
            raise unreadable(self.location, row_id, EntryRow.__tablename__, error) from None
        if row is None:
            return None
        if row["spec"] != spec:
            raise _disordered(self.location)
        return entry_of(row, self.location)

    def _is_damaged(self, connection: Connection, spec: str) -> bool:
        try:
            self._get(connection, spec)
        except CorruptRowError:
            return True
        return False

    def _each(
        self,
        connection: Connection,
        table: type[Base],
        columns: Mapping[bool, Sequence[ColumnElement[Any]]],
        judge: Callable[[Mapping[Any, Any], str], T],
        *where: ColumnElement[bool],
        long_rows: bool = False,
    ) -> Iterator[T | CorruptRowError]:
        """What ``judge`` makes of each row in the order of their ids; of a damaged row its error.

        ``long_rows``: the ids are found and sorted first. SQLite would sort whole rows, which takes twice as long as to
        read them where they have a kernel's source.
        """
        key = table.__table__.c.id
        everything = select(*columns[self._server]).order_by(key)
        if self._server:
            everything = everything.execution_options(yield_per=_ROWS_AT_ONCE)
        query = everything.where(*where)
        ids_first = long_rows and where
        statement = everything.where(key.in_(select(key).where(*where))) if ids_first else query

        def judged(row: Mapping[Any, Any]) -> T | CorruptRowError:
            try:
                return judge(row, self.location)
            except CorruptRowError as error:
                return error

        last: int | None = None
        while True:
            try:
                for row in connection.execute(statement).mappings():
                    # A damaged tree of pages may lead in circles.
                    if type(row["id"]) is not int or (last is not None and row["id"] <= last):
                        raise _disordered(self.location)
                    last = row["id"]
                    yield judged(row)
                return
            except (DBAPIError, UnicodeError) as error:
                if not costs_one_row(error):
                    raise
            rest = query if last is None else query.where(key > last)
            bad, problem = self._first_unreadable(connection, rest, key, last)
            if bad is None:  # the value is in an index alone
                for row in connection.execute(rest.where(key > _BEFORE_ALL)).mappings():
                    yield judged(row)
                return
            for row in connection.execute(rest.where(key < bad)).mappings():
                yield judged(row)
            last = bad
            statement = query.where(key > last)
            yield unreadable(self.location, bad, table.__tablename__, problem)

    def _first_unreadable(
        self, connection: Connection, query: Select[Any], key: ColumnElement[int], last: int | None
    ) -> tuple[int | None, Exception | None]:
        """The id of the first row for which ``query`` fails, and the error. It halves the rows after ``last``."""
        ids: list[int] = []
        for row_id in connection.execute(
            select(key).where(*([] if last is None else [key > last])).order_by(key)
        ).scalars():
            if type(row_id) is not int or (ids and row_id <= ids[-1]):
                raise _disordered(self.location)
            ids.append(row_id)
        low, high = 0, len(ids)
        while low < high:
            middle = max((low + high) // 2, low + 1)
            try:
                for _ in connection.execute(query.where(key >= ids[low], key <= ids[middle - 1])):
                    pass
                low = middle
            except (DBAPIError, UnicodeError) as error:
                if not costs_one_row(error):
                    raise
                if middle == low + 1:
                    return ids[low], error
                high = middle
        return None, None

    @contextmanager
    def _reading(self, engine: Engine | None = None) -> Iterator[Connection]:
        """A connection for reading, in one transaction.

        A read-only store of a file keeps one for each thread: to open it takes longer than to read an entry. After a
        fork it belongs to the parent.
        """
        if self._server or not self.readonly or engine is not None:
            with (engine or self._engine).connect() as connection:
                yield connection
            return
        owner = (os.getpid(), threading.get_ident())
        kept = self._kept.pop(owner, None) or self._engine.connect()
        try:
            yield kept
            kept.rollback()
        except BaseException:
            kept.close()
            raise
        self._kept[owner] = kept

    def _writing(self, writer: Engine | None = None) -> AbstractContextManager[Session]:
        """A session that commits at the end of its block, and rolls back when the block fails."""
        if self.readonly:
            raise ReadOnlyStoreError(f"store {self.location}: opened read-only; open it for writing or use another")
        return sessionmaker(writer or self._writer).begin()

    def _insert(self, table: type[Base]) -> sqlite.Insert:
        # The two dialects' ON CONFLICT have the same methods but no common type.
        dialect: Any = sqlite
        if self._engine.dialect.name == "postgresql":
            from sqlalchemy.dialects import postgresql  # takes 20 ms, which a file does not need

            dialect = postgresql
        return cast(sqlite.Insert, dialect.insert(table.__table__))


class _Without(Store):
    """A store in which one entry is not found."""

    def __init__(self, store: Store, hidden: KernelSpec) -> None:
        super().__init__(store._where, store._engine, readonly=True)
        self._kept = store._kept
        self._hidden = hidden

    def get(self, spec: KernelSpec) -> Entry | None:
        return None if spec == self._hidden else super().get(spec)


def _matching(code_digest: str | None, triton: str | None, architecture: str | None) -> list[ColumnElement[bool]]:
    columns = (BinaryRow.code_digest, BinaryRow.triton, BinaryRow.architecture)
    wanted = (code_digest, triton, architecture)
    return [column == value for column, value in zip(columns, wanted, strict=True) if value is not None]


def _provenance_order(column: ColumnElement[str] | InstrumentedAttribute[str]) -> ColumnElement[int]:
    ranks = {provenance: rank for rank, provenance in enumerate(PROVENANCES)}
    return case(ranks, value=column, else_=len(ranks))


def _changed_rows(session: Session, statement: Executable) -> int:
    # Without the option SQLAlchemy may close the cursor of an INSERT before its count is read.
    result = session.execute(statement, execution_options={"preserve_rowcount": True})
    return cast("CursorResult[Any]", result).rowcount


def _disordered(location: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"store {location}: the file is damaged: its rows do not follow each other, or an index names another row. "
        "Restore it from a copy"
    )


def _exists(target: Location) -> StoreAccessError:
    return StoreAccessError(f"export to {target}: the file exists and is left as it is; name another or replace it")
