"""Multinomial logistic regression: one linear layer on the flattened input."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fl_components.models.base import ModelRule, shaped


class LogisticRegression(ModelRule):
    """One linear layer that starts at zero: a convex problem, for which the start does not matter.

    >>> LogisticRegression().build((28, 28), (10,))[1]
    Linear(in_features=784, out_features=10, bias=True)
    """

    kind: Literal["logistic_regression"] = "logistic_regression"

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Sequential:
        linear = torch.nn.Linear(math.prod(input_shape), math.prod(output_shape))
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
        return torch.nn.Sequential(torch.nn.Flatten(), linear, *shaped(output_shape))
