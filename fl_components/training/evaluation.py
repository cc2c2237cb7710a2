"""Evaluation on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fl_components.privacy.releases import Release, charged, withheld
from fl_components.rules import Rule
from fl_components.training.loss import num_labels, sum_loss
from fl_components.training.threads import one_thread
from fl_components.values import Weighted

BATCH_SIZE = 1024


class Evaluation(Rule):
    """Every `every` rounds and after the last one: on all test examples together and, if asked, on each client's.

    `public_test` declares that anyone may have the test examples, for instance such as are no client's: then loss and
    accuracy on all of them together are shown under a privacy claim as well. A model that was paid for says nothing
    more of the training examples by them.
    """

    every: int = Field(default=1, ge=1)
    per_client: bool = True
    public_test: bool = False

    def releases(self, metrics: Mapping[str, float]) -> dict[str, Release]:
        """The metrics of a round, each with the reason why it may be seen."""
        shown = ("eval/loss", "eval/accuracy") if self.public_test else ()
        return {name: charged(value) if name in shown else withheld(value) for name, value in metrics.items()}


def evaluate(module: torch.nn.Module, x: NDArray[Any], y: NDArray[np.int64]) -> tuple[Weighted, Weighted]:
    """Loss (mean cross-entropy) and accuracy of `module` on the examples' labels, as sums that add."""
    loss_sum, correct, counted = 0.0, 0, 0
    module.eval()
    with one_thread(), torch.no_grad():
        for start in range(0, len(y), BATCH_SIZE):
            labels = torch.from_numpy(y[start : start + BATCH_SIZE])
            scores = module(torch.from_numpy(x[start : start + BATCH_SIZE]))
            loss_sum += sum_loss(scores, labels).item()
            correct += int((scores.argmax(-1) == labels).sum())  # an ignored label is no class
            counted += num_labels(labels)
    return Weighted(loss_sum, counted), Weighted(correct, counted)
