"""fedrounds from Python: the functions behind the commands. They return plain data and raise the tree of errors.py.

    from fedrounds.deployments.api import train
    data = train("examples/heart_disease.yaml", overrides=["rounds=5"])
    data["metrics"]["eval/accuracy"]

All may be called where an event loop is running (a notebook): the work is then done in a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fedrounds.fl_components.errors import ConfigError, RunNotFound
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import (
    RoundRecord,
    RunRecord,
    Store,
    SweepRecord,
    check_run_id,
    check_sweep_id,
)

if TYPE_CHECKING:
    from fedrounds.deployments.stack.connection import Connection
    from fedrounds.fl_components.config import FederationConfig
    from fedrounds.fl_components.reports import ClaimReport
    from fedrounds.tasks.progress import Progress
    from fedrounds.tasks.session import Session
    from fedrounds.tasks.sweep import SweepSession

MEANING: Final = ("delta", "unit", "neighbouring", "accountant", "demonstration")
"""What gives an epsilon its meaning."""

T = TypeVar("T")
OnProgress = Callable[["Progress"], None]

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


def train(
    config: str | Path | Mapping[str, Any] | FederationConfig,
    *,
    overrides: Sequence[str] = (),
    run_id: str | None = None,
    on_progress: OnProgress | None = None,
    profile: str | Path | None = None,
) -> dict[str, Any]:
    """Train a model; with the `run_id` of a run that exists and an equal configuration, go on with it.

    Args:
        config: the path of a configuration file, its fields as a tree, or a `FederationConfig`.
        overrides: changes to it, each of the form `training.learning_rate=0.1`.
        run_id: the run's id; a fresh one by default.
        on_progress: called with each piece of news (`fedrounds.tasks.progress.Progress`) while it runs.
        profile: a file to which a trace of all stages and shards is written, for https://ui.perfetto.dev.

    Returns the run's data, as `show` does. Raises what `errors.py` draws; the run can then be resumed.
    """
    plain, file = _plain(config), None if profile is None else Path(profile)
    return _outside_a_loop(lambda: _train(plain, list(overrides), run_id, on_progress, file))


def sweep(
    config: str | Path | Mapping[str, Any] | FederationConfig,
    over: Sequence[str] | Mapping[str, Sequence[Any]],
    *,
    overrides: Sequence[str] = (),
    sweep_id: str | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train a model for each cell of a grid; with the `sweep_id` of an equal sweep that exists, go on with it.

    Args:
        config, overrides, on_progress: as in `train`.
        over: the axes, as {"training.learning_rate": [0.01, 0.1]}, or each as "training.learning_rate=0.01,0.1".
        sweep_id: the sweep's id; a fresh one by default.

    Returns the sweep's data (`sweep_data`). A cell that fails does not stop the others: then `RunFailed` is raised at
    the end. Raises `ConfigError`, before anything is trained, when a cell makes no sense.
    """
    plain, axes = _plain(config), dict(over) if isinstance(over, Mapping) else list(over)
    return _outside_a_loop(lambda: _sweep(plain, axes, list(overrides), sweep_id, on_progress))


def resume(
    run: str | None = None,
    *,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Go on with a run after its last committed round: the latest unfinished one by default.

    With the id of a sweep, or when the latest unfinished run is the cell of one, it goes on with the sweep. On what is
    complete it repairs what Prefect and MLflow show.

    Args:
        run: the id of a run, or of a sweep.
        fresh_collection: of a run under a privacy claim whose secret was lost, or whose database was restored from a
            backup: count what may have been released as spent, and collect the next round at a further charge, with a
            new secret.
        accept_changed_data: let a run without a privacy claim continue with other rows than it began with.
        on_progress: as in `train`.

    Returns the run's or the sweep's data. Raises `RunNotFound`, and `ConfigError` when one of the two flags is given
    without the id of a run.
    """
    options = {"fresh_collection": fresh_collection, "accept_changed_data": accept_changed_data}
    given = next((f"--{name.replace('_', '-')}" for name, value in options.items() if value), None)
    if given is not None and run is None:
        raise ConfigError(f"{given} is given without the id of a run", hint="`fedrounds runs` lists the runs")
    with Store.open() as store:
        if run is None:
            latest = store.latest_unfinished()
            if latest is None:
                raise RunNotFound("there is no unfinished run", hint="`fedrounds runs` lists all of them")
            run = latest.sweep_id or latest.run_id
        is_sweep = store.find_sweep(run) is not None
        if not is_sweep:
            store.run(run)  # raises RunNotFound before a server is started
    run_id = run
    if is_sweep and given is not None:
        raise ConfigError(
            f"{given} is given, and {run_id} is a sweep: it is decided for each of its runs",
            hint=f"`fedrounds show {run_id}` lists their ids",
        )
    if is_sweep:
        return _outside_a_loop(lambda: _sweep(None, [], [], run_id, on_progress))
    return _outside_a_loop(lambda: _train(None, [], run_id, on_progress, None, **options))


def runs(limit: int | None = 50, *, deleted: bool = False) -> list[dict[str, Any]]:
    """The `limit` newest runs of this store, the newest first; all of them for None; with `deleted` also those that
    were deleted. Raises `ConfigError` for a limit below 1."""
    from fedrounds.tasks.tracking.results import recent_rounds

    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: no run would be listed", hint="give 1 or more")
    with Store.open() as store:
        return [_summary(store, run, recent_rounds(store, run)) for run in store.runs(limit=limit, deleted=deleted)]


def delete_runs(runs: Sequence[str], *, mlflow: bool = False, unfinished: bool = False) -> dict[str, Any]:
    """Delete runs for good: their rounds and blobs, what a privacy claim withheld of them, and what Prefect shows.

    Their charges and the journal stay: the ledger counts them for ever. Deleting a run again repeats what could not be
    done before, for instance because Prefect did not answer.

    Args:
        runs: ids of runs, or of sweeps: then their cells.
        mlflow: delete their MLflow runs and models too, but for a run whose registered model has an alias.
        unfinished: also runs that a resume could take further.

    Returns {runs, kept, prefect, mlflow, dry_run}: what was deleted; what was kept, by its id, with the reason; how
    many `flow_runs` Prefect has lost; and how many `runs` and `model_versions` MLflow. Each view has its `problem`.

    Raises `RunNotFound`, `ConfigError` for an unfinished run, and `LeaseHeld`, before anything is deleted.
    """
    from fedrounds.deployments import deletion

    return _outside_a_loop(lambda: deletion.delete_runs(runs, mlflow=mlflow, unfinished=unfinished))


def prune(
    *,
    older_than: str | None = None,
    keep: int | None = None,
    experiment: str | None = None,
    unfinished: bool = False,
    mlflow: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Delete old runs, as `delete_runs` does: those that are older *and* not among the newest of their experiment.

    Args:
        older_than: hours, days or weeks since a run's last change: "12h", "90d", "8w". None: whatever their age.
        keep: how many of the newest finished runs of each experiment stay. None: one, which `start_from: latest` needs.
        experiment: only runs of this name.
        unfinished, mlflow: as in `delete_runs`.
        dry_run: return what would be deleted, and delete nothing.

    A run that a process works on stays. Raises `ConfigError` where neither `older_than` nor `keep` is given.
    """
    from fedrounds.deployments import deletion

    return _outside_a_loop(
        lambda: deletion.prune(
            older_than=older_than,
            keep=keep,
            experiment=experiment,
            unfinished=unfinished,
            mlflow=mlflow,
            dry_run=dry_run,
        )
    )


def show(run: str) -> dict[str, Any]:
    """One run: its data and the history of its rounds; or a sweep's data. Raises `RunNotFound`."""
    with Store.open() as store:
        sweep = store.find_sweep(run)
        if sweep is not None:
            return sweep_data(store, sweep)
        record = store.run(run)
        history = [
            {"round": row.round, "metrics": row.result["metrics"], "seconds": row.result["seconds"]}
            for row in store.rounds(run)
        ]
        return run_data(store, record) | {"history": history}


def check_config(config: str, overrides: Sequence[str] = (), *, data: bool = False) -> dict[str, Any]:
    """What a configuration would run.

    With `data`, its data is loaded and its model built and tried as well; twice, where they are the user's own code:
    `not_reproducible` says what differs then, so that a resume would be refused or end with another model. `clients`
    lists how many rows each one has, `classes` which clients have rows of each class, `columns` what each column of a
    table holds, `partition` what clients were dealt (`data.summary`), and `left_alone` names the files
    beside the clients' that are not read. A claim about private data withholds what is computed from the rows, and how
    many rows each client has, unless its statement takes these as public.
    """
    from fedrounds.fl_components.config import config_digest, load_config, source_folder

    resolved = load_config(config, overrides)
    found: dict[str, Any] = {
        "name": resolved.name,
        "population": resolved.population,
        "rounds": resolved.rounds,
        "config_digest": config_digest(resolved),
        "num_clients": resolved.data.known_num_clients(),
    }
    if data:
        from fedrounds.fl_components.data import TargetReader
        from fedrounds.fl_components.data.summary import classes, look_alikes, summary
        from fedrounds.fl_components.server.claim import delta_warnings
        from fedrounds.fl_components.server.encoding import expected_bytes
        from fedrounds.fl_components.server.opening import assemble_without_run
        from fedrounds.fl_components.server.reproducibility import second_load

        folder = str(source_folder(config))
        with second_load(resolved, folder) as differences:
            federation = assemble_without_run(resolved, folder)
            found["not_reproducible"] = differences(federation)
        table = federation.simulated.data
        found |= {
            "num_clients": table.num_clients,
            "cohort_size": resolved.selection.cohort_size_of(table.num_clients),
            "num_parameters": federation.num_parameters,
            "num_classes": table.num_classes,
            "communication": expected_bytes(federation),
            "left_alone": list(resolved.data.left_alone()),
            "warnings": delta_warnings(federation),
        }
        clients = [
            {"id": client_id, "train": table.num_examples(index), "test": len(table.test(index)[1])}
            for index, client_id in enumerate(table.client_ids[:1000])
        ]
        if not federation.withholds:
            if isinstance(resolved.data, TargetReader):
                columns = resolved.data.columns_read(resolved.task.targets)
            else:
                columns = resolved.data.columns_read()
            found |= {
                "clients": clients,
                "classes": classes(table) if table.num_classes else [],
                "look_alikes": look_alikes(table.class_names) if columns else [],
                "columns": [asdict(column) for column in columns],
                "baselines": federation.baselines,
                "partition": summary(table),
            }
        elif federation.example_level is not None:  # how many training rows a client has is taken as public
            found["clients"] = [{"id": each["id"], "train": each["train"]} for each in clients]
        if federation.withholds:
            found["withheld"] = "what the clients' labels and test rows tell, what their columns hold"
            found["withheld"] += "" if "clients" in found else ", and how many rows each has"
    return found


def resolve_config(config: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The whole configuration, defaults and overrides included, as a tree of plain values."""
    from fedrounds.fl_components.config import load_config

    resolved: dict[str, Any] = json.loads(load_config(config, overrides).model_dump_json())
    return resolved


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    from fedrounds.fl_components.config import schema

    return schema()


def run_data(store: Store, run: RunRecord) -> dict[str, Any]:
    """Return what `train --json` and `show --json` say of a run."""
    rounds = store.rounds(run.run_id)
    return _summary(store, run, rounds) | {
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
    """Return the run's epsilon as of its last round, with all that gives it a meaning: about the first claim, and about
    a second one beside it."""
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
    """Sums over the rounds; None where they are withheld. With a simulated network its seconds as well, and after how
    many of them the primary metric first reached each level, where a higher one is better."""
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
        summary = _summary(store, run, recent_rounds(store, run))
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


def _plain(config: str | Path | Mapping[str, Any] | FederationConfig) -> str | dict[str, Any]:
    """A path or a tree of plain values: what a flow's parameter can be."""
    from fedrounds.fl_components.rules import Rule

    source = config.model_dump(mode="json") if isinstance(config, Rule) else config
    return dict(source) if isinstance(source, Mapping) else str(Path(source).absolute())


def _summary(store: Store, run: RunRecord, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
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


def _train(
    config: str | dict[str, Any] | None,
    overrides: list[str],
    run_id: str | None,
    on_progress: OnProgress | None,
    profile: Path | None,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
) -> dict[str, Any]:
    if profile is not None:
        from fedrounds.fl_components.server.profile import check_writable

        check_writable(profile)
    if run_id is not None:
        check_run_id(run_id)
    _check_configuration(config, overrides)
    with _connected(on_progress) as connection:
        from fedrounds.flows.training import federated_training
        from fedrounds.tasks.progress import nobody_listens
        from fedrounds.tasks.session import new_run_id, session

        run_id = run_id or new_run_id()
        listener = on_progress or nobody_listens
        opened = session(
            run_id,
            config,
            overrides,
            listener,
            fresh_collection=fresh_collection,
            accept_changed_data=accept_changed_data,
        )
        with opened as running, _profiled(running, profile, listener):
            _run(
                lambda: federated_training(
                    config=config,
                    overrides=overrides,
                    run_id=run_id,
                    fresh_collection=fresh_collection,
                    accept_changed_data=accept_changed_data,
                    return_state=True,
                ),
                running,
                running.run.cancelled,
                connection,
                tag=f"run:{run_id}",
            )
            return run_data(running.run.store, running.run.refresh())


@contextmanager
def _profiled(running: Session, file: Path | None, listener: OnProgress) -> Iterator[None]:
    """Write the trace of what happens inside to `file`, also when the run fails."""
    if file is None:
        yield
        return
    from fedrounds.fl_components.server.profile import Profile
    from fedrounds.tasks.progress import Progress

    running.run.profile = profile = Profile()
    try:
        yield
    finally:
        profile.write(file)
        # Not to Prefect's log, which has ended with the flow.
        listener(Progress("message", f"the profile is in {file}: https://ui.perfetto.dev opens it", running.run_id))


def _sweep(
    config: str | dict[str, Any] | None,
    over: list[str] | dict[str, Any],
    overrides: list[str],
    sweep_id: str | None,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    if sweep_id is not None:
        check_sweep_id(sweep_id)
    if config is not None:
        from fedrounds.tasks.sweep import plan

        plan(sweep_id or "new", config, over, overrides)  # before a server is started for what makes no sense
    with _connected(on_progress) as connection:
        from fedrounds.flows.sweep import federated_sweep
        from fedrounds.tasks.progress import nobody_listens
        from fedrounds.tasks.session import new_run_id
        from fedrounds.tasks.sweep import sweep_session

        sweep_id = sweep_id or new_run_id()
        with sweep_session(sweep_id, config, over, overrides, on_progress or nobody_listens) as sweep:
            parameters = {"config": config, "over": over, "overrides": overrides, "sweep_id": sweep_id}
            _run(
                lambda: federated_sweep(**parameters, return_state=True),
                sweep,
                sweep.cancelled,
                connection,
                tag=f"sweep:{sweep_id}",
            )
            return sweep_data(sweep.store, sweep.record, sweep.shown)


def _check_configuration(config: str | dict[str, Any] | None, overrides: list[str]) -> None:
    """Raise `ConfigError` for a configuration that makes no sense, before a server is started for it."""
    if config is not None:
        from fedrounds.fl_components.config import load_config

        load_config(config, overrides)


def _check_enclosing_flow() -> None:
    """Raise `ConfigError` inside a flow run of another Prefect server than the one that the training would use."""
    context = sys.modules.get("prefect.context")
    if context is None or context.FlowRunContext.get() is None:
        return
    from prefect.settings import PREFECT_API_URL

    from fedrounds.deployments.stack.connection import configured_api_url

    server = configured_api_url()
    if server is None or server != (PREFECT_API_URL.value() or "").rstrip("/"):
        raise ConfigError(
            "this is called inside a Prefect flow run of another server than the training's",
            hint="set PREFECT_API_URL to that server for both, or call it outside of the flow",
        )


@contextmanager
def _connected(on_progress: OnProgress | None) -> Iterator[Connection]:
    """A Prefect server, which boots while what a training needs is imported."""
    from fedrounds.deployments.stack.connection import ConfiguredServer, connect
    from fedrounds.tasks.tracking.server import check_tracking_uri

    check_tracking_uri()
    _check_enclosing_flow()
    with connect(say=lambda text: _tell(on_progress, text)) as connection:
        _tell(on_progress, "loading PyTorch, Prefect and the data")
        import fedrounds.flows.training  # noqa: F401

        if isinstance(connection, ConfiguredServer):  # one that is away is told before anything is written
            connection.wait()
        yield connection


def _run(
    flow: Callable[[], Any],
    held: Session | SweepSession,
    cancelled: threading.Event,
    connection: Connection,
    *,
    tag: str,
) -> None:
    """Run a flow on what this process holds. Raises what ended it."""
    from prefect import tags

    from fedrounds.deployments.stack.connection import client_settings
    from fedrounds.flows.prefect_runs import translate_prefect_error
    from fedrounds.tasks.outcome import Outcome

    connection.wait()
    with client_settings(connection), tags(tag), _first_interrupt_stops(cancelled) as interrupted:
        try:
            state = flow()
            if held.outcome.is_success and not state.is_completed():
                state.result()  # raises what Prefect's engine met
        except Exception as error:  # Prefect's own: what ended the training is in held.outcome
            if held.outcome.is_success:
                held.outcome = Outcome(translate_prefect_error(error, tag.partition(":")[2]))
    if interrupted.is_set() and not held.outcome.is_success:
        raise KeyboardInterrupt
    held.outcome.check()


@contextmanager
def _first_interrupt_stops(cancelled: threading.Event) -> Iterator[threading.Event]:
    """The first Ctrl-C asks the run to stop before its next stage; the second interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield interrupted
        return

    def stop(*_: object) -> None:
        interrupted.set()
        cancelled.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(on_progress: OnProgress | None, text: str) -> None:
    if on_progress is not None:
        from fedrounds.tasks.progress import Progress

        on_progress(Progress("message", text))


def _outside_a_loop(work: Callable[[], T]) -> T:
    """Prefect's synchronous calls turn into coroutines inside a running event loop, so the work gets its own thread."""
    if not _loop_is_running():
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="fedrounds") as executor:
        future = executor.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            from fedrounds.tasks.session import cancel_open_sessions

            cancel_open_sessions()  # each stops before its next stage, and the executor waits for that
            raise


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
