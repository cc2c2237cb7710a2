"""How the aggregated update moves the server's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fl_components.rules import union
from fl_components.server_optimizers.base import ServerOptimizerRule
from fl_components.server_optimizers.fedadam import FedAdam
from fl_components.server_optimizers.fedavg import FedAvg

if TYPE_CHECKING:
    ServerOptimizer = ServerOptimizerRule
else:
    ServerOptimizer = union("server_optimizers", FedAvg, FedAdam)

__all__ = ["FedAdam", "FedAvg", "ServerOptimizer", "ServerOptimizerRule"]
