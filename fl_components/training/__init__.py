"""What a client does with the parameters: train them, and evaluate them. And how many clients do it at once."""

from fedrounds.fl_components.training.channels import next_kept
from fedrounds.fl_components.training.chunk import ExampleTable, synthetic_like
from fedrounds.fl_components.training.engine import ShardReport, StreamingSum, Weighing, names_of
from fedrounds.fl_components.training.evaluation import BATCH_SIZE, Evaluation, evaluate
from fedrounds.fl_components.training.execution import MAX_OF_SHARD, DaskExecution, Execution, LocalExecution
from fedrounds.fl_components.training.facts import engine_environment
from fedrounds.fl_components.training.private import grad_sampler_name
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.shadow import CanaryClient
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.training.trainer import (
    Result,
    RowMapper,
    RowTask,
    Trainer,
    Workload,
    here,
    peak_memory_bytes,
)

Training = SGD

__all__ = [
    "BATCH_SIZE",
    "MAX_OF_SHARD",
    "SGD",
    "CanaryClient",
    "DaskExecution",
    "Evaluation",
    "ExampleTable",
    "Execution",
    "LocalExecution",
    "Result",
    "RowMapper",
    "RowTask",
    "ShardReport",
    "StreamingSum",
    "Trainer",
    "Training",
    "Weighing",
    "Workload",
    "engine_environment",
    "evaluate",
    "grad_sampler_name",
    "here",
    "names_of",
    "next_kept",
    "one_thread",
    "peak_memory_bytes",
    "synthetic_like",
]
