"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("committed_round", sa.Integer(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("config_digest", sa.String(64), nullable=False),
        sa.Column("params_digest", sa.String(64), nullable=False),
        sa.Column("ancestor", sa.String()),
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("source_folder", sa.String(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("initial_state_key", sa.String(), nullable=False),
        sa.Column("mlflow_run_id", sa.String()),
        sa.Column("tracked_round", sa.Integer(), nullable=False),
        sa.Column("model_uri", sa.String()),
        sa.Column("prefect_flow_runs", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.UniqueConstraint("journal_sequence", name="uq_runs_journal_sequence"),
    )
    op.create_index("ix_runs_name", "runs", ["name"])
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("collection", sa.Integer(), nullable=False),
        sa.Column("params_digest", sa.String(64), nullable=False),
        sa.Column("state_key", sa.String()),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("committed_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_rounds_run_id"),
    )
    op.create_table(
        "charges",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("collection", sa.Integer(), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reserved_at", sa.Double(), nullable=False),
        sa.Column("settled_at", sa.Double()),
        sa.PrimaryKeyConstraint("run_id", "round", "collection", name="pk_charges"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_charges_run_id"),
        sa.UniqueConstraint("journal_sequence", name="uq_charges_journal_sequence"),
    )
    op.create_index("ix_charges_population", "charges", ["population"])
    op.create_table(
        "seals",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("collection", sa.Integer(), nullable=False),
        sa.Column("blob_key", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_seals"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_seals_run_id"),
    )
    op.create_table(
        "leases",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("host", sa.String()),
        sa.Column("boot_id", sa.String()),
        sa.Column("pid_namespace", sa.String()),
        sa.Column("pid", sa.Integer()),
        sa.Column("process_started_s", sa.Double()),
        sa.Column("heartbeat_at", sa.Double()),
        sa.Column("lapse_s", sa.Double()),
        sa.PrimaryKeyConstraint("run_id", name="pk_leases"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_leases_run_id"),
    )
    op.create_table(
        "journal",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("run_id", sa.String(128)),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_journal"),
    )
    op.create_index("ix_journal_run_id_sequence", "journal", ["run_id", "sequence"])
    head = op.create_table(
        "journal_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_journal_head"),
    )
    op.bulk_insert(head, [{"id": 1, "rows": 0, "hash": "0" * 64}])
