"""The store: entries and binaries in a SQLite file or a PostgreSQL database, with the same code.

Source text in a store is for reading and is never run; a config is a validated value.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Engine, Executable, case, delete, or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session, sessionmaker

from ..codegen.digest import code_digest
from ..codegen.spec import TILE_DTYPES, KernelSpec
from . import create as making
from .connect import connect, explained, for_writing, sqlite_engine
from .entry import MEASURED, Binary, BinaryKey, Entry
from .errors import CorruptRowError, LocationError, OlderStoreError, ReadOnlyStoreError, StoreAccessError
from .location import Location
from .neighbours import Neighbourhood, Regret
from .rows import (
    CANDIDATE_COLUMNS,
    PLACE_COLUMNS,
    PROVENANCES,
    binary_of,
    binary_values,
    candidate_of,
    distance_to,
    entry_of,
    entry_values,
)
from .schema import Base, BinaryRow, EntryRow

_BINARY_COLUMNS = ("source_digest", "kernel", "triton", "architecture")
"""The columns of a :class:`~doratune.cache.entry.BinaryKey`."""


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
        if create and readonly:
            raise LocationError(f"store {location}: a new store cannot be read-only; open it for writing once")
        where = Location.parse(location)
        if create and where.path is not None:
            if not where.path.exists():
                making.create_file(where, where.path)
            making.wait_for_claim(where.path)
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
        another template (``template_digest``) is always replaced. An empty ``created_at`` becomes the present time.

        Raises:
            InvalidEntryError: a field of the entry has the wrong type or range.
        """
        return self.put_all([entry]) == 1

    def put_all(self, entries: Iterable[Entry]) -> int:
        """Store the entries as :meth:`put` does, in one transaction: all or none. Return how many were stored."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [entry_values(entry) for entry in entries]
        stored = 0
        with explained(self._where), self._writing() as session:
            for values in rows:
                values["created_at"] = values["created_at"] or now
                new = self._insert(EntryRow).values(values)
                changed = {name: new.excluded[name] for name in values if name != "spec"}
                other_template = EntryRow.template_digest != new.excluded.template_digest
                no_worse = _provenance_order(new.excluded.provenance) <= _provenance_order(EntryRow.provenance)
                # One statement, so that two writers of one spec cannot both decide by what they read before.
                upsert = new.on_conflict_do_update(
                    index_elements=["spec"], set_=changed, where=or_(other_template, no_worse)
                )
                stored += _changed_rows(session, upsert)
        return stored

    def get(self, spec: KernelSpec) -> Entry | None:
        """Return the entry of exactly this spec, or None.

        Raises:
            CorruptRowError: its row is damaged.
        """
        with explained(self._where), self._reading() as session:
            row = session.scalars(select(EntryRow).where(EntryRow.spec == str(spec))).one_or_none()
            return None if row is None else entry_of(row, self.location)

    def entries(self, op: str | None = None, gpu: str | None = None, architecture: str | None = None) -> list[Entry]:
        """Return the entries, all or those of an op, GPU slug and architecture, sorted by spec text.

        Raises:
            CorruptRowError: a row is damaged.
        """
        query = select(EntryRow)
        for column, wanted in ((EntryRow.op, op), (EntryRow.gpu, gpu), (EntryRow.architecture, architecture)):
            if wanted is not None:
                query = query.where(column == wanted)
        with explained(self._where), self._reading() as session:
            found = [entry_of(row, self.location) for row in session.scalars(query)]
        return sorted(found, key=lambda entry: str(entry.spec))  # here, because databases differ in their collation

    def readable_entries(self, op: str | None = None) -> tuple[list[Entry], list[CorruptRowError]]:
        """Return the entries, all or those of an op, sorted by spec text, and the errors of the damaged rows."""
        query = select(EntryRow) if op is None else select(EntryRow).where(EntryRow.op == op)
        found: list[Entry] = []
        damaged: list[CorruptRowError] = []
        with explained(self._where), self._reading() as session:
            for row in session.scalars(query.order_by(EntryRow.id)):
                try:
                    found.append(entry_of(row, self.location))
                except CorruptRowError as error:
                    damaged.append(error)
        return sorted(found, key=lambda entry: str(entry.spec)), damaged

    def without(self, spec: KernelSpec) -> Store:
        """Return this store as a lookup would see it if it had no entry of exactly ``spec``; for reading only."""
        return _Without(self, spec)

    def neighbours(self, spec: KernelSpec, architecture: str, *, count: int) -> Neighbourhood:
        """Return the entries that could substitute for ``spec``, the nearest first, without ``spec`` itself.

        They have the same op and dtypes, and are for the same GPU or for another one of ``architecture``. The
        magnitude's dtype may differ: it is one more vector, whereas the other dtypes determine the tiles. ``count`` of
        each GPU are read at most, measured ones before others. The regrets are those of all measured entries.

        Raises:
            CorruptRowError: a row that is read is damaged.
        """
        query = select(*PLACE_COLUMNS).where(EntryRow.op == spec.op, EntryRow.spec != str(spec))
        query = query.where(or_(EntryRow.gpu == spec.gpu, EntryRow.architecture == architecture))
        for role in TILE_DTYPES:
            query = query.where(getattr(EntryRow, role) == getattr(spec, role))
        with explained(self._where), self._reading() as session:
            ranked: dict[str, list[tuple[int, float, str, int]]] = {}
            regrets = []
            for row in session.execute(query):
                apart = distance_to(spec, row, self.location)
                order = PROVENANCES.index(row.provenance) if row.provenance in PROVENANCES else len(PROVENANCES)
                ranked.setdefault(row.gpu, []).append((order, apart, str(row.spec), row.id))
                if row.lookup_regret is not None and row.provenance == MEASURED:
                    regrets.append(Regret(row.gpu, str(row.spec), apart, row.lookup_regret))
            distances = {row_id: apart for rows in ranked.values() for _, apart, _, row_id in sorted(rows)[:count]}
            chosen = select(*CANDIDATE_COLUMNS).where(EntryRow.id.in_(distances))
            rows = session.execute(chosen).mappings() if distances else ()
            found = [candidate_of(row, distances[row["id"]], self.location) for row in rows]
        nearest = sorted(found, key=lambda candidate: (candidate.distance, str(candidate.spec)))
        return Neighbourhood(tuple(nearest), tuple(sorted(regrets, key=lambda regret: regret.spec)))

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
        with explained(self._where), self._reading() as session:
            row = session.scalars(select(BinaryRow).filter_by(**key._asdict())).one_or_none()
            return None if row is None else binary_of(row, self.location)

    def binaries(
        self, code_digest: str | None = None, triton: str | None = None, architecture: str | None = None
    ) -> list[Binary]:
        """Return the compiled kernels, all or those of one code, Triton version and architecture, sorted by their key.

        Raises:
            CorruptRowError: a row is damaged.
        """
        query = select(BinaryRow).where(*_matching(code_digest, triton, architecture))
        with explained(self._where), self._reading() as session:
            found = [binary_of(row, self.location) for row in session.scalars(query)]
        return sorted(found, key=lambda binary: tuple(getattr(binary, name) for name in BinaryKey._fields))

    def binary_keys(
        self, code_digest: str | None = None, triton: str | None = None, architecture: str | None = None
    ) -> list[BinaryKey]:
        """Return the keys of these compiled kernels, sorted, without reading the images."""
        columns = (BinaryRow.code_digest, BinaryRow.kernel, BinaryRow.triton, BinaryRow.architecture)
        query = select(*columns).where(*_matching(code_digest, triton, architecture))
        with explained(self._where), self._reading() as session:
            return sorted(BinaryKey(*row) for row in session.execute(query))

    def prune_binaries(self, *, triton: str | None = None) -> int:
        """Delete the compiled kernels whose code no entry has; return how many.

        With ``triton``, a version, also delete those of other versions.
        """
        with explained(self._where), self._writing() as session:
            used = {code_digest(str(source)) for source in session.scalars(select(EntryRow.source))}
            stale = [
                row_id
                for row_id, digest, version in session.execute(
                    select(BinaryRow.id, BinaryRow.code_digest, BinaryRow.triton)
                )
                if digest not in used or triton not in (None, version)
            ]
            for row_id in stale:
                session.execute(delete(BinaryRow).where(BinaryRow.id == row_id))
            return len(stale)

    def verify(self) -> list[str]:
        """Check the file and every row; return the problems found."""
        problems: list[str] = []
        with explained(self._where), self._reading() as session:
            if self._engine.dialect.name == "sqlite":
                results = session.connection().exec_driver_sql("PRAGMA integrity_check").scalars().all()
                problems += [f"{self.location}: {result}" for result in results if result != "ok"]
            for table, read in ((EntryRow, entry_of), (BinaryRow, binary_of)):
                for row in session.scalars(select(table).order_by(table.id)):
                    try:
                        read(row, self.location)  # type: ignore[arg-type]
                    except CorruptRowError as error:
                        problems.append(str(error))
        return problems

    def export(self, path: str | Path, *, replace: bool = False, binaries: bool = True) -> None:
        """Write a compact copy: one file that can be shipped and read in a read-only folder.

        Equal entries give equal bytes. The file appears complete or not at all. An existing file is only replaced with
        ``replace``, and only if it is a store.

        Raises:
            StoreAccessError: the file exists, or its folder cannot be written.
            NotAStoreError: ``replace`` is given, but the existing file is not a store.
            CorruptRowError: a row is damaged; nothing is exported.
        """
        target = Location.parse(path)
        if target.path is None:
            raise LocationError(f"export to {target}: an export is a file; name a path")
        if target.path.exists() and replace:
            with contextlib.suppress(OlderStoreError):  # an older store may be replaced too
                Store.open(target.path, readonly=True).close()  # raises for a file that is not a store
        elif target.path.exists():
            raise _exists(target)
        with making.new_file(target, target.path) as fresh:
            making.write_schema(sqlite_engine(fresh))
            with Store(Location.parse(fresh), sqlite_engine(fresh), readonly=False) as copy:
                copy.put_all(self.entries())
                for binary in self.binaries() if binaries else ():
                    copy.put_binary(binary)
            making.compact(fresh)
            if replace:
                os.replace(fresh, target.path)
            elif not making.place(fresh, target.path):
                raise _exists(target)

    def _reading(self) -> Session:
        return Session(self._engine)

    def _writing(self) -> AbstractContextManager[Session]:
        """A session that commits at the end of its block, and rolls back when the block fails."""
        if self.readonly:
            raise ReadOnlyStoreError(f"store {self.location}: opened read-only; open it for writing or use another")
        return sessionmaker(self._writer).begin()

    def _insert(self, table: type[Base]) -> sqlite.Insert:
        # The two dialects' ON CONFLICT have the same methods but no common type.
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        return cast(sqlite.Insert, dialect.insert(table.__table__))


class _Without(Store):
    """A store in which one entry is not found."""

    def __init__(self, store: Store, hidden: KernelSpec) -> None:
        super().__init__(store._where, store._engine, readonly=True)
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


def _exists(target: Location) -> StoreAccessError:
    return StoreAccessError(f"export to {target}: the file exists and is left as it is; name another or replace it")
