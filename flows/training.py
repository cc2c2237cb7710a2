"""Federated training as a Prefect flow: one child flow run per round; what dies is resumed, at any point."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect import State, flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_UI_URL

from fedrounds.fl_components.errors import LeaseLost, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.charging import check_budget
from fedrounds.fl_components.server.history import check_history
from fedrounds.flows.prefect_runs import (
    Children,
    cancellation_watched,
    crash_stale_runs,
    current_flow_run_id,
    final_state,
    flow_run_log,
    run_tag,
    settle_cancelled,
    translate_prefect_error,
    without_heartbeat,
)
from fedrounds.flows.round import federated_round
from fedrounds.tasks.anchors import sightings
from fedrounds.tasks.outcome import Outcome
from fedrounds.tasks.session import Session, loggable_model, run_id_of_flow_run, session
from fedrounds.tasks.tracking.tracker import Tracker, catch_up
from fedrounds.tasks.views import RunArtifact

TRACKING_TIMEOUT_S = 20.0


@flow(name="federated-training", persist_result=False, validate_parameters=False)
def federated_training(
    config: str | dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    run_id: str | None = None,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
) -> State[Any]:
    """Train until all rounds are committed.

    Args:
        config: the path of a configuration file. Empty to go on with the run `run_id` as it was configured.
        overrides: changes to the configuration, each of the form `training.learning_rate=0.1`.
        run_id: the run to begin, or to go on with. By default derived from this flow run, so that a retry goes on.
        fresh_collection: count what may have been released of the run's next round as spent, and collect it again at a
            further charge, with a new secret.
        accept_changed_data: let a run without a privacy claim continue with other rows than it began with.
    """
    flow_run_id = current_flow_run_id()
    run_id = run_id or run_id_of_flow_run(flow_run_id)
    with get_client(sync_client=True) as client:
        # First of all: a resume finds by this tag what a killed process has left in Prefect.
        client.update_flow_run(flow_run_id, tags=[run_tag(run_id)])
        with session(
            run_id,
            config,
            overrides or (),
            fresh_collection=fresh_collection,
            accept_changed_data=accept_changed_data,
        ) as running:
            running.outcome = outcome = _attempt(running, client, flow_run_id)
            _complete_views(running, outcome, client, flow_run_id)
            return final_state(client, flow_run_id, outcome, f"{running.run.config.rounds} rounds")


def _attempt(running: Session, client: SyncPrefectClient, flow_run_id: UUID) -> Outcome:
    """Train until all rounds are committed or an error ends it, and record the end in the store."""
    try:
        _begin(running, client, flow_run_id)
        _train(running, client, flow_run_id)
        return Outcome(None)
    except BaseException as error:
        outcome = Outcome(translate_prefect_error(error, running.run_id))
        _record_end(running, outcome)
        return outcome


def _begin(running: Session, client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Name and tag this flow run, put right what dead attempts left in Prefect, and start the views."""
    run = running.run
    if run.config.claims and run.refresh().attempt:
        seen, problems = sightings(client, run.store, run.record)
        for problem in problems:
            running.say(problem)
        check_history(run, seen)
    if run.refresh().state != RunState.COMPLETED:  # else only what Prefect and MLflow show of it is put right
        run.lease.begin_attempt()
    record = run.refresh()
    labels = [f"attempt:{record.attempt}", f"population:{record.population}", f"experiment:{record.name}"]
    client.update_flow_run(flow_run_id, name=f"{record.name}/{record.run_id}", tags=[run_tag(run.run_id), *labels])
    crash_stale_runs(client, run_tag(run.run_id), flow_run_id)
    running.listeners.append(flow_run_log(flow_run_id))
    running.artifact = RunArtifact(running)
    url = f"{PREFECT_UI_URL.value()}/runs/flow-run/{flow_run_id}"
    running.tracker = Tracker(
        run.store,
        run.lease,
        model=running.loggable_model,
        prefect_flow_run={"id": str(flow_run_id), "url": url},
        say=running.say,
    )
    running.tracker.start()
    running.tell("run", record.name, round=record.committed_round)


def _train(running: Session, client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """The rounds that are not committed yet."""
    run, attempt = running.run, running.run.record.attempt
    settings = without_heartbeat()
    rounds = Children(client, flow_run_id, federated_round, tags=[run_tag(run.run_id), f"attempt:{attempt}"])
    with cancellation_watched(flow_run_id, run.cancelled):
        for round in range(run.record.committed_round + 1, run.config.rounds + 1):
            run.check_cancelled()
            check_budget(run)
            with settings.model_copy():
                state = rounds.run(f"round-{round:04d}", f"{attempt}/{round}", run_id=run.run_id, round=round)
            if state.type in (StateType.CANCELLING, StateType.CANCELLED):
                settle_cancelled(client, state)
                run.cancelled.set()
            elif not state.is_completed():
                state.result()  # raises what the round raised
        run.check_cancelled()
    if run.record.state != RunState.COMPLETED:
        run.lease.finish(RunState.COMPLETED)


def _record_end(running: Session, outcome: Outcome) -> None:
    """Record how the run ended, where the store can still be written; a later attempt continues from there."""
    try:
        running.run.lease.finish(outcome.state, error=outcome.error_data(running.run_id))
    except LeaseLost:  # the process that holds the run now records how it ends
        return
    except StoreError as unwritable:
        running.say(f"the end of the run could not be recorded: {unwritable.message}")


def _complete_views(running: Session, outcome: Outcome, client: SyncPrefectClient, flow_run_id: UUID) -> None:
    """Wait for what MLflow lacks, but not for ever, and put right what other attempts and other runs left behind.

    The run has ended: nothing here fails it, and a process that was superseded leaves everything to its successor.
    """
    run, store = running.run, running.run.store
    if running.artifact is not None:
        running.artifact.close()
    try:
        run.lease.note()
        if running.tracker is not None:
            if outcome.is_success:
                running.say("writing the model to MLflow")
            report = running.tracker.close(TRACKING_TIMEOUT_S)
            if report.superseded:
                return
            if report.error is not None:
                running.say(
                    f"MLflow lacks {report.lacking} of this run ({report.error}); "
                    f"the next training, or `fedrounds resume {running.run_id}`, writes that when it is back"
                )
            elif outcome.is_success:
                catch_up(
                    store,
                    model=lambda run: loggable_model(store, run),
                    repair=lambda run: crash_stale_runs(client, run_tag(run.run_id), flow_run_id),
                    say=running.say,
                )
        run.lease.note()
        # Again: Prefect writes task runs a second or two late, so what died with its process may only show now.
        crash_stale_runs(client, run_tag(running.run_id), flow_run_id)
    except LeaseLost:
        pass
    except Exception as problem:
        reason = translate_prefect_error(problem, running.run_id)
        running.say(f"what Prefect and MLflow show of this run may not be complete: {reason}")
    running.tell("end")
