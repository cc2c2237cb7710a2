"""Stratified selection.

A cohort in which each group of clients has its share (Cochran 1977, "Sampling techniques", chapter 5).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.population.availability import Rows
from fedrounds.fl_components.population.selection import Clients, SelectionRule


class Stratified(SelectionRule):
    """`cohort_size` clients, of each stratum its share, drawn uniformly within it.

    Args:
      by: the attribute whose values are the strata: one that the data has, or "majority_label".
      cohort_size: clients in a round. Fewer, where a stratum has fewer available ones than its share.
      shares: "proportional" to the strata's sizes, or "equal". What does not divide goes to the largest remainders, of
        equal ones to strata drawn anew in each round.
    """

    kind: Literal["stratified"] = "stratified"
    by: str
    cohort_size: int = Field(ge=1)
    shares: Literal["proportional", "equal"] = "proportional"

    def cohort_size_of(self, num_clients: int) -> int:
        return self.cohort_size

    def select(self, clients: Clients, generator: np.random.Generator) -> Rows:
        strata = clients.strata(self.by)
        chosen = [
            self.draw(clients, strata.order[start : start + size], seats, generator)
            for start, size, seats in zip(
                strata.starts, strata.sizes, self._seats(strata.sizes, generator), strict=True
            )
            if seats
        ]
        return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)

    def _seats(self, sizes: Rows, generator: np.random.Generator) -> list[int]:
        """The strata's seats: cohort_size in all, no stratum more than it has clients."""
        weights = sizes if self.shares == "proportional" else np.ones_like(sizes)
        whole, remainders = np.divmod(weights * self.cohort_size, weights.sum())  # in integers, so that ties are ties
        seats = np.minimum(whole, sizes)
        order = np.lexsort((generator.random(len(sizes)), -remainders))
        while (left := self.cohort_size - int(seats.sum())) > 0 and (seats < sizes).any():
            open_ = [stratum for stratum in order if seats[stratum] < sizes[stratum]][:left]
            seats[open_] += 1
        return [int(each) for each in seats]
