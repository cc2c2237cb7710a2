"""Multilayer perceptron: linear layers with ReLU between them, on the flattened input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedrounds.fl_components.models.base import ModelRule, shaped


class Mlp(ModelRule):
    """Hidden layers of the given widths, each followed by ReLU, then a linear layer to the classes.

    The default, two hidden layers of 200, is the "2NN" of McMahan et al., 2017, "Communication-efficient learning of
    deep networks from decentralized data": 199,210 parameters on MNIST.

    >>> from fedrounds.fl_components.parameters import num_parameters
    >>> num_parameters(Mlp().build((784,), (10,)))
    199210
    """

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(200, 200), min_length=1)

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Sequential:
        layers: list[torch.nn.Module] = [torch.nn.Flatten()]
        for width_in, width_out in pairwise((math.prod(input_shape), *self.hidden)):
            layers += [torch.nn.Linear(width_in, width_out), torch.nn.ReLU()]
        layers.append(torch.nn.Linear(self.hidden[-1], math.prod(output_shape)))
        return torch.nn.Sequential(*layers, *shaped(output_shape))
