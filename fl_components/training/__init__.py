"""What a client does with the parameters: train them, and evaluate them."""

from fl_components.training.cohort import train_cohort
from fl_components.training.evaluation import Evaluation, evaluate
from fl_components.training.execution import Execution, LocalExecution
from fl_components.training.sgd import SGD
from fl_components.training.threads import one_thread

Training = SGD

__all__ = ["SGD", "Evaluation", "Execution", "LocalExecution", "Training", "evaluate", "one_thread", "train_cohort"]
