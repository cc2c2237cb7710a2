"""Population: who the clients are. It holds none of their examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.population.selection import Strata


def _no_attributes(name: str) -> NDArray[np.int64]:
    raise DataError(
        f"the clients of this population have no attribute {name!r}",
        hint="they have none at all: choose another selection",
    )


@dataclass(frozen=True, eq=False)
class Population:
    """The clients that share a privacy budget, simulated or registered.

    Args:
      client_ids: the ids of the n clients.
      num_examples_n: how many training examples each client has, int64 [n].
      is_public: whether their data are declared public.
      attribute: returns each client's value of a named attribute as a number from 0, int64 [n]. Raises `DataError`
        for an attribute that clients do not have.

    >>> population = Population(["a", "b"], np.array([30, 50]), is_public=False)
    >>> population.size, population.num_examples(1)
    (2, 50)
    """

    client_ids: Sequence[str]
    num_examples_n: NDArray[np.int64]
    is_public: bool
    attribute: Callable[[str], NDArray[np.int64]] = field(default=_no_attributes, repr=False)
    strata: Callable[[str], Strata] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.client_ids) == len(self.num_examples_n) > 0:
            raise DataError(
                f"a population has {len(self.client_ids)} client ids and {len(self.num_examples_n)} numbers of "
                "examples: give one number for each of at least one client"
            )
        attribute = self.attribute
        object.__setattr__(self, "strata", cache(lambda name: Strata.of(attribute(name))))

    @property
    def size(self) -> int:
        """How many clients there are."""
        return len(self.client_ids)

    def num_examples(self, index: int) -> int:
        """Return how many training examples the client at an index has."""
        return int(self.num_examples_n[index])
