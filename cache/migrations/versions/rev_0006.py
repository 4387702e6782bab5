"""Entries have a digest over all their values, so that a changed row is found."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

ENTRIES = "doratune_entries"
FLAGS = ("bias", "delta", "save")


def upgrade() -> None:
    """Add the column, and seal the rows as they are. A row that cannot be read gets no digest and stays unusable."""
    op.add_column(ENTRIES, sa.Column("digest", sa.Text(), nullable=False, server_default=""))
    connection = op.get_bind()
    one, update = (
        sa.text(f"SELECT * FROM {ENTRIES} WHERE id = :id"),
        sa.text(f"UPDATE {ENTRIES} SET digest = :digest WHERE id = :id"),
    )
    for row_id in connection.execute(sa.text(f"SELECT id FROM {ENTRIES} ORDER BY id")).scalars().all():
        try:
            row = connection.execute(one, {"id": row_id}).mappings().one()
            digest = _digest(row)
            connection.execute(update, {"id": row_id, "digest": digest})
        except (DBAPIError, KeyError, TypeError, ValueError):
            continue


def downgrade() -> None:
    """Drop the digests."""
    op.drop_column(ENTRIES, "digest")


def _digest(row: Mapping[Any, Any]) -> str:
    values = {str(name): value for name, value in row.items() if value is not None and name not in ("id", "digest")}
    values |= {name: bool(values[name]) for name in FLAGS}  # SQLite has no booleans
    parts = []
    for name, value in sorted(values.items()):
        text = value if isinstance(value, str) else repr(value)
        parts.append(f"{name}:{type(value).__name__}:{len(text)}:{text}\n")
    return hashlib.sha256("".join(parts).encode()).hexdigest()
