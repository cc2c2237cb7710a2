"""What MLflow and Prefect show of a run, which a resume compares with the journal."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fedrounds.fl_components.store import Store
from fedrounds.tasks.anchors import anchor_line, page_key, sightings
from fedrounds.tasks.tracking.run_view import RunView
from fedrounds.tasks.tracking.server import tracking_uri
from tests.tasks.test_tracking import client, commit, make_run


class Pages:
    """The part of Prefect's client that is asked: pages by their key."""

    def __init__(self, **pages: str) -> None:
        self._pages = {page_key(run_id): text for run_id, text in pages.items()}

    def read_artifacts(self, artifact_filter: Any, **_: Any) -> list[Any]:
        keys = artifact_filter.key.any_
        return [SimpleNamespace(key=key, data=text) for key, text in self._pages.items() if key in keys]


def test_a_run_is_seen_with_its_last_round_and_an_anchor(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(store, rounds=5)
    with store.acquire("r1") as lease:
        for n in (1, 2, 3):
            commit(lease, n, **{"privacy/epsilon": 0.5 * n})
        RunView(client(store), tracking_uri(store.home), store, lease).log_rounds()
    head, run = store.journal_head(), store.run("r1")
    page = f"# digits / r1\n\n**2 of 5 rounds** committed, attempt 1.\n\n{anchor_line(store)}"
    found, problems = sightings(Pages(r1=page, r2=page), store, run)  # type: ignore[arg-type]
    assert problems == []
    assert {(each.where.partition(" ")[0], each.round) for each in found} == {("Prefect", 2), ("MLflow", 3)}
    assert {(each.anchor.rows, each.anchor.head) for each in found if each.anchor} == {(head.rows, head.head)}
    assert store.lost([each.anchor for each in found if each.anchor is not None]) == []

    # Another store's run of the same id, and pages of other hubs, are not this run's.
    foreign = page.replace(store.keys.signing.id, "0" * 16)
    assert sightings(Pages(r1=foreign), store, replace(run, created_at=1.0)) == ([], [])  # type: ignore[arg-type]

    # What is away is named, and stops nothing.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.home}/nowhere/mlflow.db")
    found, problems = sightings(Pages(r1=page), store, run)  # type: ignore[arg-type]
    assert [each.where.partition(" ")[0] for each in found] == ["Prefect"]
