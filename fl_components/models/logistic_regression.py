"""Multinomial logistic regression: one linear layer on the flattened input."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fedrounds.fl_components.models.base import ModelRule, shaped


class LogisticRegression(ModelRule):
    """One linear layer that starts at zero: a convex problem, for which the start does not matter.

    Without a `bias` what is learnt is in the inputs alone: under example-level privacy a bias takes its part of each
    clipped gradient, and is worth it only where classes are far from equally frequent.

    >>> LogisticRegression().build((28, 28), (10,))[1]
    Linear(in_features=784, out_features=10, bias=True)
    """

    kind: Literal["logistic_regression"] = "logistic_regression"
    bias: bool = True

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Sequential:
        linear = torch.nn.Linear(math.prod(input_shape), math.prod(output_shape), bias=self.bias)
        for parameter in linear.parameters():
            torch.nn.init.zeros_(parameter)
        return torch.nn.Sequential(torch.nn.Flatten(), linear, *shaped(output_shape))
