"""How the aggregated update moves the server's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrounds.fl_components.rules import union
from fedrounds.fl_components.server_optimizers.base import ServerOptimizerRule
from fedrounds.fl_components.server_optimizers.fedadagrad import FedAdagrad
from fedrounds.fl_components.server_optimizers.fedadam import FedAdam
from fedrounds.fl_components.server_optimizers.fedavg import FedAvg
from fedrounds.fl_components.server_optimizers.fedavgm import FedAvgM
from fedrounds.fl_components.server_optimizers.fedyogi import FedYogi

if TYPE_CHECKING:
    ServerOptimizer = ServerOptimizerRule
else:
    ServerOptimizer = union("server_optimizers", FedAvg, FedAvgM, FedAdagrad, FedAdam, FedYogi)

__all__ = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedYogi", "ServerOptimizer", "ServerOptimizerRule"]
