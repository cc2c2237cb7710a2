"""The stages of a round, one after the other, as the walk (flows/round.py) calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.broadcast import EncodedBroadcast
from fedrounds.fl_components.server.collection import Collection
from fedrounds.fl_components.server.hub import Hub
from fedrounds.fl_components.values import RoundPlan, RoundResult, SealedCohort, ServerState


def begin(hub: Hub, round: int = 1) -> tuple[ServerState, RoundPlan]:
    """Load, broadcast, select and authorise a round."""
    state = stages.load(hub, round)
    return state, stages.authorise(hub, stages.select(hub, state, stages.broadcast(hub, state)))


def sent(hub: Hub, state: ServerState) -> EncodedBroadcast:
    """Return the broadcast of a round again, without a stage of its own."""
    result: EncodedBroadcast = stages.broadcast.__wrapped__(hub, state)  # type: ignore[attr-defined]
    return result


def collect(hub: Hub, state: ServerState, plan: RoundPlan, poisoned: Sequence[str] = ()) -> Collection:
    """Train, compress and admit all waves; the updates of some clients are NaN."""
    collected = None
    for wave in plan.waves:
        batch: Any = stages.train(hub, plan, sent(hub, state), wave)
        for row, client_id in enumerate(batch.client_ids):
            if client_id in poisoned:
                batch.updates_NM[row] = np.nan
        collected = stages.admit(hub, plan, stages.compress(hub, plan, batch), collected)
    assert collected is not None
    return collected


def step(hub: Hub, state: ServerState, plan: RoundPlan, cohort: SealedCohort) -> ServerState:
    """Move the server's parameters by a sealed cohort."""
    return stages.server_step(hub, plan, state, sent(hub, state), cohort)


def aggregate(hub: Hub, state: ServerState, plan: RoundPlan, collected: Collection) -> ServerState:
    """Seal what was collected, and move the server's parameters by it."""
    return step(hub, state, plan, stages.aggregate(hub, plan, state, collected))


def finish(hub: Hub, state: ServerState, plan: RoundPlan, collected: Collection) -> RoundResult:
    """Seal, move the parameters, evaluate and commit."""
    cohort = stages.aggregate(hub, plan, state, collected)
    state = step(hub, state, plan, cohort)
    return stages.commit(hub, plan, state, cohort, stages.evaluate(hub, state))
