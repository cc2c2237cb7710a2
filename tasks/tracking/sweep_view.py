"""A sweep as MLflow shows it: one parent run above the cells' runs, whose description leads to their comparison.

MLflow's page that compares runs opens with parallel coordinates: an axis for each parameter that varies, and one for a
metric.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import RunRecord, Store, SweepRecord
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.results import PrimaryMetric, evaluated, recent_rounds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SWEEP_ID_TAG: Final = "fedrounds.sweep_id"
PARENT_TAG: Final = "mlflow.parentRunId"
CREATED_TAG: Final = "fedrounds.created_at"
MLFLOW_STATUS: Final = {RunState.COMPLETED: "FINISHED", RunState.FAILED: "FAILED", RunState.CANCELLED: "KILLED"}
"""MLflow's status for each final state of a sweep."""

MAX_COMPARED: Final = 100
"""How many cells a link compares: more lines cannot be told apart, and a description ends somewhere."""
MAX_DESCRIPTION: Final = 7500
"""Characters; MLflow takes 8000."""


def show_sweep(
    client: MlflowClient, store: Store, sweep: SweepRecord, experiment_id: str, state: RunState | None = None
) -> str:
    """Bring the parent run in line with the store, making it where there is none; returns its id.

    `state` is the sweep's; by default what its cells' states come to.
    """
    runs = {run.run_id: run for run in store.runs(sweep_id=sweep.sweep_id)}
    state = state or sweep_state(runs[cell].state if cell in runs else RunState.PENDING for cell in sweep.cells)
    parent = _find_or_create(client, sweep, experiment_id)
    mlflow_run_id: str = parent.info.run_id
    client.set_tag(mlflow_run_id, "mlflow.note.content", _description(store, sweep, runs, state, experiment_id))
    status = MLFLOW_STATUS.get(state, "RUNNING")
    if status != "RUNNING":
        ended_at = max((run.updated_at for run in runs.values()), default=sweep.created_at)
        client.set_terminated(mlflow_run_id, status=status, end_time=round(ended_at * 1000))
    elif parent.info.status != "RUNNING":
        client.update_run(mlflow_run_id, status="RUNNING")  # a resume
    return mlflow_run_id


def end_sweep(store: Store, sweep: SweepRecord, state: RunState, say: Callable[[str], None]) -> dict[str, str | None]:
    """Close the parent run; where to look: `mlflow_run_id` and `compare_url`, None where MLflow does not say.

    The address is that of a page below MLflow's where MLflow is a database, which somebody has to serve.

    MLflow being down does not fail a sweep: the next resume, or a cell that is written late, closes it.
    """
    found: dict[str, str | None] = {"mlflow_run_id": None, "compare_url": None}
    uri = server.tracking_uri(store.home)
    with server.quiet():
        try:
            client = server.connect(uri)
            experiment = client.get_experiment_by_name(sweep.name)
            if experiment is not None and experiment.lifecycle_stage == "active":
                found["mlflow_run_id"] = show_sweep(client, store, sweep, experiment.experiment_id, state)
                page = compare_page(experiment.experiment_id, _compared(store.runs(sweep_id=sweep.sweep_id)))
                found["compare_url"] = server.page_url(uri, page) or page
        except Exception as error:
            say(
                f"MLflow at {server.public_uri(uri)} does not show the end of the sweep ({server.reason(error)}); "
                f"`fedrounds resume {sweep.sweep_id}` writes it when it is back"
            )
    return found


def compare_page(experiment_id: str, mlflow_run_ids: list[str]) -> str:
    """MLflow's page that compares these runs, below the address of its server.

    >>> compare_page("1", ["a", "b"])
    '#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%221%22%5D'
    """
    runs, experiments = (
        quote(json.dumps(ids, separators=(",", ":"))) for ids in (mlflow_run_ids[:MAX_COMPARED], [experiment_id])
    )
    return f"#/compare-runs?runs={runs}&experiments={experiments}"


def sweep_state(cells: Iterable[RunState]) -> RunState:
    """Return the state of a sweep whose cells are in these states.

    >>> [sweep_state(map(RunState, cells)) for cells in (["Completed", "TooFewClients"], ["Completed", "Pending"])]
    [<RunState.FAILED: 'Failed'>, <RunState.INTERRUPTED: 'Interrupted'>]
    """
    states = set(cells)
    if all(state.is_finished for state in states):
        return RunState.COMPLETED
    if states == {RunState.PENDING}:
        return RunState.PENDING
    for state in (RunState.RUNNING, RunState.CANCELLED, RunState.INTERRUPTED):
        if state in states:
            return state
    return RunState.INTERRUPTED if RunState.PENDING in states else RunState.FAILED


def best_cell(values: Mapping[str, float | None], primary: PrimaryMetric | None) -> str | None:
    """Return the cell with the best value of the primary metric, the first of equals; None when none has one.

    >>> accuracy, mse = PrimaryMetric("accuracy", higher_is_better=True), PrimaryMetric("mse", higher_is_better=False)
    >>> values = {"s-001": 0.7, "s-002": None, "s-003": 0.8}
    >>> best_cell(values, accuracy), best_cell(values, mse), best_cell({"s-001": None}, accuracy)
    ('s-003', 's-001', None)
    """
    if primary is None:
        return None
    known = {cell: value for cell, value in values.items() if value is not None and math.isfinite(value)}
    best = primary.best(known.values())
    return next((cell for cell, value in known.items() if value == best), None)


def _find_or_create(client: MlflowClient, sweep: SweepRecord, experiment_id: str) -> Run:
    for parent in client.search_runs([experiment_id], filter_string=f"tags.`{SWEEP_ID_TAG}` = '{sweep.sweep_id}'"):
        if parent.data.tags.get(CREATED_TAG) == repr(sweep.created_at):  # else another store's sweep
            return parent
    return client.create_run(
        experiment_id,
        start_time=round(sweep.created_at * 1000),
        tags={SWEEP_ID_TAG: sweep.sweep_id, CREATED_TAG: repr(sweep.created_at)},
        run_name=sweep.sweep_id,
    )


def _description(
    store: Store, sweep: SweepRecord, runs: Mapping[str, RunRecord], state: str, experiment_id: str
) -> str:
    """Markdown: what varies, the way to the comparison, and the cells."""
    fields = [field for field, _ in sweep.over]
    primary = PrimaryMetric.common(runs.values())
    values_of = {
        cell: evaluated(recent_rounds(store, runs[cell])).get(primary.key)
        for cell in sweep.cells
        if cell in runs and primary is not None
    }
    best = best_cell(values_of, primary)
    lines = [f"Sweep `{sweep.sweep_id}` over {', '.join(f'`{field}`' for field in fields)}: {state}.", ""]
    compared = _compared(runs.values())
    if len(compared) > 1:
        lines += [f"[Compare the cells: parallel coordinates]({compare_page(experiment_id, compared)})", ""]
    lines += [
        f"| cell | {' | '.join(fields)} | state | {primary.name if primary else ''} |",
        f"|---|{'---|' * len(fields)}---|---:|",
    ]
    room = MAX_DESCRIPTION - sum(len(line) + 1 for line in lines)
    for number, (cell, values) in enumerate(sweep.cells.items()):
        value = values_of.get(cell)
        shown = "" if value is None else f"**{value:.4f}**" if cell == best else f"{value:.4f}"
        words = [_cell(values[field]) for field in fields]
        line = f"| {cell} | {' | '.join(words)} | {runs[cell].state if cell in runs else RunState.PENDING} | {shown} |"
        room -= len(line) + 1
        if room < 0:
            lines += ["", f"And {len(sweep.cells) - number} more; the best so far is {best or 'none'}."]
            break
        lines.append(line)
    return "\n".join(lines)


def _compared(runs: Iterable[RunRecord]) -> list[str]:
    """The MLflow runs of the cells, in the grid's order."""
    return [run.mlflow_run_id for run in sorted(runs, key=lambda run: run.run_id) if run.mlflow_run_id is not None]


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return (text if len(text) <= 60 else text[:57] + "...").replace("|", "\\|")
