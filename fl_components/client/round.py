"""A client's part of a round, wherever the client is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Tensors, params_digest
from fedrounds.fl_components.client.broadcast import decode_broadcast
from fedrounds.fl_components.client.encoding import encode_updates
from fedrounds.fl_components.client.spec import RoundSpec
from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.training import next_kept, one_thread
from fedrounds.fl_components.values import Weighted

RESIDUAL: Final = "residual"
"""What compression left out of the client's updates so far, with error feedback."""

HELD: Final = "held"
"""The base of the round before, where parameters travel as differences."""


@dataclass(frozen=True, slots=True)
class ClientExamples:
    """One client's training examples.

    Args:
      x: the inputs, [n, ...].
      y: the labels, [n, ...].
    """

    x: NDArray[Any]
    y: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a client has after its part of a round.

    Args:
      frame: the update, for the server.
      state: what the client keeps for its next round.
      loss: the mean training loss, which stays at the client unless it may be shown.
    """

    frame: bytes
    state: Tensors = field(default_factory=dict)
    loss: Weighted = field(default_factory=Weighted)


def run_round(
    spec: RoundSpec,
    frame: bytes,
    examples: ClientExamples,
    state: Tensors | None = None,
    secret: bytes | None = None,
) -> Answer:
    """Return a client's answer in one round: receive, train, protect, compress, frame.

    It needs no server, store or other client.

    Args:
      spec: everything that the client must know of the round.
      frame: the broadcast.
      examples: the client's training examples.
      state: what the client kept after its last round; None or empty before the first.
      secret: the client's secret of the round (32 bytes), where it makes a claim about each of its examples.

    Raises:
      WireError: the broadcast is damaged, or has another base than the specification names.
      ModelError: the model cannot be built, or fails.
    """
    state = state or {}
    module = spec.model.build()
    shapes = tuple(tuple(parameter.shape) for parameter in module.parameters() if parameter.requires_grad)
    received, layout = spec.broadcast_layout(shapes), spec.update_layout(shapes)

    base_M = decode_broadcast(
        spec.broadcast, received.channels, frame, state.get(HELD), spec.broadcast_context(received)
    )
    if params_digest(base_M) != spec.base_digest:
        raise WireError(
            f"the round's specification names the base {spec.base_digest[:16]}, and the broadcast is another"
        )

    channels = spec.training.objective.channels
    kept = {name: state[name] for name in channels if name in state}
    with one_thread(), torch.random.fork_rng(devices=[]):
        update_M, loss = spec.training.train(
            module,
            base_M,
            examples.x,
            examples.y,
            int(spec.seed, 16),
            secret,
            work=spec.work,
            kept=kept,
            learning_task=spec.task,
        )
        new_state = next_kept(spec.training.objective, kept, layout.split(update_M))
        if spec.compression.error_feedback:
            update_M = update_M + state.get(RESIDUAL, np.float32(0))
        update_1M = update_M[None]
        (update_frame,), _ = encode_updates(
            spec.compression,
            [spec.client_id],
            layout.channels,
            spec.base_digest,
            update_1M,
            spec.update_context(layout),
            keep_residuals=spec.compression.error_feedback,
        )
    if spec.compression.error_feedback:
        new_state[RESIDUAL] = update_1M[0]
    if spec.broadcast.mode == "delta":
        new_state[HELD] = base_M
    return Answer(update_frame, new_state, loss)
