"""Durable state: records in SQLite or PostgreSQL, blobs in a folder or object store, a lease, a journal.

The store decides what resumes; Prefect and MLflow are views of it.
"""

from __future__ import annotations

from fedrounds.fl_components.store.home import home
from fedrounds.fl_components.store.lease import Lease, fresh_collection
from fedrounds.fl_components.store.membership import DataUse, Owners
from fedrounds.fl_components.store.records import (
    Anchor,
    Budget,
    BudgetTerms,
    ChargeRecord,
    Charges,
    CollectionRecord,
    JournalReport,
    JournalRow,
    RoundRecord,
    RunRecord,
    Seal,
    Sighting,
    SweepRecord,
    can_never_continue,
    cell_name,
    is_unfinished,
)
from fedrounds.fl_components.store.sealing import closed, opened
from fedrounds.fl_components.store.secrets import RunSecret, destroy_secrets, last_seen, place_of_secrets
from fedrounds.fl_components.store.store import Store, check_run_id, check_sweep_id

__all__ = [
    "Anchor",
    "Budget",
    "BudgetTerms",
    "ChargeRecord",
    "Charges",
    "CollectionRecord",
    "DataUse",
    "JournalReport",
    "JournalRow",
    "Lease",
    "Owners",
    "RoundRecord",
    "RunRecord",
    "RunSecret",
    "Seal",
    "Sighting",
    "Store",
    "SweepRecord",
    "can_never_continue",
    "cell_name",
    "check_run_id",
    "check_sweep_id",
    "closed",
    "destroy_secrets",
    "fresh_collection",
    "home",
    "is_unfinished",
    "last_seen",
    "opened",
    "place_of_secrets",
]
