"""A small decoder-only transformer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), normalised before each part
(Xiong et al. 2020, https://arxiv.org/abs/2002.04745)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fedrounds.fl_components.models.base import ModelRule, tokens_shape
from fedrounds.fl_components.models.rowwise import rowwise


class Transformer(ModelRule):
    """Scores of each position from the tokens up to it or, where a row has one label, of the last position.

    Args:
      width, heads, layers: of the blocks; `heads` must divide `width`.
      dropout: after the embedding and after each part of a block; drawn anew in each client.
      vocabulary: how many tokens there are; by default as many as classes, which is right for the next token.

    >>> Transformer(width=16, heads=2, layers=1).build((80,), (65,))(torch.zeros(2, 80, dtype=torch.int64)).shape
    torch.Size([2, 65])
    """

    kind: Literal["transformer"] = "transformer"
    width: int = Field(default=64, ge=1)
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=2, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    vocabulary: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Transformer:
        if self.width % self.heads:
            raise ValueError(
                f"model.heads is {self.heads} and model.width {self.width}: heads are parts of equal width; make "
                "model.width a multiple of model.heads"
            )
        return self

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> nn.Module:
        return _Transformer(self, tokens_shape(input_shape, output_shape, self.kind), output_shape)


@rowwise
class _Transformer(nn.Module):
    def __init__(self, rule: Transformer, length: int, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.every_position = len(output_shape) == 2
        self.embedding = nn.Embedding(rule.vocabulary or output_shape[-1], rule.width)
        self.positions = LearnedPositions(length, rule.width)
        self.dropout = nn.Dropout(rule.dropout)
        self.blocks = nn.Sequential(*(_Block(rule) for _ in range(rule.layers)))
        self.norm = nn.LayerNorm(rule.width)
        self.scores = nn.Linear(rule.width, output_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.norm(self.blocks(self.dropout(self.positions(self.embedding(tokens)))))
        scores: Tensor = self.scores(states if self.every_position else states[:, -1])
        return scores


@rowwise
class LearnedPositions(nn.Module):
    """Adds to each of T positions a vector of its own: [B, T, width] to [B, T, width]."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, width) * 0.02)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.weight


@rowwise
class _Block(nn.Module):
    def __init__(self, rule: Transformer) -> None:
        super().__init__()
        self.heads = rule.heads
        self.norm1, self.norm2 = nn.LayerNorm(rule.width), nn.LayerNorm(rule.width)
        self.attention_in = nn.Linear(rule.width, 3 * rule.width)
        self.attention_out = nn.Linear(rule.width, rule.width)
        self.dense = nn.Sequential(
            nn.Linear(rule.width, 4 * rule.width), nn.GELU(), nn.Linear(4 * rule.width, rule.width)
        )
        self.dropout = nn.Dropout(rule.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attend(self.norm1(x)))
        x = x + self.dropout(self.dense(self.norm2(x)))
        return x

    def attend(self, x: Tensor) -> Tensor:
        split = self.attention_in(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, width / heads]
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(attended.transpose(1, 2).flatten(2))
        return out
