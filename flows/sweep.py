"""A sweep as a Prefect flow: each cell of a grid is trained in turn, and what dies goes on where it was."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect import State, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.context import TagsContext
from prefect.settings import PREFECT_UI_URL

from fedrounds.fl_components.errors import (
    BudgetExhausted,
    ConfigError,
    DataError,
    LeaseHeld,
    LeaseLost,
    ModelError,
    RunConflict,
    RunFailed,
    TooFewClients,
)
from fedrounds.fl_components.store import cell_name
from fedrounds.flows.prefect_runs import (
    cancellation_watched,
    crash_stale_runs,
    current_flow_run_id,
    final_state,
    settle_cancelled,
    sweep_tag,
    translate_prefect_error,
    without_heartbeat,
)
from fedrounds.flows.training import federated_training
from fedrounds.tasks.outcome import Outcome
from fedrounds.tasks.session import run_id_of_flow_run, session
from fedrounds.tasks.sweep import SweepSession, sweep_session
from fedrounds.tasks.tracking.sweep_view import end_sweep

OF_ONE_CELL = (ConfigError, DataError, ModelError, RunConflict, RunFailed, TooFewClients, BudgetExhausted)
"""What ends a cell and says nothing about the next one."""


@flow(name="federated-sweep", persist_result=False, validate_parameters=False)
def federated_sweep(
    config: str | dict[str, Any] | None = None,
    over: list[str] | dict[str, list[Any]] | None = None,
    overrides: list[str] | None = None,
    sweep_id: str | None = None,
) -> State[Any]:
    """Train every cell of a grid. A cell that fails does not stop the others.

    Args:
        config: the path of a configuration file. Empty to go on with the sweep `sweep_id`.
        over: the axes of the grid, each of the form `training.learning_rate=0.01,0.1`.
        overrides: changes to the configuration, for all cells.
        sweep_id: the sweep to begin, or to go on with. By default derived from this flow run.
    """
    flow_run_id = current_flow_run_id()
    sweep_id = sweep_id or run_id_of_flow_run(flow_run_id)
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run_id, tags=[sweep_tag(sweep_id)])
        with sweep_session(sweep_id, config, over or (), overrides or ()) as sweep:
            sweep.shown["prefect_flow_run_id"] = str(flow_run_id)
            sweep.shown["prefect_flow_run_url"] = f"{PREFECT_UI_URL.value()}/runs/flow-run/{flow_run_id}"
            sweep.outcome = outcome = _attempt(sweep, client, flow_run_id)
            _complete_views(sweep, outcome, client, flow_run_id)
            return final_state(client, flow_run_id, outcome, f"{len(sweep.cells)} cells")


def _attempt(sweep: SweepSession, client: SyncPrefectClient, flow_run_id: UUID) -> Outcome:
    """Train the cells that are not complete yet, until all are or an error ends it."""
    try:
        client.update_flow_run(flow_run_id, name=f"{sweep.record.name}/{sweep.sweep_id}")
        done = len(sweep.cells) - len(sweep.unfinished())
        sweep.say(f"sweep {sweep.sweep_id}: {len(sweep.cells)} cells" + (f", {done} done" if done else ""))
        _train_cells(sweep, client, flow_run_id)
        return Outcome(None)
    except BaseException as error:
        return Outcome(translate_prefect_error(error, sweep.sweep_id))


def _train_cells(sweep: SweepSession, client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Those that are not complete yet. The tag of the sweep is not theirs: they may be resumed on their own."""
    settings = without_heartbeat()
    with TagsContext(current_tags=set()), cancellation_watched(flow_run_id, sweep.cancelled):
        for run_id in sweep.unfinished():
            sweep.check_cancelled()
            try:
                with settings.model_copy():
                    _train_cell(sweep, run_id, client, flow_run_id)
            except OF_ONE_CELL as error:
                sweep.errors[run_id] = error
                sweep.say(f"cell {run_id} failed: {error.message}")
    if sweep.errors:
        grid = sweep.record.cells
        told = (f"{run_id} ({cell_name(grid[run_id])}): {error.message}" for run_id, error in sweep.errors.items())
        raise RunFailed(
            f"{len(sweep.errors)} of the {len(grid)} cells of sweep {sweep.sweep_id} failed: {'; '.join(told)}",
            hint=f"`fedrounds show {sweep.sweep_id}` has the others; `fedrounds resume {sweep.sweep_id}` tries again",
        )


def _train_cell(sweep: SweepSession, run_id: str, client: SyncPrefectClient, flow_run_id: UUID) -> None:
    begun = sweep.store.find_run(run_id)
    # One that has begun goes on as it was configured, also where a newer version has other defaults.
    is_cell = begun is not None and begun.sweep_id == sweep.sweep_id
    config = None if is_cell else sweep.cells[run_id].model_dump(mode="json")
    with session(run_id, config, listener=sweep.listener_of(run_id), sweep=sweep.record) as running:
        running.run.cancelled = sweep.cancelled
        crash_stale_runs(client, sweep_tag(sweep.sweep_id), flow_run_id)  # not before a lease is held: they are dead
        state = federated_training(run_id=run_id, return_state=True)
        if state.type in (StateType.CANCELLING, StateType.CANCELLED):
            settle_cancelled(client, state)
        elif running.outcome.is_success and not state.is_completed():
            state.result()  # raises what Prefect's engine met
        running.outcome.check()


def _complete_views(sweep: SweepSession, outcome: Outcome, client: SyncPrefectClient, flow_run_id: UUID) -> None:
    if isinstance(outcome.error, LeaseHeld | LeaseLost):  # another process continues the sweep, and shows it
        return
    sweep.shown |= end_sweep(sweep.store, sweep.record, outcome.state, sweep.say)
    try:
        if outcome.is_success:
            crash_stale_runs(client, sweep_tag(sweep.sweep_id), flow_run_id)
    except Exception as problem:
        reason = translate_prefect_error(problem, sweep.sweep_id)
        sweep.say(f"what Prefect shows of this sweep may not be complete: {reason}")
