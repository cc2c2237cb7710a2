"""Where clients run: in this process, in training processes, at Dask workers."""

from fedrounds.fl_components.executors.base import (
    ArrayType,
    Executor,
    RowMapper,
    Workload,
    map_inline,
    peak_memory_bytes,
)
from fedrounds.fl_components.executors.execution import MAX_OF_SHARD, DaskExecution, Execution, LocalExecution
from fedrounds.fl_components.executors.in_process import InProcessExecutor

__all__ = [
    "MAX_OF_SHARD",
    "ArrayType",
    "DaskExecution",
    "Execution",
    "Executor",
    "InProcessExecutor",
    "LocalExecution",
    "RowMapper",
    "Workload",
    "map_inline",
    "peak_memory_bytes",
]
