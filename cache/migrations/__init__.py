"""Migrate a store's schema by Alembic revisions, on a connection that is already inside a transaction.

Configured here in code, so that it works from an installed wheel without an ``alembic.ini``. To add a revision, copy
the newest file of ``versions/``, set its ``revision`` and ``down_revision``, and append it to ``schema.REVISIONS``.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

from ..schema import VERSION_TABLE, Base

HERE = Path(__file__).parent


def configuration(connection: Connection, versions: Path = HERE / "versions") -> Config:
    """Return Alembic's configuration for ``connection``."""
    config = Config()
    # Alembic interpolates percent signs.
    config.set_main_option("script_location", str(HERE).replace("%", "%%"))
    config.set_main_option("version_locations", str(versions).replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    config.attributes.update(connection=connection, metadata=Base.metadata, version_table=VERSION_TABLE)
    return config


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Migrate the database of ``connection`` up to ``revision``; the caller commits."""
    command.upgrade(configuration(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Migrate the database of ``connection`` down to ``revision`` (``base``: no tables); the caller commits."""
    command.downgrade(configuration(connection), revision)
