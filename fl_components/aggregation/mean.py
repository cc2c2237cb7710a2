"""The mean of the updates: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
data", algorithm 1 (https://arxiv.org/abs/1602.05629)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from fedrounds.fl_components.aggregation.base import AdditiveRule
from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.values import Accumulator


class Mean(AdditiveRule):
    """sum_i w_i delta_i / sum_i w_i, where w_i is the client's number of examples (but no more than `max_examples`), or
    1.

    >>> rule = Mean(weights="num_examples")
    >>> deltas_ND = np.array([[1.0, 0.0], [4.0, 3.0]], np.float32)
    >>> rule.aggregate(rule.add(rule.init(2), deltas_ND, np.array([2.0, 1.0])))
    array([2., 1.])
    """

    kind: Literal["mean"] = "mean"
    weights: Literal["num_examples", "uniform"] = "num_examples"
    max_examples: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _uniform_weights_have_no_cap(self) -> Mean:
        if self.weights == "uniform" and self.max_examples is not None:
            raise ValueError(
                f"aggregation.max_examples is {self.max_examples} but aggregation.weights is uniform: every client "
                "weighs the same whatever it has; leave aggregation.max_examples out, or set weights to num_examples"
            )
        return self

    @property
    def max_weight(self) -> float | None:
        return self.max_examples if self.weights == "num_examples" else 1.0

    def weigh(self, num_examples_N: Float64) -> Float64:
        if self.weights == "uniform":
            return np.ones(len(num_examples_N))
        return num_examples_N if self.max_examples is None else np.minimum(num_examples_N, self.max_examples)

    def aggregate(self, partial: Accumulator) -> Float64:
        mean_D: Float64 = partial.tensors["sum"] / (partial.tensors["weight"] if partial.count else 1.0)
        return mean_D
