"""Deleting runs: the functions behind `fedrounds runs delete` and `fedrounds prune`."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, Final

from fedrounds.deployments.account import account_name
from fedrounds.fl_components.errors import ConfigError, LeaseHeld, RunNotFound, Unreachable
from fedrounds.fl_components.store import RunRecord, Store, is_unfinished

SECONDS: Final = {"h": 3600, "d": 86_400, "w": 7 * 86_400}


def delete_runs(runs: Sequence[str], *, mlflow: bool, unfinished: bool) -> dict[str, Any]:
    """See `fedrounds.deployments.api.delete_runs`."""
    with Store.open() as store:
        chosen = {run.run_id: run for name in runs for run in _runs_of(store, name)}
        held = [run_id for run_id in chosen if store.is_held(run_id)]
        if held:
            raise LeaseHeld(f"a process is working on run {held[0]}", hint="wait for it, or end it, and try again")
        for run in chosen.values():
            if is_unfinished(run.state, run.error) and not unfinished:
                raise ConfigError(
                    f"run {run.run_id} is unfinished: {run.state}, {run.committed_round} of {run.rounds} rounds",
                    hint=f"`fedrounds resume {run.run_id}` continues it; add --unfinished to delete it",
                )
        return _delete(store, list(chosen.values()), mlflow=mlflow)


def prune(
    *,
    older_than: str | None,
    keep: int | None,
    experiment: str | None,
    unfinished: bool,
    mlflow: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """See `fedrounds.deployments.api.prune`."""
    if older_than is None and keep is None:
        raise ConfigError("nothing says which runs to prune", hint="give --older-than 90d, --keep 10, or both")
    if keep is not None and keep < 0:
        raise ConfigError(f"--keep is {keep}", hint="give the number of finished runs that each experiment keeps")
    before = time.time() - (0 if older_than is None else seconds_of(older_than))
    with Store.open() as store:
        found = store.runs(name=experiment)
        if experiment is not None and not found:
            raise RunNotFound(f"there is no run of the experiment {experiment!r}", hint="`fedrounds runs` lists them")
        chosen, kept, newest = list[RunRecord](), dict[str, str](), Counter[str]()
        for run in found:  # the newest first
            newest[run.name] += run.state.is_finished
            among_newest = run.state.is_finished and newest[run.name] <= (1 if keep is None else keep)
            if among_newest or run.updated_at > before:
                continue
            if store.is_held(run.run_id):
                kept[run.run_id] = "a process is working on it"
            elif is_unfinished(run.state, run.error) and not unfinished:
                kept[run.run_id] = f"it is unfinished ({run.state}); --unfinished includes it"
            else:
                chosen.append(run)
        if dry_run:
            return _answer(chosen, kept) | {"dry_run": True, "prefect": None, "mlflow": None}
        return _delete(store, chosen, kept, mlflow=mlflow)


def seconds_of(duration: str) -> int:
    """Return a duration in seconds. Raises `ConfigError`.

    >>> seconds_of("90d"), seconds_of("12h"), seconds_of("2w")
    (7776000, 43200, 1209600)
    """
    match = re.fullmatch(r"(\d{1,6})([hdw])", duration)
    if match is None:
        raise ConfigError(f"{duration!r} is not a duration", hint="give hours, days or weeks: 12h, 90d, 8w")
    return int(match[1]) * SECONDS[match[2]]


def _runs_of(store: Store, name: str) -> list[RunRecord]:
    """The run of that id, or the cells of a sweep. Raises `RunNotFound`."""
    if store.find_sweep(name) is not None:
        return store.runs(sweep_id=name, deleted=True)
    return [store.run(name)]


def _delete(
    store: Store, runs: Sequence[RunRecord], kept: dict[str, str] | None = None, *, mlflow: bool
) -> dict[str, Any]:
    kept, deleted = dict(kept or {}), list[RunRecord]()
    for run in runs:
        try:
            store.delete_run(run.run_id, by=account_name())
        except LeaseHeld as error:
            kept[run.run_id] = error.message
        else:
            deleted.append(run)
    if deleted:
        store.compact()
        store.anchor()
    of_mlflow = None
    if mlflow and deleted:
        from fedrounds.tasks.tracking.deletion import delete_from_mlflow

        of_mlflow = asdict(delete_from_mlflow(store, deleted))
    return _answer(deleted, kept) | {
        "dry_run": False,
        "prefect": _delete_from_prefect(store, deleted),
        "mlflow": of_mlflow,
    }


def _answer(runs: Sequence[RunRecord], kept: dict[str, str]) -> dict[str, Any]:
    shown = ("run_id", "name", "state", "committed_round", "updated_at")
    return {"runs": [{name: getattr(run, name) for name in shown} for run in runs], "kept": kept}


def _delete_from_prefect(store: Store, runs: Sequence[RunRecord]) -> dict[str, Any]:
    """{flow_runs, problem}: how many flow runs were deleted, and why others could not be."""
    if not runs or find_spec("prefect") is None:
        return {"flow_runs": 0, "problem": None}
    from fedrounds.deployments.stack.connection import client_settings, configured_api_url, connect
    from fedrounds.deployments.stack.files import server_files

    if configured_api_url() is None and not server_files(store.home).database.exists():
        return {"flow_runs": 0, "problem": None}
    import httpx

    deleted = 0
    try:
        with connect(store.home) as connection:
            connection.wait()
            from prefect.client.orchestration import get_client

            from fedrounds.flows.prefect_runs import delete_flow_runs, run_tag

            with client_settings(connection), get_client(sync_client=True) as client:
                for run in runs:
                    deleted += delete_flow_runs(client, run_tag(run.run_id))
    except (ConfigError, Unreachable, httpx.HTTPError) as error:
        return {"flow_runs": deleted, "problem": f"Prefect could not be asked: {error}"}
    return {"flow_runs": deleted, "problem": None}
