"""How simulated clients misbehave: who is away, who is slow, and how long a round would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fedrounds.fl_components.population.availability import Always, AvailabilityRule, Bernoulli, Diurnal, Trace
from fedrounds.fl_components.population.network import Network
from fedrounds.fl_components.randomness import generator
from fedrounds.fl_components.rules import Rule, union

if TYPE_CHECKING:
    Availability = AvailabilityRule
else:
    Availability = union("availability", Always, Bernoulli, Diurnal, Trace)


class Stragglers(Rule):
    """In each round each client is a straggler with the probability `fraction`.

    It stops after a part of its local work (Li et al. 2020, section 5.2, https://arxiv.org/abs/1812.06127).

    The part is drawn uniformly from 1 to one less than all of its epochs (or steps), as in the authors' code; the
    paper's text counts all of them in. `drop` leaves stragglers' updates out, as FedAvg does; otherwise what they did
    counts, as in FedProx.

    >>> Stragglers(fraction=1.0).work(seed=1, whole=2), Stragglers(fraction=1e-9).work(seed=1, whole=2)
    (1, None)
    """

    fraction: float = Field(gt=0, le=1)
    drop: bool = False

    def work(self, seed: int, whole: int) -> int | None:
        """Return after how many of its `whole` epochs (or steps) the client with this seed stops.

        None for one that does them all.
        """
        draw = generator(seed, 0, "straggler")
        straggles = draw.random() < self.fraction
        return int(draw.integers(1, whole)) if straggles else None


class Simulation(Rule):
    """What is simulated of clients besides their training. Real silos do all of this by themselves."""

    availability: Availability = Always()
    stragglers: Stragglers | None = None
    network: Network | None = Field(default=None, description="how long a round would take")

    @property
    def always_available(self) -> bool:
        """Whether every client is there in every round."""
        return isinstance(self.availability, Always)
