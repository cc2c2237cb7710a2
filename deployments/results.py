"""The data of runs and sweeps, as `--json` and the Python interface return them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import (
    RoundRecord,
    RunRecord,
    Store,
    SweepRecord,
)

if TYPE_CHECKING:
    from fedrounds.fl_components.reports import ClaimReport


MEANING: Final = ("delta", "unit", "neighbouring", "accountant", "demonstration")
"""What gives an epsilon its meaning."""


CELL_FIELDS = ("state", "rounds", "committed_round", "attempt", "metrics", "params_digest", "mlflow_run_id", "error")


SHOWN_FIELDS = ("mlflow_run_id", "compare_url", "prefect_flow_run_id", "prefect_flow_run_url")


LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
"""Of a primary metric that rises towards 1, for the simulated seconds until it is reached."""


STAGES = (
    "load",
    "broadcast",
    "select",
    "authorise",
    "train",
    "compress",
    "admit",
    "aggregate",
    "server_step",
    "evaluate",
)


def run_data(store: Store, run: RunRecord) -> dict[str, Any]:
    """Return what `train --json` and `show --json` say of a run."""
    rounds = store.rounds(run.run_id)
    return run_summary(store, run, rounds) | {
        "privacy": _privacy(store, run, rounds),
        "communication": _communication(rounds, run),
        "seconds": {stage: sum(row.result["seconds"].get(stage, 0.0) for row in rounds) for stage in STAGES}
        if all(row.result["seconds"] for row in rounds)
        else None,  # withheld
        "peak_memory_mb": max(
            (row.result["metrics"]["memory/peak_mb"] for row in rounds if "memory/peak_mb" in row.result["metrics"]),
            default=None,  # also where it is withheld
        ),
    }


def _privacy(store: Store, run: RunRecord, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """Return the run's epsilon as of its last round, with all that gives it a meaning.

    About the first claim, and about a second one beside it.
    """
    from fedrounds.fl_components.reports import privacy_report

    metrics = rounds[-1].result["metrics"] if rounds else {}
    found = []
    for each in privacy_report(store, run).claims:
        known = each.metrics
        if run.state != RunState.DELETED:  # of a deleted run only the ledger is left
            known = {name: metrics[name] for name in known if name in metrics}
        epsilon = known.get("privacy/epsilon" if each.terms.unit == "client" else "privacy/example/epsilon")
        if epsilon is not None:
            found.append(_claim(store, run, each, epsilon, rounds))
    names = ("epsilon", "epsilon_tightest", *MEANING, "clients", "left_out")
    return {**(found[0] if found else dict.fromkeys(names)), "examples": found[1] if len(found) > 1 else None}


def _claim(
    store: Store, run: RunRecord, report: ClaimReport, epsilon: float, rounds: Sequence[RoundRecord]
) -> dict[str, Any]:
    """Return what one claim has cost; where each client pays, `epsilon` is the largest of any client's."""
    from fedrounds.fl_components.reports import tightest_epsilon
    from fedrounds.fl_components.reports.statement import left_out

    by_client = report.account.is_template
    spent = {} if by_client else store.ledger.spent(run.run_id)
    return {
        "epsilon": epsilon,
        "epsilon_tightest": None if by_client else tightest_epsilon(report.terms, spent[report.account]),
        **{name: getattr(report.terms, name) for name in MEANING},
        "clients": None if report.clients is None else {name: each.epsilon for name, each in report.clients.items()},
        "left_out": left_out(rounds) if by_client else None,
    }


def _communication(rounds: Sequence[RoundRecord], run: RunRecord) -> dict[str, Any]:
    """Sums over the rounds; None where they are withheld.

    With a simulated network its seconds as well, and after how many of them the primary metric first reached each
    level, where a higher one is better.
    """
    metrics = [row.result["metrics"] for row in rounds]
    found: dict[str, Any] = {}
    for name in ("upload_bytes", "download_bytes"):
        values = [each.get(f"communication/{name}") for each in metrics]
        found[name] = None if None in values else int(sum(values))
    seconds = [each.get("communication/simulated_s") for each in metrics]
    if not seconds or None in seconds:
        return found
    from fedrounds.tasks.tracking.results import PrimaryMetric

    passed, primary = list(accumulate(seconds)), PrimaryMetric.of(run.config)
    reached = {
        str(level): next(
            (s for s, each in zip(passed, metrics, strict=True) if each.get(primary.key, 0) >= level), None
        )
        for level in (LEVELS if primary.higher_is_better else ())
    }
    found["simulated_s"] = passed[-1]
    found["simulated_s_to_primary"] = {level: s for level, s in reached.items() if s is not None}
    return found


def sweep_data(
    store: Store, sweep: SweepRecord, shown: Mapping[str, str | None] = MappingProxyType({})
) -> dict[str, Any]:
    """A sweep as people and programs are told of it (`sweep --json`).

    `shown` says where it is in Prefect and MLflow, which only the process that trains it knows.
    """
    from fedrounds.tasks.tracking.results import PrimaryMetric, recent_rounds
    from fedrounds.tasks.tracking.sweep_view import best_cell, sweep_state

    runs = {run.run_id: run for run in store.runs(sweep_id=sweep.sweep_id, deleted=True)}
    primary = PrimaryMetric.common(runs.values())
    cells: list[dict[str, Any]] = []
    for run_id, values in sweep.cells.items():
        run = runs.get(run_id)
        if run is None:
            cells.append(
                {"run_id": run_id, "values": values, "state": RunState.PENDING, "metrics": {}, "params_digest": None}
            )
            continue
        summary = run_summary(store, run, recent_rounds(store, run))
        cells.append({"run_id": run_id, "values": values, **{name: summary[name] for name in CELL_FIELDS}})
    return {
        "sweep_id": sweep.sweep_id,
        "name": sweep.name,
        "state": sweep_state(cell["state"] for cell in cells),
        "over": dict(sweep.over),
        "cells": cells,
        "primary_metric": primary.name if primary else None,
        "best": best_cell(
            {cell["run_id"]: cell["metrics"].get(primary.key) for cell in cells} if primary else {}, primary
        ),
        **{name: shown.get(name) for name in SHOWN_FIELDS},
    }


def run_summary(store: Store, run: RunRecord, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """What `runs` lists of a run. `rounds` are its last ones: as far back as an evaluation."""
    from fedrounds.tasks.tracking.results import evaluated
    from fedrounds.tasks.tracking.server import run_url, tracking_uri

    last: dict[str, float] = rounds[-1].result["metrics"] if rounds else {}
    latest = {name: value for name, value in last.items() if not name.startswith("eval/")}
    latest |= {name: value for name, value in evaluated(rounds).items() if name.startswith("eval/")}
    prefix = "eval/baseline/"
    flow_run = run.prefect_flow_runs[-1] if run.prefect_flow_runs else {"id": None, "url": None}

    uri = tracking_uri(store.home)
    return {
        "run_id": run.run_id,
        "name": run.name,
        "population": run.population,
        "state": _state(store, run),
        "rounds": run.rounds,
        "committed_round": run.committed_round,
        "attempt": run.attempt,
        "params_digest": run.params_digest,
        "ancestor": run.ancestor,
        "data": _data_of(run),
        "duration_s": run.updated_at - run.created_at or None,  # None: nothing has been written since
        "created_at": run.created_at,
        "updated_at": run.updated_at,
        "primary_metric": run.config["evaluation"]["primary"],
        "metrics": {name: value for name, value in latest.items() if not name.startswith(prefix)},
        "baselines": {name.removeprefix(prefix): value for name, value in latest.items() if name.startswith(prefix)},
        "mlflow_run_id": run.mlflow_run_id,
        "mlflow_run_url": run_url(uri, run.mlflow_run_id) if run.mlflow_run_id else None,
        "model_uri": run.model_uri,
        "prefect_flow_run_id": flow_run["id"],
        "prefect_flow_run_url": flow_run["url"],
        "error": run.error,
    }


def _data_of(run: RunRecord) -> dict[str, Any]:
    """What the run is trained on: the data kind, and the folder or the function that the configuration names."""
    data = run.config["data"]
    return {"kind": data["kind"], "source": data.get("folder") or data.get("path")}


def _state(store: Store, run: RunRecord) -> RunState:
    """Return the run's state; interrupted when its process died, which could not write that down."""
    died = run.state == RunState.RUNNING and not store.is_held(run.run_id)
    return RunState.INTERRUPTED if died else run.state
