"""What clients spend of the privacy of their own examples."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "example_charges",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("collection", sa.Integer(), nullable=False),
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id", "round", "collection"],
            ["charges.run_id", "charges.round", "charges.collection"],
            name="fk_example_charges_run_id",
        ),
        sa.ForeignKeyConstraint(["population"], ["populations.population"], name="fk_example_charges_population"),
        sa.PrimaryKeyConstraint("run_id", "round", "collection", "population", name="pk_example_charges"),
    )
    op.create_index("ix_example_charges_population", "example_charges", ["population"])
    op.create_table(
        "example_spending",
        sa.Column("run_id", sa.String(128), nullable=False),
        sa.Column("population", sa.String(), nullable=False),
        sa.Column("spent", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_example_spending_run_id"),
        sa.ForeignKeyConstraint(["population"], ["populations.population"], name="fk_example_spending_population"),
        sa.PrimaryKeyConstraint("run_id", "population", name="pk_example_spending"),
    )
