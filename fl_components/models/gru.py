"""A recurrent network over tokens: embedding, gated recurrent units (Cho et al. 2014, https://arxiv.org/abs/1406.1078)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedrounds.fl_components.models.base import ModelRule, tokens_shape
from fedrounds.fl_components.models.rowwise import rowwise


class Gru(ModelRule):
    """Scores of each position from the tokens up to it or, where a row has one label, of the last position.

    Args:
      embedding, hidden, layers: widths of the embedding and of the recurrent layers, and how many of these.
      dropout: between the layers and before the scores; drawn anew in each client.
      vocabulary: how many tokens there are; by default as many as classes, which is right for the next token.

    >>> Gru(hidden=16).build((80,), (80, 65))(torch.zeros(2, 80, dtype=torch.int64)).shape
    torch.Size([2, 80, 65])
    """

    kind: Literal["gru"] = "gru"
    embedding: int = Field(default=8, ge=1)
    hidden: int = Field(default=256, ge=1)
    layers: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    vocabulary: int | None = Field(default=None, ge=1)

    def build(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> torch.nn.Module:
        tokens_shape(input_shape, output_shape, self.kind)
        return _Gru(self, output_shape)


@rowwise
class _Gru(torch.nn.Module):
    def __init__(self, rule: Gru, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.every_position = len(output_shape) == 2
        self.embedding = torch.nn.Embedding(rule.vocabulary or output_shape[-1], rule.embedding)
        between = rule.dropout if rule.layers > 1 else 0.0
        self.gru = torch.nn.GRU(rule.embedding, rule.hidden, rule.layers, batch_first=True, dropout=between)
        self.dropout = torch.nn.Dropout(rule.dropout)
        self.scores = torch.nn.Linear(rule.hidden, output_shape[-1])

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.gru(self.embedding(tokens))
        scores: Tensor = self.scores(self.dropout(states if self.every_position else states[:, -1]))
        return scores
