"""Regression: each example has a number that is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.targets import TargetType
from fedrounds.fl_components.task.base import LearningTask, Reduction
from fedrounds.fl_components.task.metrics import Metric, Statistic, mean


class Regression(LearningTask):
    """Each example has one number as its target; the model gives one output.

    The loss is the squared error. Targets are taken as they are: scale them in the data where they are large. Metrics:
    `mse` and `mae`, the mean squared and absolute error; `r2`, the coefficient of determination, which is not defined
    for targets that are all equal.

    >>> Regression().loss(torch.tensor([[1.0], [4.0]]), torch.tensor([1.0, 2.0])).item()
    2.0
    """

    kind: Literal["regression"] = "regression"

    targets: ClassVar[TargetType] = TargetType.NUMBER
    default_metrics: ClassVar[tuple[str, ...]] = ("mse", "mae", "r2")
    default_primary: ClassVar[str] = "mse"

    def output_size(self, num_classes: int) -> int:
        return 1

    def loss(
        self, outputs: Tensor, targets: Tensor, reduction: Reduction = "mean", label_smoothing: float = 0.0
    ) -> Tensor:
        flat = targets.flatten()
        counted = self.targets.counted(flat)
        losses = torch.where(counted, outputs.flatten() - flat, 0.0).square()
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()

    def own_metrics(self, class_names: Sequence[str]) -> dict[str, Metric]:
        return {
            "mse": Metric(Statistic(_squared_error), mean, higher_is_better=False),
            "mae": Metric(Statistic(_absolute_error), mean, higher_is_better=False),
            "r2": Metric(Statistic(_predictions, is_additive=False), _r2, higher_is_better=True),
        }

    def synthetic_targets(self, shape: Sequence[int], generator: Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator)

    def hard_targets(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is 1 above the model's output: the gradient of the loss is -2."""
        return outputs[:, 0] + 1, torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)


def _predictions(outputs: Tensor, targets: Tensor) -> Float64:
    """Of each target that counts its value and the model's, [R, 2]."""
    flat = targets.flatten()
    both = torch.stack([flat, outputs.flatten()], dim=1)
    return both[TargetType.NUMBER.counted(flat)].double().numpy(force=True)


def _squared_error(outputs: Tensor, targets: Tensor) -> Float64:
    pairs = _predictions(outputs, targets)
    return np.array([np.square(pairs[:, 0] - pairs[:, 1]).sum(), len(pairs)])


def _absolute_error(outputs: Tensor, targets: Tensor) -> Float64:
    pairs = _predictions(outputs, targets)
    return np.array([np.abs(pairs[:, 0] - pairs[:, 1]).sum(), len(pairs)])


def _r2(pairs: Float64) -> float | None:
    from sklearn.metrics import r2_score  # takes a second to import

    if not np.isfinite(pairs).all() or len(pairs) < 2 or np.ptp(pairs[:, 0]) == 0:
        return None
    return float(r2_score(pairs[:, 0], pairs[:, 1]))
