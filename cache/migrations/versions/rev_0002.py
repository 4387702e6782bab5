"""Entries have the time of a fused kernel's unfused sequence."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; the time is unknown for existing entries."""
    op.add_column("doratune_entries", sa.Column("unfused_us", sa.Double(), nullable=True))


def downgrade() -> None:
    """Drop the times."""
    op.drop_column("doratune_entries", "unfused_us")
