"""How the updates of a cohort become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.aggregation.base import AggregationResult, Aggregator, LinearAggregator
from fedrounds.fl_components.aggregation.geometric_median import GeometricMedian
from fedrounds.fl_components.aggregation.mean import Mean
from fedrounds.fl_components.aggregation.prepare import NearestNeighborMixing, PreAggregation
from fedrounds.fl_components.aggregation.updates import Updates
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Aggregation = Aggregator
else:
    Aggregation = union("aggregation", Mean, GeometricMedian)

__all__ = [
    "Aggregation",
    "AggregationResult",
    "Aggregator",
    "GeometricMedian",
    "LinearAggregator",
    "Mean",
    "NearestNeighborMixing",
    "PreAggregation",
    "Updates",
]
