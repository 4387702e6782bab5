"""Entries of grouped operations have the number of neural layers that they serve."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the operations of existing entries serve one neural layer, so their specs have none."""
    op.add_column("doratune_entries", sa.Column("layers", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop the numbers."""
    op.drop_column("doratune_entries", "layers")
