"""How often each client took part, and sweeps: runs that vary some fields of one configuration."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "participations",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("client", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("last_round", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_participations_run_id_runs"),
        sa.PrimaryKeyConstraint("run_id", "client", name="pk_participations"),
    )
    op.create_table(
        "sweeps",
        sa.Column("sweep_id", sa.String(128), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("over", sa.Text(), nullable=False),
        sa.Column("source_folder", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("sweep_id", name="pk_sweeps"),
        sa.UniqueConstraint("journal_sequence", name="uq_sweeps_journal_sequence"),
    )
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("sweep_id", sa.String(128)))
    op.create_index("ix_runs_sweep_id", "runs", ["sweep_id"])
