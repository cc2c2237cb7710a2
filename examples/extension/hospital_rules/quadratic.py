"""A model: one linear layer on the inputs and their squares."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fedrounds.fl_components.models import ModelRule


class Quadratic(ModelRule):
    """Its borders are circles and ellipses, where those of logistic regression are lines."""

    kind: Literal["quadratic"] = "quadratic"

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Module:
        return _Quadratic(math.prod(input_shape), output_shape[-1])


class _Quadratic(torch.nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2 * inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.linear(torch.cat([x, x.square()], dim=1))
