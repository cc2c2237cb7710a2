"""Fingerprints of data by a key that all hubs share, the populations that data are bound to, and the runs on them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.drop_table("members")
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
        "bindings",
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("data_id", sa.String(64), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("population", "data_id", name="pk_bindings"),
    )
    op.create_index("ix_bindings_data_id", "bindings", ["data_id"])
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
    op.create_index("ix_data_uses_population", "data_uses", ["population"])
    op.create_index("ix_data_uses_data_id", "data_uses", ["data_id"])
