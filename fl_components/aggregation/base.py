"""What every aggregation rule does, and what the server asks of an update before it counts."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field

from fl_components.rules import Rule
from fl_components.values import Float32, Float64, Partial


class AggregationRule(Rule):
    """Updates of a cohort, taken in piece by piece, to one update.

    `init`, then `add` for each shard in the order of the cohort, then `aggregate`. A rule keeps in its `Partial` no
    more than it needs, so that an additive one never holds N x D.
    """

    max_update_norm: float = Field(
        default=1000.0, gt=0, description="an update whose L2 norm is above this is refused by the server"
    )

    @abstractmethod
    def init(self, num_parameters: int) -> Partial:
        """The partial of no updates."""

    @abstractmethod
    def add(self, partial: Partial, deltas_ND: Float32, weights_N: Float64) -> Partial:
        """`partial` and one shard's updates (float32 [N, D]) with the clients' numbers of examples (float64 [N])."""

    @abstractmethod
    def aggregate(self, partial: Partial) -> Float64:
        """The aggregated update, float64 [D]; zeros where no update came (a round may do without: min_updates 0)."""
