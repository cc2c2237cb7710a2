"""The stages of a round, one after the other, as the walk (flows/round.py) calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.broadcast import EncodedBroadcast
from fedrounds.fl_components.server.collection import Collection
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.values import RoundPlan, RoundResult, SealedCohort, ServerState


def begin(run: Run, round: int = 1) -> tuple[ServerState, RoundPlan]:
    """Load, broadcast, select and authorise a round."""
    state = stages.load(run, round)
    return state, stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))


def sent(run: Run, state: ServerState) -> EncodedBroadcast:
    """Return the broadcast of a round again, without a stage of its own."""
    result: EncodedBroadcast = stages.broadcast.__wrapped__(run, state)  # type: ignore[attr-defined]
    return result


def collect(run: Run, state: ServerState, plan: RoundPlan, poisoned: Sequence[str] = ()) -> Collection:
    """Train, compress and admit all waves; the updates of some clients are NaN."""
    collected = None
    for wave in plan.waves:
        batch: Any = stages.train(run, plan, sent(run, state), wave)
        for row, client_id in enumerate(batch.client_ids):
            if client_id in poisoned:
                batch.updates_NM[row] = np.nan
        collected = stages.admit(run, plan, stages.compress(run, plan, batch), collected)
    assert collected is not None
    return collected


def step(run: Run, state: ServerState, plan: RoundPlan, cohort: SealedCohort) -> ServerState:
    """Move the server's parameters by a sealed cohort."""
    return stages.server_step(run, plan, state, sent(run, state), cohort)


def aggregate(run: Run, state: ServerState, plan: RoundPlan, collected: Collection) -> ServerState:
    """Seal what was collected, and move the server's parameters by it."""
    return step(run, state, plan, stages.aggregate(run, plan, state, collected))


def finish(run: Run, state: ServerState, plan: RoundPlan, collected: Collection) -> RoundResult:
    """Seal, move the parameters, evaluate and commit."""
    cohort = stages.aggregate(run, plan, state, collected)
    state = step(run, state, plan, cohort)
    return stages.commit(run, plan, state, cohort, stages.evaluate(run, state))
