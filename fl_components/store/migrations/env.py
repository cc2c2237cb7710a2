"""Runs migrations inside the transaction of the connection that it is given."""

from __future__ import annotations

from alembic import context

from fedrounds.fl_components.store.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite alters a table by copying it
)
context.run_migrations()
