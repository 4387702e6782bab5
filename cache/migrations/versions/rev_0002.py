"""Entries say what the work of a fusing kernel takes one after another."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the time, unknown of every entry so far."""
    op.add_column("doratune_entries", sa.Column("unfused_us", sa.Double(), nullable=True))


def downgrade() -> None:
    """Drop the times."""
    op.drop_column("doratune_entries", "unfused_us")
