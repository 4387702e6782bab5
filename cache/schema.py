"""The tables of a store.

The names start with ``doratune_`` so that a team can keep the store in a PostgreSQL database beside other tables, such
as Optuna's studies. Optuna has a table ``alembic_version`` there, so ours has another name.

JSON is stored as text and parsed by :mod:`.rows`, so that a damaged row is reported by name; with a JSON column the
whole query would fail. A change here needs a new revision in ``migrations/versions``, added to :data:`REVISIONS`.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006")
"""All schemas, oldest first. This version of doratune reads and writes the last one."""

SINCE = {
    "doratune_entries.unfused_us": "0002",
    "doratune_entries.final": "0003",
    "doratune_entries.lookup_regret": "0003",
    "doratune_entries.layers": "0004",
    "doratune_signatures": "0005",
    "doratune_entries.digest": "0006",
}
"""The revision that brought a table or a column, for those that the first one did not have."""

VERSION_TABLE = "doratune_schema"

version_table = Table(
    VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True, nullable=False, quote=False)
)
"""Alembic's table of the revision, declared here so that opening a store does not import Alembic."""


class Base(DeclarativeBase):
    """The declarative base of the store's tables."""

    metadata = MetaData(
        naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s"}
    )


class EntryRow(Base):
    """One winner. ``spec`` is authoritative; the columns copied from it are for queries."""

    __tablename__ = "doratune_entries"
    __table_args__ = (
        UniqueConstraint("spec"),
        Index("ix_doratune_entries_op_gpu", "op", "gpu"),
        Index("ix_doratune_entries_op_architecture", "op", "architecture"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    spec: Mapped[str] = mapped_column(Text)

    op: Mapped[str] = mapped_column(Text)
    d_out: Mapped[int] = mapped_column(BigInteger)
    d_in: Mapped[int] = mapped_column(BigInteger)
    rank: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    weight: Mapped[str] = mapped_column(Text)
    activation: Mapped[str] = mapped_column(Text)
    adapter: Mapped[str] = mapped_column(Text)
    magnitude: Mapped[str] = mapped_column(Text)
    bias: Mapped[bool]
    delta: Mapped[bool]
    save: Mapped[bool]
    gpu: Mapped[str] = mapped_column(Text)

    config: Mapped[str] = mapped_column(Text)
    template_digest: Mapped[str] = mapped_column(Text)
    source_digest: Mapped[str] = mapped_column(Text, index=True)
    source: Mapped[str] = mapped_column(Text)

    provenance: Mapped[str] = mapped_column(Text)
    us: Mapped[float | None] = mapped_column(Double)
    floor_us: Mapped[float | None] = mapped_column(Double)
    samples_us: Mapped[str] = mapped_column(Text)
    error: Mapped[float | None] = mapped_column(Double)
    registers: Mapped[int | None] = mapped_column(BigInteger)
    spills: Mapped[int | None] = mapped_column(BigInteger)
    shared_bytes: Mapped[int | None] = mapped_column(BigInteger)
    trials: Mapped[int] = mapped_column(BigInteger)

    tuned_gpu: Mapped[str] = mapped_column(Text)
    architecture: Mapped[str] = mapped_column(Text)
    triton: Mapped[str] = mapped_column(Text)
    torch: Mapped[str] = mapped_column(Text)
    driver: Mapped[str] = mapped_column(Text)
    gpu_name: Mapped[str] = mapped_column(Text)
    doratune: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)
    unfused_us: Mapped[float | None] = mapped_column(Double)
    final: Mapped[str | None] = mapped_column(Text)
    lookup_regret: Mapped[float | None] = mapped_column(Double)
    layers: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(Text)


class BinaryRow(Base):
    """One compiled kernel, in a table of its own because it is valid for one Triton version only.

    The column ``source_digest`` holds the digest of the code alone. ``image`` is sealed, see :mod:`.rows`.
    """

    __tablename__ = "doratune_binaries"
    __table_args__ = (UniqueConstraint("source_digest", "kernel", "triton", "architecture"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    code_digest: Mapped[str] = mapped_column("source_digest", Text)
    kernel: Mapped[str] = mapped_column(Text)
    triton: Mapped[str] = mapped_column(Text)
    architecture: Mapped[str] = mapped_column(Text)
    metadata_json: Mapped[str] = mapped_column("metadata", Text)
    image: Mapped[bytes] = mapped_column(LargeBinary)


class SignatureRow(Base):
    """One signature of one row of the tables above, which is found by its digest (:mod:`.signing`)."""

    __tablename__ = "doratune_signatures"
    __table_args__ = (UniqueConstraint("digest", "key"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(Text)
    key: Mapped[str] = mapped_column(Text)
    signature: Mapped[bytes] = mapped_column(LargeBinary)
