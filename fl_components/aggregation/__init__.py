"""How the updates of a cohort become one."""

from fl_components.aggregation.base import AggregationRule
from fl_components.aggregation.mean import Mean

Aggregation = Mean

__all__ = ["Aggregation", "AggregationRule", "Mean"]
