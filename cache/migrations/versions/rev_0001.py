"""The first schema: entries and binaries."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ENTRIES = "doratune_entries"
BINARIES = "doratune_binaries"


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        ENTRIES,
        sa.Column("id", sa.Integer(), nullable=False),
        *_columns(sa.Text(), "spec", "op"),
        *_columns(sa.BigInteger(), "d_out", "d_in", "rank", "tokens"),
        *_columns(sa.Text(), "weight", "activation", "adapter", "magnitude"),
        *_columns(sa.Boolean(), "bias", "delta", "save"),
        *_columns(sa.Text(), "gpu", "config", "template_digest", "source_digest", "source", "provenance"),
        *_columns(sa.Double(), "us", "floor_us", nullable=True),
        *_columns(sa.Text(), "samples_us"),
        *_columns(sa.Double(), "error", nullable=True),
        *_columns(sa.BigInteger(), "registers", "spills", "shared_bytes", nullable=True),
        *_columns(sa.BigInteger(), "trials"),
        *_columns(sa.Text(), "tuned_gpu", "architecture", "triton", "torch", "driver", "gpu_name", "doratune"),
        *_columns(sa.Text(), "created_at"),
        sa.PrimaryKeyConstraint("id", name=f"pk_{ENTRIES}"),
        sa.UniqueConstraint("spec", name=f"uq_{ENTRIES}"),
    )
    op.create_index(f"ix_{ENTRIES}_op_gpu", ENTRIES, ["op", "gpu"])
    op.create_index(f"ix_{ENTRIES}_op_architecture", ENTRIES, ["op", "architecture"])
    op.create_index(f"ix_{ENTRIES}_source_digest", ENTRIES, ["source_digest"])
    op.create_table(
        BINARIES,
        sa.Column("id", sa.Integer(), nullable=False),
        *_columns(sa.Text(), "source_digest", "kernel", "triton", "architecture", "metadata"),
        *_columns(sa.LargeBinary(), "image"),
        sa.PrimaryKeyConstraint("id", name=f"pk_{BINARIES}"),
        sa.UniqueConstraint("source_digest", "kernel", "triton", "architecture", name=f"uq_{BINARIES}"),
    )


def downgrade() -> None:
    """Drop both tables with all they hold."""
    op.drop_table(BINARIES)
    op.drop_table(ENTRIES)


def _columns(kind: sa.types.TypeEngine[Any], *names: str, nullable: bool = False) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=nullable) for name in names]
