"""The keys of the digests that the journal has of runs and rounds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fedrounds.fl_components.errors import StoreError

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    if op.get_bind().execute(sa.text("SELECT count(*) FROM runs")).scalar():
        raise StoreError(
            "the store's journal does not cover configurations and results: a version that was never released wrote it",
            hint="begin with another FEDROUNDS_HOME or database",
        )
    for table in ("runs", "rounds"):
        with op.batch_alter_table(table) as changed:
            changed.add_column(sa.Column("digest_key", sa.String(64), nullable=False))
