"""How the rows of a table are dealt out to clients. Each rule is a file; another package adds one by an entry point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.data.partition.base import Assignment, PartitionRule
from fedrounds.fl_components.data.partition.dirichlet import Dirichlet
from fedrounds.fl_components.data.partition.iid import Iid
from fedrounds.fl_components.data.partition.log_normal import QuantitySkew
from fedrounds.fl_components.data.partition.natural import Natural
from fedrounds.fl_components.data.partition.shards import Shards
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Partition = PartitionRule
else:
    Partition = union("partitions", Iid, Dirichlet, Shards, QuantitySkew, Natural)

__all__ = ["Assignment", "Dirichlet", "Iid", "Natural", "Partition", "PartitionRule", "QuantitySkew", "Shards"]
