"""What a client does with the parameters: it trains and evaluates them. And how many clients do so at once."""

from fedrounds.fl_components.training.channels import next_kept
from fedrounds.fl_components.training.chunk import ExampleTable, synthetic_like
from fedrounds.fl_components.training.engine import Engine, ShardReport, StreamingSum, Weighing, names_of
from fedrounds.fl_components.training.evaluation import BATCH_SIZE, Evaluation, evaluate
from fedrounds.fl_components.training.facts import engine_environment
from fedrounds.fl_components.training.private import grad_sampler_name
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.shadow import CanaryClient
from fedrounds.fl_components.training.threads import one_thread

Training = SGD

__all__ = [
    "BATCH_SIZE",
    "SGD",
    "CanaryClient",
    "Engine",
    "Evaluation",
    "ExampleTable",
    "ShardReport",
    "StreamingSum",
    "Training",
    "Weighing",
    "engine_environment",
    "evaluate",
    "grad_sampler_name",
    "names_of",
    "next_kept",
    "one_thread",
    "synthetic_like",
]
