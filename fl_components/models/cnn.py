"""The convolutional network of McMahan et al. 2017 (https://arxiv.org/abs/1602.05629) for small images."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field

from fedrounds.fl_components.models.base import ModelRule, image_shape, shaped


class Cnn(ModelRule):
    """Two 5 x 5 convolutions, each followed by ReLU and 2 x 2 max pooling, then a dense layer, then the classes.

    With the default widths, the paper's: 1,663,370 parameters on MNIST. Takes images [channels, height, width], or
    [height, width] of one channel.

    >>> from fedrounds.fl_components.parameters import num_parameters
    >>> num_parameters(Cnn().build((1, 28, 28), (10,)))
    1663370
    """

    kind: Literal["cnn"] = "cnn"
    channels: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        default=(32, 64), description="of the two convolutions"
    )
    hidden: int = Field(default=512, ge=1, description="width of the dense layer")

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Sequential:
        depth, height, width = image_shape(input_shape, self.kind, at_least=4)
        first, second = self.channels
        return torch.nn.Sequential(
            torch.nn.Unflatten(1, (depth, height)) if len(input_shape) == 2 else torch.nn.Identity(),
            torch.nn.Conv2d(depth, first, 5, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(first, second, 5, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(second * (height // 4) * (width // 4), self.hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(self.hidden, math.prod(output_shape)),
            *shaped(output_shape),
        )
