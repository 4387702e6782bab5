"""Rows can be signed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SIGNATURES = "doratune_signatures"


def upgrade() -> None:
    """Make the table; existing rows are not signed."""
    op.create_table(
        SIGNATURES,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=f"pk_{SIGNATURES}"),
        sa.UniqueConstraint("digest", "key", name=f"uq_{SIGNATURES}"),
    )


def downgrade() -> None:
    """Drop the signatures."""
    op.drop_table(SIGNATURES)
