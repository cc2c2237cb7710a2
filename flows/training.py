"""Federated training as a Prefect flow: one child flow run per round; what dies is resumed, at any point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect import State, flow, tags
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_UI_URL
from prefect.states import Cancelled, Completed, Failed

from fl_components.errors import FedroundsError, RunCancelled, StoreError, TooFewClients
from flows.prefect_runs import cancellation_watched, crash_stale_runs, flow_run_log, in_our_words, without_heartbeat
from flows.round import federated_round
from tasks.session import Session, loggable_model, run_id_of_flow_run, session
from tasks.tracking.tracker import Tracker, catch_up
from tasks.views import RunArtifact

TRACKING_TIMEOUT_S = 20.0


@flow(name="federated-training", persist_result=False, validate_parameters=False)
def federated_training(
    config: str | dict[str, Any] | None = None, overrides: list[str] | None = None, run_id: str | None = None
) -> State[Any]:
    """Train until all rounds are committed.

    Args:
        config: the path of a configuration file. Empty to go on with the run `run_id` as it was configured.
        overrides: changes to the configuration, each of the form `training.learning_rate=0.1`.
        run_id: the run to begin, or to go on with. By default derived from this flow run, so that a retry goes on.
    """
    flow_run_id = _flow_run_id()
    run_id = run_id or run_id_of_flow_run(flow_run_id)
    with session(run_id, config, overrides or ()) as running:
        running.listeners.append(flow_run_log(flow_run_id))
        running.flow_run = {"id": str(flow_run_id), "url": f"{PREFECT_UI_URL.value()}/runs/flow-run/{flow_run_id}"}
        attempt = running.hub.lease.begin_attempt()
        with _prefect_told(running, flow_run_id, attempt), _tracked(running):
            return _attempt(running, flow_run_id)


def _attempt(running: Session, flow_run_id: UUID) -> State[Any]:
    """The rounds that are not committed yet, and the run's final state in the store and in Prefect."""
    hub = running.hub
    running.tell("run", hub.config.name, round=hub.refresh().committed_round)
    try:
        with cancellation_watched(flow_run_id, hub.cancelled):
            settings = without_heartbeat()
            for round in range(hub.run.committed_round + 1, hub.config.rounds + 1):
                hub.check_cancelled()
                with settings.model_copy():
                    state = federated_round(hub.run_id, round, return_state=True)
                if not state.is_completed():
                    hub.check_cancelled()
                    state.result()  # raises what the round raised
        hub.lease.finish("Completed")
        return Completed(message=f"{hub.config.rounds} rounds")
    except BaseException as error:
        running.error = in_our_words(error, hub.run_id)
        return _ended_by(running, running.error)


def _ended_by(running: Session, error: BaseException) -> State[Any]:
    """Write down how the run ended, where the store can still be written; a later attempt goes on from there."""
    hub = running.hub
    stopped = isinstance(error, RunCancelled | KeyboardInterrupt | TerminationSignal)
    name = "Cancelled" if stopped else "TooFewClients" if isinstance(error, TooFewClients) else "Failed"
    told = {"code": "bug", "message": f"{type(error).__name__}: {error}", "hint": None}
    if isinstance(error, FedroundsError):
        told = {"code": error.code, "message": error.message, "hint": error.hint}
    elif stopped:
        told = {"code": RunCancelled.code, "message": f"run {hub.run_id} was stopped", "hint": None}
    try:
        hub.lease.finish(name, error=told)
    except StoreError as unwritable:
        running.say(f"the end of the run could not be written down: {unwritable.message}")
    if isinstance(error, RunCancelled):
        return Cancelled(message=error.message)
    if isinstance(error, FedroundsError):
        return Failed(name=name, message=error.message)
    raise error


@contextmanager
def _prefect_told(running: Session, flow_run_id: UUID, attempt: int) -> Iterator[None]:
    """Name and tag this flow run, put right what dead attempts left in Prefect, and tag all runs below."""
    hub = running.hub
    run_tag = f"run:{hub.run_id}"
    names = [run_tag, f"attempt:{attempt}", f"population:{hub.config.population}", f"experiment:{hub.config.name}"]
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run_id, name=f"{hub.config.name}/{hub.run_id}", tags=names)
        crash_stale_runs(client, run_tag, flow_run_id)
        with tags(run_tag, f"attempt:{attempt}"):
            running.artifact = RunArtifact(running)
            yield
        if attempt > 1:  # Prefect writes task runs a second or two late: what died with its process may only show now
            crash_stale_runs(client, run_tag, flow_run_id)


@contextmanager
def _tracked(running: Session) -> Iterator[None]:
    """Follow the run in MLflow from a thread of its own; at the end wait for what is unwritten, but not for ever."""
    running.tracker = Tracker(
        running.hub.store,
        running.hub.lease,
        model=running.loggable_model,
        prefect_flow_run=running.flow_run,
        say=running.say,
    )
    running.tracker.start()
    try:
        yield
    finally:
        if running.error is None:
            running.say("writing the model to MLflow")
        report = running.tracker.close(TRACKING_TIMEOUT_S)
        if report.error is not None:
            running.say(
                f"MLflow lacks {report.pending_rounds} rounds of this run ({report.error}); "
                f"the next training, or `fedrounds resume {running.run_id}`, writes them when it is back"
            )
        elif running.error is None:  # what earlier runs could not tell MLflow, or were killed before they did
            store = running.hub.store
            catch_up(store, model=lambda run: loggable_model(store, run), say=running.say)
        running.tell("end")


def _flow_run_id() -> UUID:
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None  # a flow's body always runs in one
    return context.flow_run.id
