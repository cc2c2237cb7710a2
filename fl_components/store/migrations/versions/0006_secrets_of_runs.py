"""Which secret a run under a privacy claim draws from, and where that is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("runs", sa.Column("secret_id", sa.String(32)))
    op.add_column("runs", sa.Column("secret_home", sa.String()))
