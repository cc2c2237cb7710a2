"""One federated round as a Prefect flow."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.states import Cancelled

from fedrounds.fl_components.errors import RunCancelled
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.values import RoundResult
from fedrounds.tasks import stages as prefect_stages
from fedrounds.tasks.session import running_session
from fedrounds.tasks.views import track


def walk(stages: Any, run: Run, round: int) -> RoundResult:
    """A round, forward only. `stages` holds the functions of `fl_components.server.stages`, as they are or as tasks."""
    result: RoundResult | None = run.committed(round)
    if result is not None:
        return result
    state = stages.load(run, round)
    sent = stages.broadcast(run, state)
    plan = stages.authorise(run, stages.select(run, state, sent))
    cohort = run.sealed(round)  # an earlier attempt's: what is sealed is never collected again
    if cohort is None:
        collected = None
        for wave in plan.waves:
            batch = stages.train(run, plan, sent, wave)
            collected = stages.admit(run, plan, stages.compress(run, plan, batch), collected)
        cohort = stages.aggregate(run, plan, state, collected)
    state = stages.server_step(run, plan, state, sent, cohort)
    result = stages.commit(run, plan, state, cohort, stages.evaluate(run, state))
    return result


@flow(name="federated-round", persist_result=False, validate_parameters=False)
def federated_round(run_id: str, round: int) -> RoundResult | State[Any]:
    """Round `round` of the run that this process holds."""
    session = running_session(run_id)
    try:
        result = walk(prefect_stages, session.run, round)
        track(session, result)
        return result
    except RunCancelled as cancelled:
        return Cancelled(message=cancelled.message)
