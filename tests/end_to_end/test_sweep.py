"""`fedrounds sweep`, by the console script: a grid of trainings; killed, stopped, with a cell that fails; in MLflow."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.store import Store
from tests.end_to_end.test_train import Served
from tests.support import HEART, Fedrounds, data_of, missing, prefect, start_fedrounds, wait_until

RATES = ("--over", "training.learning_rate=1e-2,0.1")
DATA = {  # the object of docs/operations.md
    "sweep_id", "name", "state", "over", "cells", "best", "mlflow_run_id", "compare_url", "prefect_flow_run_id",
    "prefect_flow_run_url", "primary_metric",
}  # fmt: skip


def digests(data: dict[str, Any]) -> list[str]:
    return [cell["params_digest"] for cell in data["cells"]]


def mlflow_runs(home: Path, sweep_id: str) -> dict[str, dict[str, str]]:
    """The parent run and those nested in it, by their names: each its tags, its id and its status."""
    with sqlite3.connect(home / "mlflow.db") as database:

        def rows(query: str, *values: str) -> list[tuple[str, ...]]:
            return database.execute(query, values).fetchall()

        (parent,) = rows("select run_uuid from tags where key = 'fedrounds.sweep_id' and value = ?", sweep_id)
        nested = rows("select run_uuid from tags where key = 'mlflow.parentRunId' and value = ?", *parent)
        found = [
            rows("select name, run_uuid, status from runs where run_uuid = ?", *each)[0] for each in [parent, *nested]
        ]
        return {
            name: dict(rows("select key, value from tags where run_uuid = ?", run_id))
            | {"id": run_id, "status": status}  # type: ignore[arg-type]
            for name, run_id, status in found
        }


@pytest.mark.ci
def test_a_grid_is_trained_cell_by_cell_and_nested_in_mlflow(fedrounds: Fedrounds, home: Path) -> None:
    data = data_of(fedrounds("sweep", HEART, *RATES, "--set", "rounds=1", "--sweep-id", "s", "--json"))
    assert data.keys() == DATA
    assert (data["sweep_id"], data["state"]) == ("s", "Completed")
    assert data["over"] == {"training.learning_rate": [0.01, 0.1]}
    assert [(cell["run_id"], cell["values"], cell["state"]) for cell in data["cells"]] == [
        ("s-001", {"training.learning_rate": 0.01}, "Completed"),
        ("s-002", {"training.learning_rate": 0.1}, "Completed"),
    ]
    assert data["primary_metric"] == "auroc"
    reached = {cell["run_id"]: cell["metrics"]["eval/auroc"] for cell in data["cells"]}
    assert reached[data["best"]] == max(reached.values())
    with Store.open(home) as store:
        assert digests(data) == [store.run(run_id).params_digest for run_id in ("s-001", "s-002")]
        assert {run.sweep_id for run in store.runs()} == {"s"}

    shown = mlflow_runs(home, "s")
    assert shown["s"]["id"] == data["mlflow_run_id"]
    assert {run["status"] for run in shown.values()} == {"FINISHED"}
    for name, cell in zip(("training.learning_rate=0.01", "training.learning_rate=0.1"), data["cells"], strict=True):
        assert shown[name]["id"] == cell["mlflow_run_id"]
    assert f"({data['compare_url']})" in shown["s"]["mlflow.note.content"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_killed_in_its_second_cell_goes_on_there(fedrounds: Fedrounds, home: Path) -> None:
    grid = ("sweep", HEART, "--over", "seed=1,2,3", "--set", "rounds=10")
    process = start_fedrounds(home, *grid, "--sweep-id", "s")
    with Store.open(home) as store:

        def in_the_second_cell() -> bool:
            run = store.find_run("s-002")
            return run is not None and run.committed_round >= 3

        wait_until(in_the_second_cell, "three rounds of the second cell")
        process.kill()
        process.wait()
        assert data_of(fedrounds("show", "s", "--json"))["state"] == "Interrupted"
        resumed = data_of(fedrounds("resume", "--json"))  # the latest unfinished run is a cell
        assert (resumed["sweep_id"], resumed["state"]) == ("s", "Completed")
        assert [store.run(cell["run_id"]).attempt for cell in resumed["cells"]] == [1, 2, 1]
        again = data_of(fedrounds(*grid, "--sweep-id", "s", "--json"))
        assert [cell["attempt"] for cell in again["cells"]] == [1, 2, 1]
        assert store.verify_journal().rows > 0
    undisturbed = data_of(fedrounds(*grid, "--sweep-id", "u", "--json"))
    assert digests(resumed) == digests(again) == digests(undisturbed)

    shown = mlflow_runs(home, "s")
    assert {name: run["status"] for name, run in shown.items()} == dict.fromkeys(
        ["s", "seed=1", "seed=2", "seed=3"], "FINISHED"
    )
    with Served(home) as api_url:
        mine = {"flow_runs": {"tags": {"any_": ["sweep:s", "run:s-001", "run:s-002", "run:s-003"]}}}
        states = [run["state_type"] for run in prefect(api_url, "/flow_runs/filter", mine)]
        assert set(states) == {"COMPLETED", "CRASHED"}  # nothing is left "Running"


@pytest.mark.slow
def test_a_cell_that_fails_does_not_stop_the_others(fedrounds: Fedrounds, home: Path) -> None:
    norms = ("--over", "admission.max_update_norm=1e-9,10")  # no update is as short as that
    ended = fedrounds("sweep", HEART, *norms, "--set", "rounds=2", "--sweep-id", "s", "--json")
    assert ended.returncode == 1
    error = json.loads(ended.stdout)["error"]
    assert "1 of the 2 cells" in error["message"]
    assert "s-001 (admission.max_update_norm=1e-09)" in error["message"]
    assert "`fedrounds resume s`" in error["hint"]
    shown = data_of(fedrounds("show", "s", "--json"))
    assert (shown["state"], shown["best"]) == ("Failed", "s-002")
    assert [cell["state"] for cell in shown["cells"]] == ["TooFewClients", "Completed"]
    assert mlflow_runs(home, "s")["s"]["status"] == "FAILED"
    assert fedrounds("resume", "s").returncode == 1
    with Store.open(home) as store:
        assert [store.run(run_id).attempt for run_id in ("s-001", "s-002")] == [2, 1]


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_which_goes_on_at_its_round(fedrounds: Fedrounds, home: Path) -> None:
    process = start_fedrounds(home, "sweep", HEART, "--over", "seed=1,2", "--set", "rounds=12", "--sweep-id", "s")
    with Store.open(home) as store:
        wait_until(lambda: (run := store.find_run("s-001")) is not None and run.committed_round >= 2, "two rounds")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert (store.run("s-001").state, store.find_run("s-002")) == ("Cancelled", None)
        with store.acquire("s-001"):  # as another process that works on it
            refused = fedrounds("resume", "s", "--json")
            assert json.loads(refused.stdout)["error"]["code"] == "lease_held"
    assert "fedrounds resume s\n" in (home.parent / "fedrounds.log").read_text()
    assert mlflow_runs(home, "s")["s"]["status"] == "KILLED"
    resumed = data_of(fedrounds("resume", "s", "--json"))
    assert [(cell["state"], cell["attempt"]) for cell in resumed["cells"]] == [("Completed", 2), ("Completed", 1)]
    assert mlflow_runs(home, "s")["s"]["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.browser
def test_mlflow_opens_with_parallel_coordinates(fedrounds: Fedrounds, home: Path) -> None:
    """The link in the parent run's description leads to axes for the fields that vary and for the primary metric."""
    chromium = shutil.which("chromium") or missing("Chromium is missing")
    from playwright.sync_api import sync_playwright

    grid = (*RATES, "--over", "training.epochs=1,2")
    data = data_of(fedrounds("sweep", HEART, *grid, "--set", "rounds=1", "--sweep-id", "s", "--json"))
    process = start_fedrounds(home, "ui")
    log = home.parent / "fedrounds.log"
    wait_until(lambda: "Ctrl-C" in log.read_text(), "the pages are served")
    try:
        mlflow = next(line.split()[1] for line in log.read_text().splitlines() if line.startswith("MLflow"))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.goto(f"{mlflow}/#/runs/{data['mlflow_run_id']}", wait_until="domcontentloaded")
            link = page.get_by_role("link", name="Compare the cells")
            link.wait_for(timeout=60_000)
            assert link.get_attribute("href") == data["compare_url"]
            page.goto(f"{mlflow}/{data['compare_url']}", wait_until="domcontentloaded")
            page.reload()  # going to another fragment loads nothing
            page.get_by_text("Comparing 4 Runs from 1 Experiment").wait_for(timeout=60_000)
            plot = page.locator(".js-plotly-plot").first
            plot.locator(".axis-title").first.wait_for(timeout=60_000)
            titles = plot.locator(".axis-title").all_text_contents()
            assert titles == ["training.epochs", "training.learning_rate", "eval/auroc"]
            browser.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
