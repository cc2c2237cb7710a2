"""Quantity skew: clients draw from the same distribution, but some have many more rows than others."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.data.federated import Array, Labels, RowRanges
from fedrounds.fl_components.data.partition.base import Assignment, PartitionRule, check_enough


class QuantitySkew(PartitionRule):
    """The rows are shuffled, and cut into parts whose sizes are log-normal with deviation `sigma` of the logarithm.

    As the unbalanced splits of Acar et al. (2021, "Federated learning based on dynamic regularization"). At `sigma` 0
    all clients are equal; at 1 the largest of 100 has more than ten times the median. Every client has `min_examples`
    rows, and only what is above them is skewed.

    >>> dealt = QuantitySkew(num_clients=4, sigma=1.0).deal(np.zeros(1000, np.int64), np.random.default_rng(0))
    >>> int(dealt.rows.lengths.sum())
    1000
    """

    kind: Literal["quantity_skew"] = "quantity_skew"
    num_clients: int = Field(ge=1)
    sigma: float = Field(ge=0.0, le=10.0)
    min_examples: int = Field(default=1, ge=1)

    def known_num_clients(self) -> int:
        return self.num_clients

    def deal(self, labels_M: Labels, generator: np.random.Generator, owners_M: Array | None = None) -> Assignment:
        num_rows = len(labels_M)
        check_enough(num_rows, self.num_clients, self.min_examples, "make num_clients or min_examples smaller")
        order = generator.permutation(num_rows)
        share_n = generator.lognormal(0.0, self.sigma, self.num_clients)
        above_minimum = share_n / share_n.sum() * (num_rows - self.num_clients * self.min_examples)
        size_n = self.min_examples + np.floor(above_minimum).astype(np.int64)
        remainder = num_rows - int(size_n.sum())
        size_n[np.argsort(np.floor(above_minimum) - above_minimum, kind="stable")[:remainder]] += 1
        return Assignment(order, RowRanges.consecutive(size_n), NumberedIds(self.num_clients))
