"""Entries have the final that their config won, and the regret of the lookup that the entry replaced."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ENTRIES = "doratune_entries"


def upgrade() -> None:
    """Add the columns; existing entries played no final."""
    op.add_column(ENTRIES, sa.Column("final", sa.Text(), nullable=True))
    op.add_column(ENTRIES, sa.Column("lookup_regret", sa.Double(), nullable=True))


def downgrade() -> None:
    """Drop the finals."""
    op.drop_column(ENTRIES, "lookup_regret")
    op.drop_column(ENTRIES, "final")
