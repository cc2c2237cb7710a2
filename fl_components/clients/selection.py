"""What every selection rule does, and what it is told of the clients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fl_components.rules import Rule


@dataclass(frozen=True, slots=True)
class Clients:
    """The table of clients in one round, as a selection rule sees it.

    Args:
      num_clients: n; a client is named by its row, 0 to n - 1.
      round: the round that is being planned.
      seed: the configuration's, from which the availability of simulated clients is drawn.
      attribute: the clients' values of an attribute by its name, as numbers from 0, int64 [n].
      participations: in how many committed rounds of this run the clients in the given rows [N] took part, int64 [N].
        Kept only for a rule whose `uses_history` is true.
    """

    num_clients: int
    round: int
    seed: int
    attribute: Callable[[str], NDArray[np.int64]]
    participations: Callable[[NDArray[np.int64]], NDArray[np.int64]]


class SelectionRule(Rule):
    """The clients of one round, drawn from a table of clients in time proportional to the cohort."""

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

    @abstractmethod
    def select(self, clients: Clients, generator: np.random.Generator) -> NDArray[np.int64]:
        """The rows of the selected clients, ascending, int64 [N]."""
