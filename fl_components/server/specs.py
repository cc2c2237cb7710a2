"""What the server tells a client of a round."""

from __future__ import annotations

from fedrounds.fl_components.client import RoundSpec, seed_text
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.values import ClientTask, RoundPlan


def round_spec(
    federation: Federation, plan: RoundPlan, task: ClientTask, source: int | bytes, state_round: int | None = None
) -> RoundSpec:
    """Return the specification of one client's part of a round.

    Args:
      source: what the round's draws come from: the seed, or under a claim a secret.
      state_round: the round in which the client last took part.
    """
    config = federation.config
    return RoundSpec(
        run_id=plan.run_id,
        round=plan.round,
        collection=plan.collection,
        client_id=task.client_id,
        base_digest=plan.base_digest,
        model=federation.model_spec,
        task=config.task,
        training=config.training.resolve(plan.round, config.rounds),
        compression=config.compression,
        broadcast=config.broadcast,
        privacy=config.privacy,
        seed=seed_text(task.seed),
        round_seed=seed_text(derive_key(source, plan.round, "compression")),
        broadcast_seed=seed_text(derive_key(config.seed, plan.round, "broadcast")),
        work=task.work,
        state_round=state_round,
    )
