"""Run by Alembic, by path and outside the package, so all it needs comes in through ``config.attributes``."""

from __future__ import annotations

from alembic import context

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    target_metadata=attributes["metadata"],
    version_table=attributes["version_table"],
    # Our SQLite connections begin their transactions themselves, so DDL is rolled back with the rest.
    transactional_ddl=True,
)
context.run_migrations()
