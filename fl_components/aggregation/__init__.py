"""How the updates of a cohort become one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.aggregation.base import AdditiveRule, AggregationRule
from fedrounds.fl_components.aggregation.mean import Mean
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Aggregation = AggregationRule
else:
    Aggregation = union("aggregation", Mean)

__all__ = ["AdditiveRule", "Aggregation", "AggregationRule", "Mean"]
