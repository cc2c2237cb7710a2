"""How the aggregated update moves the server's parameters."""

from typing import Annotated

from pydantic import Field

from fl_components.server_optimizers.base import ServerOptimizerRule
from fl_components.server_optimizers.fedadam import FedAdam
from fl_components.server_optimizers.fedavg import FedAvg

ServerOptimizer = Annotated[FedAvg | FedAdam, Field(discriminator="kind")]

__all__ = ["FedAdam", "FedAvg", "ServerOptimizer", "ServerOptimizerRule"]
