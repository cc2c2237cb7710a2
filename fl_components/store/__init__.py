"""Durable state: records in SQLite or PostgreSQL, blobs in a folder or object store, a lease, a journal.

The store decides what resumes; Prefect and MLflow are views of it.
"""

from __future__ import annotations

from fl_components.store.bindings import DataUse, Owners
from fl_components.store.home import home
from fl_components.store.lease import Lease
from fl_components.store.records import (
    FINAL_STATES,
    FINISHED_STATES,
    Anchor,
    Budget,
    BudgetTerms,
    ChargeRecord,
    ExampleCharges,
    JournalReport,
    JournalRow,
    RoundRecord,
    RunRecord,
    Seal,
    SweepRecord,
    cell_name,
)
from fl_components.store.sealing import closed, opened
from fl_components.store.secrets import RunSecret, derived_key
from fl_components.store.store import Store, check_run_id

__all__ = [
    "FINAL_STATES",
    "FINISHED_STATES",
    "Anchor",
    "Budget",
    "BudgetTerms",
    "ChargeRecord",
    "DataUse",
    "ExampleCharges",
    "JournalReport",
    "JournalRow",
    "Lease",
    "Owners",
    "RoundRecord",
    "RunRecord",
    "RunSecret",
    "Seal",
    "Store",
    "SweepRecord",
    "cell_name",
    "check_run_id",
    "closed",
    "derived_key",
    "home",
    "opened",
]
