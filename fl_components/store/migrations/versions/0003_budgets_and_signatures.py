"""Budgets of populations, what a claim withholds, and a journal whose rows are signed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from fedrounds.fl_components.errors import StoreError

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "populations",
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.Column("epsilon", sa.Double()),
        sa.Column("delta", sa.Double(), nullable=False),
        sa.Column("unit", sa.String(16), nullable=False),
        sa.Column("neighbouring", sa.String(32), nullable=False),
        sa.Column("accountant", sa.String(32), nullable=False),
        sa.Column("demonstration", sa.Boolean(), nullable=False),
        sa.Column("spent", sa.Text(), nullable=False),
        sa.Column("set_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("population", name="pk_populations"),
    )
    op.create_table(
        "members",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("journal_sequence", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["population"], ["populations.population"], name="fk_members_population_populations"),
        sa.PrimaryKeyConstraint("digest", name="pk_members"),
    )
    op.create_index("ix_members_population", "members", ["population"])
    with op.batch_alter_table("runs") as runs:
        runs.add_column(sa.Column("spent", sa.Text(), nullable=False, server_default="[]"))
        runs.alter_column("spent", server_default=None)
    with op.batch_alter_table("rounds") as rounds:
        rounds.add_column(sa.Column("withheld", sa.Text(), nullable=False, server_default="{}"))
        rounds.alter_column("withheld", server_default=None)
    if op.get_bind().execute(sa.text("SELECT rows FROM journal_head")).scalar():
        raise StoreError(
            "the store's journal was begun without signatures, by a version that was never released",
            hint="begin with another FEDROUNDS_HOME or database",
        )
    with op.batch_alter_table("journal") as journal:
        journal.add_column(sa.Column("key_id", sa.String(16), nullable=False))
        journal.add_column(sa.Column("signature", sa.String(128), nullable=False))
