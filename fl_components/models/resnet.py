"""Residual network (He et al. 2016, https://arxiv.org/abs/1512.03385) with GroupNorm in the place of BatchNorm.

BatchNorm's running statistics differ from client to client; GroupNorm has none, and does better where clients' data
differ (Hsieh et al. 2020, https://arxiv.org/abs/1910.00189).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import relu

from fedrounds.fl_components.models.base import ModelRule, image_shape, shaped
from fedrounds.fl_components.models.rowwise import rowwise


class ResNet(ModelRule):
    """A 3 x 3 stem as for CIFAR, then stages of basic blocks; each stage after the first halves the image and doubles
    the width. The default is ResNet-18's depth.

    Args:
      blocks: how many blocks each stage has.
      width: channels of the first stage.
      groups: of each GroupNorm; must divide `width`.

    >>> from fedrounds.fl_components.parameters import num_parameters
    >>> num_parameters(ResNet(blocks=(1, 1), width=8, groups=4).build((3, 32, 32), (10,)))
    5266
    """

    kind: Literal["resnet"] = "resnet"
    blocks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(2, 2, 2, 2), min_length=1)
    width: int = Field(default=64, ge=1)
    groups: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _groups_divide_the_width(self) -> ResNet:
        if self.width % self.groups:
            raise ValueError(
                f"model.groups is {self.groups} and model.width {self.width}: GroupNorm needs groups of equal size; "
                "make model.width a multiple of model.groups"
            )
        return self

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> nn.Sequential:
        depth, height, _ = image_shape(input_shape, self.kind, at_least=2 ** (len(self.blocks) - 1))
        layers: list[nn.Module] = [nn.Unflatten(1, (depth, height))] if len(input_shape) == 2 else []
        layers += [
            nn.Conv2d(depth, self.width, 3, padding=1, bias=False),
            nn.GroupNorm(self.groups, self.width),
            nn.ReLU(),
        ]
        channels = self.width
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                out = self.width * 2**stage
                layers.append(_Block(channels, out, 2 if stage and not block else 1, self.groups))
                channels = out
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, math.prod(output_shape))]
        return nn.Sequential(*layers, *shaped(output_shape))


@rowwise
class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.GroupNorm(groups, channels_out)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
