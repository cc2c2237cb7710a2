"""What every selection rule does, and what it is told of the clients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.population.availability import Always, AvailabilityRule, Rows
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.values import Sampling

MAX_CANDIDATES_PER_SLOT: Final = 100
"""At most so many candidates are looked at for a seat of a cohort: a round's cost must not follow the population."""


@dataclass(frozen=True, slots=True)
class Strata:
    """The clients sorted by an attribute: stratum s has the rows `order[starts[s] : starts[s] + sizes[s]]`."""

    order: Rows
    starts: Rows
    sizes: Rows

    @classmethod
    def of(cls, values_n: Rows) -> Strata:
        """Of each client's value as a number from 0, int64 [n].

        >>> Strata.of(np.array([1, 0, 1])).order
        array([1, 0, 2])
        """
        sizes = np.bincount(values_n)
        return cls(np.argsort(values_n, kind="stable"), np.cumsum(sizes) - sizes, sizes)


@dataclass(frozen=True, slots=True)
class Clients:
    """The table of clients in one round, as a selection rule sees it.

    Args:
      num_clients: n; a client is named by its row, 0 to n - 1.
      round: the round that is being planned.
      seed: the configuration's, from which the availability of simulated clients is drawn.
      availability: which simulated clients are there.
      strata: the clients sorted by an attribute, by its name. Sorted once for all rounds.
      participations: in how many committed rounds of this run the clients in the given rows [N] took part, int64 [N].
        Kept only for a rule whose `uses_history` is true.
    """

    num_clients: int
    round: int
    seed: int
    strata: Callable[[str], Strata]
    participations: Callable[[Rows], Rows]
    availability: AvailabilityRule = field(default_factory=Always)

    @property
    def always_available(self) -> bool:
        """Whether every client is there in every round."""
        return isinstance(self.availability, Always)

    def available(self, rows_N: Rows) -> NDArray[np.bool_]:
        """Whether the clients in these rows are there in this round, bool [N]."""
        return self.availability.available(rows_N, self.round, self.seed)


class SelectionRule(Rule):
    """The clients of one round, drawn from a table of clients in time proportional to the cohort."""

    kind: str
    min_updates: int = Field(
        default=1, ge=0, description="a round with fewer usable updates than this ends the run as TooFewClients"
    )

    @property
    def uses_history(self) -> bool:
        """Whether the store keeps, for this rule, how often each client took part."""
        return False

    @abstractmethod
    def cohort_size_of(self, num_clients: int) -> int:
        """How many clients a round selects (the expected number, where it is random)."""

    def max_cohort_size_of(self, num_clients: int) -> int:
        """How many clients a round selects at most."""
        return self.cohort_size_of(num_clients)

    def sampling(self, num_clients: int) -> Sampling:
        """How the cohort is drawn from `num_clients`. What a rule does not say is "other"."""
        size = self.cohort_size_of(num_clients)
        return Sampling("other", num_clients, size, size / num_clients)

    @abstractmethod
    def select(self, clients: Clients, generator: np.random.Generator) -> Rows:
        """The rows of the selected clients, ascending, int64 [N]. Fewer where too few are available."""

    def draw(self, clients: Clients, pool: Rows | int, size: int, generator: np.random.Generator) -> Rows:
        """`size` of the available clients among `pool` (rows, or the first so many rows), each set equally likely.

        In random order, int64 [at most size]. At most `MAX_CANDIDATES_PER_SLOT` candidates a seat are looked at.
        """
        num_candidates = pool if isinstance(pool, int) else len(pool)
        limit = min(num_candidates, MAX_CANDIDATES_PER_SLOT * size)
        looked_at = min(limit, 2 * size)
        while True:
            rows_N = generator.choice(num_candidates, looked_at, replace=False)
            rows_N = rows_N if isinstance(pool, int) else pool[rows_N]
            rows_N = rows_N[clients.available(rows_N)]
            if len(rows_N) >= size or looked_at == limit:
                return rows_N[:size]
            looked_at = min(limit, 4 * looked_at)
