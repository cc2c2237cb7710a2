"""One training as MLflow shows it: one run, a step per round."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fedrounds.fl_components.reports.statement import in_short, markdown, statement
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Lease, RoundRecord, RunRecord, Store, cell_name
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.results import PrimaryMetric
from fedrounds.tasks.tracking.sweep_view import CREATED_TAG, PARENT_TAG, show_sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Run

MLFLOW_STATUS: Final = {
    RunState.COMPLETED: "FINISHED",
    RunState.BUDGET_EXHAUSTED: "FINISHED",
    RunState.FAILED: "FAILED",
    RunState.TOO_FEW_CLIENTS: "FAILED",
    RunState.CANCELLED: "KILLED",
}
"""MLflow's status for each final state."""

ANCHOR_TAG: Final = "fedrounds.journal"
"""How many rows the journal had when the run ended, and the hash of the last."""

RUN_ID_TAG: Final = "fedrounds.run_id"

# MLflow's limits.
_MAX_METRICS = 1000
_MAX_KEY_LENGTH = 250
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 8000
_MAX_NAME_LENGTH = 250


class DeletedInMlflow(Exception):
    """The user deleted this run or its experiment in MLflow. It is theirs to restore, not ours."""


class RunView:
    """The MLflow run that shows one training, found or made, and opened.

    It is found by the tag `fedrounds.run_id` before one is made: a process killed between making it and noting its id
    in the store must not make a second. A run that only shares the id (another store's) is told apart by the time at
    which it was created. A view is the only writer of its MLflow run, because it needs the run's lease.

    `log_rounds` moves the cursor after each batch. Logging the same values again adds no row in MLflow, so a process
    killed between the two logs nothing twice.

    The run of a sweep's cell is nested in the sweep's run, which is brought up to date when the view opens and closes.
    """

    def __init__(self, client: MlflowClient, uri: str, store: Store, lease: Lease) -> None:
        self.client, self.store, self.lease = client, store, lease
        run = store.run(lease.run_id)
        self._sweep = store.sweep(run.sweep_id) if run.sweep_id is not None else None
        shown = self._find_or_create(run, server.artifact_location(uri, store.home))
        self.mlflow_run_id: str = shown.info.run_id
        self.experiment_id: str = shown.info.experiment_id
        self.cursor = run.tracked_round if self.mlflow_run_id == run.mlflow_run_id else 0
        lease.note(mlflow_run_id=self.mlflow_run_id, tracked_round=self.cursor)
        self._primary = PrimaryMetric.of(run.config)
        earlier = store.rounds(run.run_id) if self.cursor else []
        self._best = self._primary.best(
            _value(record, self._primary) for record in earlier if record.round <= self.cursor
        )
        self._log_configuration(run)
        if not run.state.is_final and shown.info.status != "RUNNING":
            client.update_run(self.mlflow_run_id, status="RUNNING")  # a resume
        if self._sweep is not None:
            self.tag(PARENT_TAG, show_sweep(client, store, self._sweep, self.experiment_id))

    def log_rounds(self) -> int:
        """Log the rounds committed since the cursor, and move it; how many they were."""
        first = self.cursor
        best = self._best
        for batch in _batches(self.store.rounds(self.lease.run_id, after=self.cursor)):
            metrics: list[Metric] = []
            for each in batch:
                value = _value(each, self._primary)
                best = self._primary.best([value] if best is None else [value, best])
                metrics += _metrics(each, self._primary, best)
            self.client.log_batch(self.mlflow_run_id, metrics=metrics)
            self.lease.note(tracked_round=batch[-1].round)
            self.cursor, self._best = batch[-1].round, best
            self._anchor()
        return self.cursor - first

    def tag(self, key: str, value: str) -> None:
        self.client.set_tag(self.mlflow_run_id, key, _cut(value, _MAX_TAG_LENGTH))

    def state_privacy(self) -> None:
        """Attach the privacy statement."""
        found = statement(self.store, self.store.run(self.lease.run_id))
        self.tag("privacy", in_short(found))
        self.client.log_text(self.mlflow_run_id, markdown(found), "privacy_statement.md")

    def close(self) -> None:
        """End the MLflow run as the training ended, at the time at which it did. `LeaseLost` if it is another's now."""
        self.lease.note()
        run = self.store.run(self.lease.run_id)
        self._anchor()
        self.tag("state", run.state.value)
        self.client.set_terminated(
            self.mlflow_run_id, status=MLFLOW_STATUS[run.state], end_time=_milliseconds(run.updated_at)
        )
        if self._sweep is not None:
            show_sweep(self.client, self.store, self._sweep, self.experiment_id)

    def _anchor(self) -> None:
        """Remember the journal's head in MLflow and in the home: a store that was restored will not have it."""
        head = self.store.anchor()
        self.tag(ANCHOR_TAG, f"{head.rows} {head.head} {self.store.keys.signing.id}")

    def _find_or_create(self, run: RunRecord, artifacts: str | None) -> Run:
        if run.mlflow_run_id is not None:
            try:
                shown = self.client.get_run(run.mlflow_run_id)
            except Exception as error:
                if not server.is_missing(error):
                    raise  # else: another MLflow than before; it gets all rounds
            else:
                if shown.info.lifecycle_stage == "deleted":
                    _refuse_deleted_experiment(self.client.get_experiment(shown.info.experiment_id))
                    raise DeletedInMlflow(
                        f"run {shown.info.run_id} was deleted there; bring it back with: "
                        f"mlflow runs restore --run-id {shown.info.run_id}"
                    )
                return shown
        experiment_id = experiment_of(self.client, run.name, artifacts)
        candidates = self.client.search_runs([experiment_id], filter_string=f"tags.`{RUN_ID_TAG}` = '{run.run_id}'")
        for shown in candidates:
            if shown.data.tags.get(CREATED_TAG) == repr(run.created_at):
                return shown
        name = run.run_id if self._sweep is None else cell_name(self._sweep.cells[run.run_id])
        return self.client.create_run(
            experiment_id,
            start_time=_milliseconds(run.created_at),
            tags={RUN_ID_TAG: run.run_id, CREATED_TAG: repr(run.created_at)},
            run_name=_cut(name, _MAX_NAME_LENGTH),
        )

    def _log_configuration(self, run: RunRecord) -> None:
        """Parameters and tags. At every opening, as a killed process may not have; equal values change nothing."""
        from mlflow.entities import Param, RunTag

        params = {metric_key(key): _cut(value, _MAX_PARAM_LENGTH) for key, value in flatten_config(run.config)}
        flow_runs = run.prefect_flow_runs
        tags = {
            "config_digest": run.config_digest[:12],
            "population": run.population,
            "state": run.state,
            "ancestor": run.ancestor,
            "prefect.flow_run_id": ", ".join(each["id"] for each in flow_runs),
            "prefect.flow_run_url": ", ".join(each["url"] for each in flow_runs if each.get("url")),
        }
        self.client.log_batch(
            self.mlflow_run_id,
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, _cut(value, _MAX_TAG_LENGTH)) for key, value in tags.items() if value],
        )


def experiment_of(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of the experiment of that name, made where there is none. Raises `DeletedInMlflow`."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another process made it just now
            if experiment is None:
                raise
    _refuse_deleted_experiment(experiment)
    return str(experiment.experiment_id)


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a configuration, dotted. A list of plain values is one leaf.

    >>> dict(flatten_config({"rounds": 3, "model": {"kind": "mlp", "hidden": [64, 32], "dropout": None}}))
    {'rounds': '3', 'model.kind': 'mlp', 'model.hidden': '[64, 32]', 'model.dropout': 'null'}
    """
    for key, value in config.items():
        if isinstance(value, list) and any(isinstance(each, (Mapping, list)) for each in value):
            value = {str(index): each for index, each in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from flatten_config(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def metric_key(name: str) -> str:
    """`name`, or where MLflow would refuse it, a like one that no other name gets.

    >>> metric_key("eval/accuracy"), metric_key("eval/client/Zürich #2/accuracy")
    ('eval/accuracy', 'eval/client/Zürich _2/accuracy-2d32')
    """
    fits = re.fullmatch(r"[/\w.\- :]+", name) and len(name) <= _MAX_KEY_LENGTH
    if fits and posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != ".":
        return name
    safe = posixpath.normpath(re.sub(r"[^/\w.\- :]|\.\.", "_", name)).strip("/")
    return f"{safe[: _MAX_KEY_LENGTH - 5]}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"


def _refuse_deleted_experiment(experiment: Experiment) -> None:
    if experiment.lifecycle_stage == "deleted":
        raise DeletedInMlflow(
            f"the experiment {experiment.name!r} was deleted there; bring it back with: "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )


def _metrics(record: RoundRecord, primary: PrimaryMetric, best: float | None) -> list[Metric]:
    from mlflow.entities import Metric

    values = dict(record.result.get("metrics", {}))
    if values.get(primary.key) is not None:
        # First, as MLflow's page that compares runs opens with the metric that it got first; and the best so far, as
        # its table of runs shows only the last step.
        values = {primary.key: values[primary.key], **values, f"best/{primary.name}": best}
    at = _milliseconds(record.committed_at)
    return [
        Metric(metric_key(name), float(value), at, record.round)
        for name, value in values.items()
        if isinstance(value, (int, float))  # not None: a value that is withheld
    ]


def _batches(rounds: Sequence[RoundRecord]) -> Iterator[list[RoundRecord]]:
    """Rounds in as few calls as MLflow's limit allows; one round that exceeds it the client cuts."""
    batch: list[RoundRecord] = []
    size = 0
    for each in rounds:
        count = len(each.result.get("metrics", {})) + 1
        if batch and size + count > _MAX_METRICS:
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += count
    if batch:
        yield batch


def _value(record: RoundRecord, primary: PrimaryMetric) -> float:
    """The primary metric of a round; NaN where it was not evaluated, or is withheld."""
    value = record.result.get("metrics", {}).get(primary.key)
    return math.nan if value is None else float(value)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _cut(value: str, limit: int) -> str:
    mark = f"... (cut; {len(value)} characters)"
    return value if len(value) <= limit else value[: limit - len(mark)] + mark
