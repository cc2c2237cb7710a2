"""Poisson selection.

The sampling that privacy amplification is proved for (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, and the
client-level form of McMahan et al. 2018, https://arxiv.org/abs/1710.06963).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.population.availability import Rows
from fedrounds.fl_components.population.selection import Clients, SelectionRule
from fedrounds.fl_components.values import Sampling


class Poisson(SelectionRule):
    """Each client by a coin of its own, with the same probability: the size of the cohort is random, perhaps zero.

    The coins are flipped over the whole table, before anybody asks who is there; a client that is absent contributes
    nothing and is not replaced. A round without updates moves nothing but the server's momentum.

    >>> Poisson(sampling_rate=0.01).cohort_size_of(5_000)
    50
    """

    kind: Literal["poisson"] = "poisson"
    sampling_rate: float = Field(gt=0, le=1)
    min_updates: int = Field(default=0, ge=0)

    def cohort_size_of(self, num_clients: int) -> int:
        return round(self.sampling_rate * num_clients)

    def max_cohort_size_of(self, num_clients: int) -> int:
        return num_clients

    def sampling(self, num_clients: int) -> Sampling:
        return Sampling("poisson", num_clients, self.sampling_rate * num_clients, self.sampling_rate)

    def select(self, clients: Clients, generator: np.random.Generator) -> Rows:
        # So many heads, and then which: the same as a coin for each client, in time that follows the cohort.
        heads = int(generator.binomial(clients.num_clients, self.sampling_rate))
        rows_N = np.sort(generator.choice(clients.num_clients, heads, replace=False, shuffle=False))
        return rows_N[clients.available(rows_N)]
