"""fedrounds from Python: the functions behind the commands. They return plain data and raise the tree of errors.py.

    from fedrounds.deployments.api import train
    data = train("examples/heart_disease.yaml", overrides=["rounds=5"])
    data["metrics"]["eval/accuracy"]

All may be called where an event loop is running (a notebook): the work is then done in a thread of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrounds.fl_components.errors import ConfigError, RunNotFound
from fedrounds.fl_components.store import (
    Store,
)

if TYPE_CHECKING:
    from fedrounds.fl_components.config import FederationConfig
from fedrounds.deployments.results import run_data, run_summary, sweep_data
from fedrounds.deployments.training import OnProgress, run_outside_loop, run_sweep, run_training


def train(
    config: str | Path | Mapping[str, Any] | FederationConfig,
    *,
    overrides: Sequence[str] = (),
    run_id: str | None = None,
    on_progress: OnProgress | None = None,
    profile: str | Path | None = None,
) -> dict[str, Any]:
    """Train a model; with the `run_id` of a run that exists and an equal configuration, resume it.

    Args:
        config: the path of a configuration file, its fields as a tree, or a `FederationConfig`.
        overrides: changes to it, each of the form `training.learning_rate=0.1`.
        run_id: the run's id; a fresh one by default.
        on_progress: called with each piece of news (`fedrounds.tasks.progress.Progress`) while it runs.
        profile: a file to which a trace of all stages and shards is written, for https://ui.perfetto.dev.

    Returns the run's data, as `show` does. Raises what `errors.py` draws; the run can then be resumed.
    """
    plain, file = _plain(config), None if profile is None else Path(profile)
    return run_outside_loop(lambda: run_training(plain, list(overrides), run_id, on_progress, file))


def sweep(
    config: str | Path | Mapping[str, Any] | FederationConfig,
    over: Sequence[str] | Mapping[str, Sequence[Any]],
    *,
    overrides: Sequence[str] = (),
    sweep_id: str | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train a model for each cell of a grid; with the `sweep_id` of an equal sweep that exists, resume it.

    Args:
        config, overrides, on_progress: as in `train`.
        over: the axes, as {"training.learning_rate": [0.01, 0.1]}, or each as "training.learning_rate=0.01,0.1".
        sweep_id: the sweep's id; a fresh one by default.

    Returns the sweep's data (`sweep_data`). A cell that fails does not stop the others: then `RunFailed` is raised at
    the end. Raises `ConfigError`, before anything is trained, when a cell makes no sense.
    """
    plain, axes = _plain(config), dict(over) if isinstance(over, Mapping) else list(over)
    return run_outside_loop(lambda: run_sweep(plain, axes, list(overrides), sweep_id, on_progress))


def resume(
    run: str | None = None,
    *,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Go on with a run after its last committed round: the latest unfinished one by default.

    With the id of a sweep, or when the latest unfinished run is the cell of one, it resumes the sweep. On what is
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
        return run_outside_loop(lambda: run_sweep(None, [], [], run_id, on_progress))
    return run_outside_loop(lambda: run_training(None, [], run_id, on_progress, None, **options))


def runs(limit: int | None = 50, *, deleted: bool = False) -> list[dict[str, Any]]:
    """The `limit` newest runs of this store, the newest first; all of them for None; with `deleted` also those that
    were deleted. Raises `ConfigError` for a limit below 1."""
    from fedrounds.tasks.tracking.results import recent_rounds

    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}: no run would be listed", hint="give 1 or more")
    with Store.open() as store:
        return [run_summary(store, run, recent_rounds(store, run)) for run in store.runs(limit=limit, deleted=deleted)]


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

    return run_outside_loop(lambda: deletion.delete_runs(runs, mlflow=mlflow, unfinished=unfinished))


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

    return run_outside_loop(
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


def _plain(config: str | Path | Mapping[str, Any] | FederationConfig) -> str | dict[str, Any]:
    """A path or a tree of plain values: what a flow's parameter can be."""
    from fedrounds.fl_components.rules import Rule

    source = config.model_dump(mode="json") if isinstance(config, Rule) else config
    return dict(source) if isinstance(source, Mapping) else str(Path(source).absolute())
