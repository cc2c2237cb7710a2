"""All tables. Schemas before this one were never released."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "bindings",
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("data_id", sa.String(64), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("population", "data_id", name="pk_bindings"),
    )
    op.create_index("ix_bindings_data_id", "bindings", ["data_id"])
    op.create_table(
        "budgets",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.Column("epsilon", sa.Double()),
        sa.Column("delta", sa.Double(), nullable=False),
        sa.Column("unit", sa.String(16), nullable=False),
        sa.Column("neighbouring", sa.String(32), nullable=False),
        sa.Column("accountant", sa.String(32), nullable=False),
        sa.Column("demonstration", sa.Boolean(), nullable=False),
        sa.Column("set_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("account", name="pk_budgets"),
    )
    op.create_table(
        "data_uses",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("data_id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("units", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "data_id", name="pk_data_uses"),
    )
    op.create_index("ix_data_uses_data_id", "data_uses", ["data_id"])
    op.create_index("ix_data_uses_population", "data_uses", ["population"])
    op.create_table(
        "fingerprint_key",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("home", sa.String(), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_fingerprint_key"),
    )
    op.create_table(
        "fingerprints",
        sa.Column("data_id", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(48), nullable=False),
        sa.Column("client", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("data_id", "digest", name="pk_fingerprints"),
    )
    op.create_index("ix_fingerprints_digest", "fingerprints", ["digest"])
    op.create_table(
        "journal",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("run_id", sa.String(128)),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("signature", sa.String(128), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_journal"),
    )
    op.create_index("ix_journal_run_id_sequence", "journal", ["run_id", "sequence"])
    op.create_table(
        "journal_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_journal_head"),
    )
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
        sa.Column("sweep_id", sa.String(128)),
        sa.Column("digest_key", sa.String(64), nullable=False),
        sa.Column("secret_id", sa.String(32)),
        sa.Column("secret_home", sa.String()),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.UniqueConstraint("journal_sequence", name="uq_runs_journal_sequence"),
    )
    op.create_index("ix_runs_name", "runs", ["name"])
    op.create_index("ix_runs_sweep_id", "runs", ["sweep_id"])
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
    op.create_table(
        "client_states",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("client", sa.String(100), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("blob_key", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_client_states_run_id"),
        sa.PrimaryKeyConstraint("run_id", "client", "round", name="pk_client_states"),
    )
    op.create_table(
        "collections",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("collection", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reserved_at", sa.Double(), nullable=False),
        sa.Column("settled_at", sa.Double()),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_collections_run_id"),
        sa.PrimaryKeyConstraint("run_id", "round", "collection", name="pk_collections"),
        sa.UniqueConstraint("journal_sequence", name="uq_collections_journal_sequence"),
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
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_leases_run_id"),
        sa.PrimaryKeyConstraint("run_id", name="pk_leases"),
    )
    op.create_table(
        "participations",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("client", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("rounds", sa.Integer(), nullable=False),
        sa.Column("last_round", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_participations_run_id"),
        sa.PrimaryKeyConstraint("run_id", "client", name="pk_participations"),
    )
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("collection", sa.Integer(), nullable=False),
        sa.Column("params_digest", sa.String(64), nullable=False),
        sa.Column("state_key", sa.String()),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("withheld", sa.Text(), nullable=False),
        sa.Column("digest_key", sa.String(64), nullable=False),
        sa.Column("committed_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_rounds_run_id"),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_rounds"),
    )
    op.create_table(
        "seals",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("collection", sa.Integer(), nullable=False),
        sa.Column("blob_key", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_seals_run_id"),
        sa.PrimaryKeyConstraint("run_id", "round", name="pk_seals"),
    )
    op.create_table(
        "totals",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("spent", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["budgets.account"], name="fk_totals_account"),
        sa.PrimaryKeyConstraint("account", "run_id", name="pk_totals"),
    )
    op.create_index("ix_totals_run_id", "totals", ["run_id"])
    op.create_table(
        "charges",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("collection", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["budgets.account"], name="fk_charges_account"),
        sa.ForeignKeyConstraint(
            ["run_id", "round", "collection"],
            ["collections.run_id", "collections.round", "collections.collection"],
            name="fk_charges_run_id_round_collection",
        ),
        sa.PrimaryKeyConstraint("run_id", "round", "collection", "account", name="pk_charges"),
    )
    op.create_index("ix_charges_account", "charges", ["account"])
    op.bulk_insert(
        sa.table("journal_head", sa.column("id"), sa.column("rows"), sa.column("hash")),
        [{"id": 1, "rows": 0, "hash": "0" * 64}],
    )
