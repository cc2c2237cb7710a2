"""The scheduler: hands jobs to workers, yields the results in order, and repeats the jobs of workers that were lost.

A job trains a shard, or applies a function to a block of updates. How workers are started and reached is a matter of a
`Transport`: processes.py, dask.py.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import FedroundsError, ModelError, RunFailed, one_line
from fedrounds.fl_components.executors.base import (
    Access,
    Executor,
    Shard,
    T,
    Workload,
    map_inline,
    name_of,
    peak_memory_bytes,
)
from fedrounds.fl_components.training import SGD, Engine, ShardReport, StreamingSum, names_of, one_thread

MAX_ATTEMPTS: Final = 3
"""A round fails when this many workers were lost while they ran the same job, or in a row before they were ready."""

TURNS: Final = 4  # a bundle is at most this part of a worker's share of the waiting jobs: workers finish together


Work = Callable[[Engine, Float32, NDArray[Any]], Any]
"""What a job does with an engine, the parameters and its array: it returns a small value, and leaves larger results in
the array. Pickle must be able to write it."""


def train_shard(
    rule: SGD,
    streaming: StreamingSum | None,
    tasks: Shard,
    engine: Engine,
    base_M: Float32,
    array: NDArray[Any],
) -> ShardReport:
    """Train a shard. Leave the updates or their sum in the array."""
    return engine.train(rule, base_M, tasks, array, streaming)


def map_block(
    function: Callable[..., Any], columns: Sequence[Sequence[Any]], _: Engine, __: Float32, array: NDArray[Any]
) -> Any:
    """Apply a function to a block of rows, and to the same block of each column."""
    with one_thread():
        return function(array, *columns)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A piece of work for one worker, with an array of the type of `Workload.result` to work on.

    Args:
      index: its place among the jobs.
      work: what to do.
      length: the size of the array's first axis.
      rows: what the array holds at first; None where that does not matter.
      returns_array: whether the result includes the array.
    """

    index: int
    work: Work
    length: int
    rows: NDArray[Any] | None = None
    returns_array: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class JobResult:
    """What a job returned, its array, when it ran by the worker's clock, and in which process."""

    index: int
    value: Any
    array: NDArray[Any] | None
    began: float
    ended: float
    process: int


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """The news of a worker: it ran a bundle, has a problem, or was lost; if none of these is set, it is ready.

    Only the text of an exception is sent, because one of the model's own may not survive the transport.
    """

    results: tuple[JobResult, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None
    lost: str | None = None
    memory_bytes: int = 0


def run_job(index: int, work: Work, engine: Engine, base_M: Float32, array: NDArray[Any]) -> JobResult:
    """Run a job at a worker. The result is without the array."""
    began = time.time()
    value = work(engine, base_M, array)
    return JobResult(index, value, None, began, time.time(), os.getpid())


def problem_message(error: Exception) -> Message:
    """Return the message with which a worker reports an error."""
    if isinstance(error, FedroundsError):
        return Message(problem=error.message, hint=error.hint)
    return Message(problem=f"a worker failed: {one_line(error)}")


class Worker:
    """A worker as the scheduler sees it.

    Attributes:
      name: its name in messages.
      is_ready: whether it has its engine.
      bundles: the jobs that it has, in the order in which it runs them.
      memory_bytes: the peak memory that it reported.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_ready = False
        self.bundles: deque[tuple[Job, ...]] = deque()
        self.memory_bytes = 0


class Transport(ABC):
    """Starts workers, or finds them, and exchanges jobs and messages with them.

    Attributes:
      workers: those that exist.
      noun: what they are called in messages.
      depth: how many bundles a worker has at most: with 2, one runs while the result of the other travels.
      bundle_size: how many jobs a bundle has at most.
      block_rows: how many updates a job has room for.
      loss_hint, start_hint: what to do when workers are lost while they run one job, or before they are ready.
    """

    workers: Sequence[Worker]
    noun: str
    depth: int
    bundle_size: int
    block_rows: int
    loss_hint: str
    start_hint: str

    @abstractmethod
    def begin(self, base_M: Float32 | None) -> None:
        """Prepare for jobs that start from these parameters (None: jobs that need none). Start missing workers."""

    @abstractmethod
    def submit(self, worker: Worker, bundle: tuple[Job, ...]) -> None:
        """Send jobs to a worker."""

    @abstractmethod
    def poll(self, *, block: bool = True) -> list[tuple[Worker, Message]]:
        """Return what happened. With `block`, wait until something does, or for a while. Start missing workers.

        The arrays of results are valid until as many jobs more were submitted as the scheduler may be ahead.
        """

    @abstractmethod
    def abandon(self, worker: Worker) -> None:
        """Discard the jobs of a worker. Their results are not reported."""

    @abstractmethod
    def remove(self, worker: Worker) -> None:
        """Forget a worker that was lost."""

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


class Scheduler:
    """Assigns the jobs of a round to the workers of a transport."""

    def __init__(self, transport: Transport, say: Callable[[str], None]) -> None:
        self._transport, self._say = transport, say
        self._notes: set[str] = set()
        self._failed_starts = 0  # in a row
        self._begin(())

    def _begin(self, jobs: Sequence[Job], describe: Callable[[Sequence[Job]], str] = str) -> None:
        self._waiting, self._done, self._taken = deque(jobs), dict[int, JobResult](), 0
        self._losses, self._describe = Counter[int](), describe

    def run(
        self, jobs: Sequence[Job], base_M: Float32 | None, describe: Callable[[Sequence[Job]], str]
    ) -> Iterator[JobResult]:
        """Yield the jobs' results in the order of the jobs. Requesting the next result invalidates an array.

        Args:
          jobs: their indices are 0, 1, 2, ...
          base_M: the parameters from which they start.
          describe: names jobs in messages.

        Raises:
          ModelError: a worker reported a problem.
          RunFailed: `MAX_ATTEMPTS` workers were lost by one job, or before they were ready.
        """
        self._begin(jobs, describe)
        self._transport.begin(base_M)
        try:
            self._handle(self._transport.poll(block=False))
            for turn in range(len(jobs)):
                self._taken = turn
                while turn not in self._done:
                    self._assign()
                    self._handle(self._transport.poll())
                yield self._done.pop(turn)
        finally:
            for worker in list(self._transport.workers):
                if worker.bundles:  # the round was given up
                    worker.bundles.clear()
                    self._transport.abandon(worker)

    def wait_for_worker(self) -> None:
        """Return when a worker is ready. Raises what `run` raises."""
        self._begin(())
        self._transport.begin(None)
        while not any(worker.is_ready for worker in self._transport.workers):
            self._handle(self._transport.poll())

    def _assign(self) -> None:
        """Hand out waiting jobs: to each worker one bundle, then further ones up to the depth."""
        ready = [worker for worker in self._transport.workers if worker.is_ready]
        # After a loss, one bundle at a time: otherwise a job whose result was still on its way when the next one killed
        # the worker would be blamed.
        depth = 1 if self._losses else self._transport.depth
        for held in range(depth):
            for worker in ready:
                if len(worker.bundles) == held and (bundle := self._next_bundle(len(ready))):
                    worker.bundles.append(bundle)
                    self._transport.submit(worker, bundle)

    def _next_bundle(self, num_workers: int) -> tuple[Job, ...]:
        """Take the next jobs for one worker. A job by which a worker was lost is a bundle by itself."""
        transport = self._transport
        # Results are held until it is their turn, so jobs run ahead of it by a limited number.
        end = self._taken + 2 * transport.depth * num_workers * transport.bundle_size
        size = min(transport.bundle_size, -(-len(self._waiting) // (TURNS * num_workers)))
        bundle: list[Job] = []
        while self._waiting and self._waiting[0].index < end and len(bundle) < size:
            is_suspect = self._losses[self._waiting[0].index] > 0
            if bundle and is_suspect:
                break
            bundle.append(self._waiting.popleft())
            if is_suspect:
                break
        return tuple(bundle)

    def _handle(self, events: Sequence[tuple[Worker, Message]]) -> None:
        for worker, message in events:
            if worker not in self._transport.workers:  # it was lost a moment ago
                continue
            if message.problem is not None:
                worker.bundles.clear()
                self._transport.remove(worker)  # so that another round would begin with a new one
                raise ModelError(message.problem, hint=message.hint)
            worker.memory_bytes = max(worker.memory_bytes, message.memory_bytes)
            for note in message.notes:
                if note not in self._notes:
                    self._notes.add(note)
                    self._say(note)
            if message.lost is not None:
                self._lose(worker, message.lost)
            elif message.results:
                self._done.update((result.index, result) for result in message.results)
                finished = message.results[0].index
                worker.bundles = deque(bundle for bundle in worker.bundles if bundle[0].index != finished)
            else:
                worker.is_ready, self._failed_starts = True, 0

    def _lose(self, worker: Worker, how: str) -> None:
        """Repeat what a lost worker had, and blame the jobs that it was running."""
        noun, bundles = self._transport.noun, list(worker.bundles)
        worker.bundles.clear()
        self._transport.remove(worker)
        # In order, so that the job whose turn it is comes first, however few workers are left to run ahead of it.
        self._waiting = deque(sorted(chain(self._waiting, *bundles), key=lambda job: job.index))
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_ATTEMPTS:
                raise RunFailed(
                    f"{MAX_ATTEMPTS} {noun} were lost before they were ready ({how})", hint=self._transport.start_hint
                )
        message = f"{worker.name} was lost ({how})"
        if bundles:
            running = self._describe(bundles[0])
            self._losses.update(job.index for job in bundles[0])
            if max(self._losses[job.index] for job in bundles[0]) == MAX_ATTEMPTS:
                raise RunFailed(
                    f"{MAX_ATTEMPTS} {noun} were lost ({how}) while they ran the same job: {running}",
                    hint=self._transport.loss_hint,
                )
            message += f"; its work is repeated: {running}"
        self._say(message)


class ScheduledExecutor(Executor):
    """Runs jobs at the workers of a transport. Raises what the transport raises."""

    def __init__(self, workload: Workload, transport: Transport, say: Callable[[str], None]) -> None:
        self._workload, self.transport = workload, transport
        self._scheduler = Scheduler(transport, say)

    def train(
        self, rule: SGD, base_M: Float32, shards: Sequence[Shard], streaming: StreamingSum | None
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        length = self._workload.result[1][0]
        jobs = [
            Job(index, partial(train_shard, rule, streaming, shard), length if streaming else len(shard))
            for index, shard in enumerate(shards)
        ]

        def describe(jobs: Sequence[Job]) -> str:
            return names_of([task for job in jobs for task in shards[job.index]])

        for shard, result in zip(shards, self._scheduler.run(jobs, base_M, describe), strict=True):
            assert result.array is not None
            self.on_shard(name_of(shard), result.began, result.ended, result.process)
            yield result.value, result.array

    def map_rows(
        self,
        function: Callable[..., T],
        rows_ND: Float32,
        *columns: Sequence[Any],
        block_rows: int = 1,
        access: Access = "r",
    ) -> Iterator[T]:
        blocks = self._blocks(rows_ND.shape, block_rows)
        if len(blocks) < 2:
            yield from map_inline(function, rows_ND, *columns, block_rows=block_rows, access=access)
            return
        jobs = [
            Job(
                index,
                partial(map_block, function, [column[block] for column in columns]),
                block.stop - block.start,
                rows=None if access == "w" else rows_ND[block],
                returns_array=access != "r",
            )
            for index, block in enumerate(blocks)
        ]

        def describe(jobs: Sequence[Job]) -> str:
            return f"updates {blocks[jobs[0].index].start + 1} to {blocks[jobs[-1].index].stop}"

        for block, result in zip(blocks, self._scheduler.run(jobs, None, describe), strict=True):
            if result.array is not None:
                rows_ND[block] = result.array
            yield result.value

    def _blocks(self, shape: tuple[int, ...], block_rows: int) -> list[slice]:
        """Return four blocks for each worker, so that none waits long for another.

        One block where a job has no room for updates of this shape.
        """
        num_rows, num_workers = shape[0], max(1, len(self.transport.workers))
        size = -(-num_rows // (4 * num_workers * block_rows)) * block_rows
        room = self.transport.block_rows if self._workload.result[1][1:] == shape[1:] else 0
        size = min(size, room // block_rows * block_rows) or max(1, num_rows)
        return [slice(start, min(num_rows, start + size)) for start in range(0, num_rows, size)]

    def wait_for_worker(self) -> None:
        """Return when a worker is ready. Raises what `train` raises."""
        self._scheduler.wait_for_worker()

    def close(self) -> None:
        self.transport.close()

    @property
    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes() + sum(worker.memory_bytes for worker in self.transport.workers)
