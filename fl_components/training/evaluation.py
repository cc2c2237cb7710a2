"""Evaluation on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.errors import ModelError, one_line
from fedrounds.fl_components.models import check_scores, failing_layer
from fedrounds.fl_components.privacy.releases import Release, charged, withheld
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.training.loss import num_labels, sum_loss
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.values import Weighted

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


def evaluate(
    module: torch.nn.Module, x: NDArray[Any], y: NDArray[np.int64], whose: str = "the test rows"
) -> tuple[Weighted, Weighted]:
    """Loss (mean cross-entropy) and accuracy of `module` on the examples' labels, as sums that add.

    The module is given copies of the rows. Raises `ModelError`, which says whose rows these are, where it fails or
    returns no scores.

    >>> evaluate(torch.nn.Linear(2, 3), np.zeros((4, 2), np.float32), np.zeros(4, np.int64))[1].weight
    4
    """
    loss_sum, correct, counted = 0.0, 0, 0
    module.eval()
    with one_thread(), torch.no_grad():
        for start in range(0, len(y), BATCH_SIZE):
            labels = torch.from_numpy(y[start : start + BATCH_SIZE])
            rows = torch.from_numpy(x[start : start + BATCH_SIZE])
            scores = _scores(module, rows, labels, whose)
            loss_sum += sum_loss(scores, labels).item()
            correct += int((scores.argmax(-1) == labels).sum())  # an ignored label is no class
            counted += num_labels(labels)
    return Weighted(loss_sum, counted), Weighted(correct, counted)


def _scores(module: torch.nn.Module, rows: torch.Tensor, labels: torch.Tensor, whose: str) -> torch.Tensor:
    came_in = f"rows of {str(rows.dtype).removeprefix('torch.')} {list(rows.shape[1:])}"
    try:
        scores = module(rows.clone())
    except Exception as error:
        raise ModelError(
            f"the model failed while it was evaluated on {whose}{failing_layer(module, rows)}: {one_line(error)}",
            hint="the model must take every row of the data in evaluation mode; correct it, then resume the run",
        ) from error
    classes = scores.shape[-1] if isinstance(scores, torch.Tensor) and scores.ndim else 0
    try:
        return check_scores(scores, len(rows), (*labels.shape[1:], classes), came_in)
    except ModelError as error:
        raise ModelError(f"{error.message}, while it was evaluated on {whose}", hint=error.hint) from None
