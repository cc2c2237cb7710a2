"""The channels of an objective while clients train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.training.objectives import ObjectiveRule


class ClientChannels:
    """The channels of C clients that train from the same broadcast.

    Args:
      objective: with channels.
      base_M: what the server sent, float32 [M]: the parameters, then each channel.
      kept: the channels that each client keeps, float32 [D] each; a missing one is zeros.
    """

    def __init__(self, objective: ObjectiveRule, base_M: Tensor, kept: Sequence[Mapping[str, Float32]]) -> None:
        _, *received = torch.split(base_M, len(base_M) // (1 + len(objective.channels)))
        zeros_D = np.zeros(len(received[0]), np.float32)
        self._objective = objective
        self._received = dict(zip(objective.channels, received, strict=True))
        self._kept = {
            name: torch.from_numpy(np.stack([channels.get(name, zeros_D) for channels in kept])).to(base_M.device)
            for name in objective.channels
        }

    def corrections(self, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return what the objective corrects gradients by, float32 [C, *shape] for each parameter."""
        correction_CD = self._objective.correction(self._received, self._kept)
        parts = torch.split(correction_CD, [math.prod(shape) for shape in shapes], dim=1)
        return [part.reshape(len(part), *shape) for part, shape in zip(parts, shapes, strict=True)]

    def sent(self, delta_CD: Tensor, num_steps: Sequence[int], learning_rate: float) -> list[Tensor]:
        """Return the channels that the clients send, float32 [C, D] each, after so many steps of each client."""
        scale = [1 / (steps * learning_rate) if steps else 0.0 for steps in num_steps]
        scale_C1 = torch.tensor(scale, device=delta_CD.device)[:, None]
        sent = self._objective.sent(delta_CD, self._received, self._kept, scale_C1)
        return [sent[name] for name in self._objective.channels]


def next_kept(
    objective: ObjectiveRule, kept: Mapping[str, Float32], update: Mapping[str, Float32]
) -> dict[str, Float32]:
    """Return the channels that a client keeps after it sent `update`, float32 [D] each; none without channels.

    Args:
      kept: the channels that it kept before; a missing one is zeros.
      update: all channels of the update.
    """
    if not objective.channels:
        return {}
    before = {name: kept.get(name, np.zeros_like(update[name])) for name in objective.channels}
    return dict(objective.next_kept(before, {name: update[name] for name in objective.channels}))
