"""What a client does with the parameters: train them, and evaluate them. And how many clients do it at once."""

from fedrounds.fl_components.training.chunk import Examples, made_up
from fedrounds.fl_components.training.engine import Additive, ShardReport, Summing, names_of
from fedrounds.fl_components.training.evaluation import BATCH_SIZE, Evaluation, evaluate
from fedrounds.fl_components.training.execution import MOST_OF_SHARD, DaskExecution, Execution, LocalExecution
from fedrounds.fl_components.training.facts import engine_facts
from fedrounds.fl_components.training.private import example_way
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.shadow import Shadow
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.training.trainer import (
    ModelSpec,
    Result,
    Spread,
    Trainer,
    Work,
    Workload,
    here,
    peak_memory_bytes,
)

Training = SGD

__all__ = [
    "BATCH_SIZE",
    "MOST_OF_SHARD",
    "SGD",
    "Additive",
    "DaskExecution",
    "Evaluation",
    "Examples",
    "Execution",
    "LocalExecution",
    "ModelSpec",
    "Result",
    "Shadow",
    "ShardReport",
    "Spread",
    "Summing",
    "Trainer",
    "Training",
    "Work",
    "Workload",
    "engine_facts",
    "evaluate",
    "example_way",
    "here",
    "made_up",
    "names_of",
    "one_thread",
    "peak_memory_bytes",
]
