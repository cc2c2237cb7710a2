"""What a training comes to that nothing disturbs. Not in support.py: it imports all that trains."""

from __future__ import annotations

from pathlib import Path

from fedrounds.fl_components.config import FederationConfig
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk


def undisturbed_digest(config: FederationConfig, home: Path) -> str:
    """The params_digest after all rounds, by the stages alone in this process."""
    with (
        Store.open(home, database_url=f"sqlite:///{home}/fedrounds.db", blobs_url=f"{home}/blobs") as store,
        open_run(store, "undisturbed", config=config) as run,
    ):
        for round in range(1, config.rounds + 1):
            walk(stages, run, round)
        return run.refresh().params_digest
