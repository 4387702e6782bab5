"""The tables of a store.

The names carry the prefix ``doratune_`` so that a team can keep the store in a PostgreSQL database that holds other
things too, such as Optuna's studies (whose own ``alembic_version`` table is why ours has a name of its own).

JSON is kept as text and parsed by :mod:`.rows`: one damaged row is then reported by name, where a JSON column would
fail the whole query. A change here needs a new revision in ``migrations/versions`` and its name in :data:`REVISIONS`.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Index, LargeBinary, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISIONS = ("0001", "0002")
"""Every schema so far, oldest first; the last is the one this doratune reads and writes."""

VERSION_TABLE = "doratune_schema"

version_table = Table(
    VERSION_TABLE, MetaData(), Column("version_num", String(32), primary_key=True, nullable=False, quote=False)
)
"""The table Alembic keeps the revision in, declared here so that opening a store does not import Alembic."""


class Base(DeclarativeBase):
    """The declarative base of the store's tables."""

    metadata = MetaData(
        naming_convention={"pk": "pk_%(table_name)s", "ix": "ix_%(column_0_label)s", "uq": "uq_%(table_name)s"}
    )


class EntryRow(Base):
    """One winner. ``spec`` is the authority; the columns taken out of it exist to be searched by."""

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


class BinaryRow(Base):
    """One compiled kernel. Apart from the entries, because it is valid for one Triton version only.

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
