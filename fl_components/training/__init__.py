"""What a client does with the parameters: train them, and evaluate them. And how many clients do it at once."""

from fl_components.training.engine import Additive, ShardReport
from fl_components.training.evaluation import Evaluation, evaluate
from fl_components.training.execution import Execution, LocalExecution
from fl_components.training.sgd import SGD
from fl_components.training.threads import one_thread
from fl_components.training.trainer import ModelSpec, Trainer, Workload

Training = SGD

__all__ = [
    "SGD",
    "Additive",
    "Evaluation",
    "Execution",
    "LocalExecution",
    "ModelSpec",
    "ShardReport",
    "Trainer",
    "Training",
    "Workload",
    "evaluate",
    "one_thread",
]
