"""The executor without workers: everything runs in the process that drives the run, on one thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.executors.base import Executor, Shard, Workload, empty, make_engine, name_of
from fedrounds.fl_components.training import SGD, Engine, ShardReport, StreamingSum


class InProcessExecutor(Executor):
    """Trains one shard after the other in this process."""

    def __init__(self, workload: Workload, say: Callable[[str], None], device: str = "cpu") -> None:
        self._workload, self._say, self._device = workload, say, device
        self._engine: Engine | None = None

    def train(
        self, rule: SGD, base_M: Float32, shards: Sequence[Shard], streaming: StreamingSum | None
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        if self._engine is None:
            self._engine = make_engine(
                self._workload.module, self._workload.examples, self._workload.task, self._device
            )
            if self._engine.note:
                self._say(self._engine.note)
        result = empty(self._workload.result)
        for shard in shards:
            began = time.time()
            report = self._engine.train(rule, base_M, shard, result, streaming)
            self.on_shard(name_of(shard), began, time.time(), os.getpid())
            yield report, result if streaming else result[: len(shard)]
