"""The workers of a Dask cluster, on this machine and others.

Each worker has an engine of its own. It is the result of a Dask task and stays on the worker for as long as this client
is connected; jobs go to a worker as tasks that take its engine, so Dask moves them nowhere else. The scheduler of
scheduler.py decides which worker runs what, because it knows which job a worker was running when it was lost.
"""

from __future__ import annotations

import asyncio
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import NotInstalled, RunFailed, Unreachable, one_line
from fedrounds.fl_components.executors.base import ArrayType, Workload, make_engine, peak_memory_bytes
from fedrounds.fl_components.executors.scheduler import (
    Job,
    Message,
    Transport,
    Worker,
    problem_message,
    run_job,
)
from fedrounds.fl_components.models import ModelSpec
from fedrounds.fl_components.task import LearningTask
from fedrounds.fl_components.training import Engine, engine_environment, one_thread

if TYPE_CHECKING:
    from distributed import Client, Future

BUNDLE_BYTES: Final = 8_000_000
"""Of results that a worker sends in one piece: a message costs about as much as the training of a small client."""

CONNECT_S: Final = 10.0
LOOK_S: Final = 0.5  # between two looks at which workers there are

LAST_BITS: Final = "the last bits of the model may differ from those of a training on either alone"


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """What is sent to each worker once. `path` is where the driver finds modules."""

    path: tuple[str, ...]
    spec: ModelSpec
    task: LearningTask
    examples: dict[str, NDArray[Any]]  # as in `Workload`
    result: ArrayType


@dataclass(frozen=True, slots=True, eq=False)
class RemoteEngine:
    """A worker's engine (None where it could not be built), the worker's first message, and its environment."""

    engine: Engine | None
    result: ArrayType
    message: Message
    environment: dict[str, str]


_one_at_a_time = threading.Lock()  # engines are for one thread, and so is torch's number of threads


def build_engine(setup: _Setup) -> RemoteEngine:
    """Build a worker's engine, at the worker."""
    sys.path += [folder for folder in setup.path if folder not in sys.path and os.path.isdir(folder)]
    engine = None
    try:
        with _one_at_a_time:
            examples = {name: _aligned(array) for name, array in setup.examples.items()}
            engine = make_engine(setup.spec.build(), examples, setup.task)
        message = Message(notes=(engine.note,) if engine.note else (), memory_bytes=peak_memory_bytes())
    except Exception as error:
        message = problem_message(error)
    return RemoteEngine(engine, setup.result, message, _environment())


def first_message(remote: RemoteEngine) -> tuple[Message, dict[str, str]]:
    """Return a worker's first message and its environment, at the worker. The engine stays where it is."""
    return remote.message, remote.environment


def run_bundle(remote: RemoteEngine, base_M: Float32 | None, bundle: Sequence[Job]) -> Message:
    """Run jobs one after the other, at the worker."""
    assert remote.engine is not None
    dtype, shape = remote.result
    try:
        with _one_at_a_time, one_thread():
            start_D = np.empty(0, np.float32) if base_M is None else _aligned(base_M)
            results = []
            for job in bundle:
                array = np.empty((job.length, *shape[1:]), dtype) if job.rows is None else _aligned(job.rows)
                result = run_job(job.index, job.work, remote.engine, start_D, array)
                results.append(replace(result, array=array if job.returns_array else None))
    except Exception as error:
        return problem_message(error)
    return Message(tuple(results), memory_bytes=peak_memory_bytes())


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy in memory of torch's own.

    What arrives may lie anywhere, and kernels may then sum in another order.
    """
    copy: NDArray[Any] = torch.tensor(array).numpy()
    return copy


def _environment() -> dict[str, str]:
    return {name: str(value) for name, value in engine_environment().items()}


class DaskWorker(Worker):
    """A Dask worker, seen from the driver.

    Attributes:
      engine: the future of its engine.
      params: the parameters that were sent to it last, and the task that sends them.
      futures: those of the messages that are expected from it, by bundle, or by "engine" for the first one.
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"the Dask worker at {address}")
        self.address = address
        self.engine: Future | None = None
        self.params: tuple[Float32, asyncio.Future[Future]] | None = None
        self.futures: dict[object, Future] = {}


class DaskTransport(Transport):
    """Uses whichever workers the cluster has. They may come and go.

    What has to wait for Dask does so in the client's event loop, and reports to a queue that `poll` reads.

    Raises:
      NotInstalled: Dask is not installed.
      Unreachable: the scheduler does not answer, or (`poll`) there is no worker for `wait_s`.
    """

    noun = "Dask workers"
    depth = 2
    loss_hint = "see the workers' logs; where memory ran out, a smaller execution.shard_size needs less"
    start_hint = "see the workers' logs; each needs memory for all clients' examples and twice that for a moment"

    def __init__(self, workload: Workload, address: str, wait_s: float) -> None:
        dtype, shape = workload.result
        row_bytes = np.dtype(dtype).itemsize * math.prod(shape[1:])
        self.workers: list[DaskWorker] = []
        self.bundle_size = max(1, BUNDLE_BYTES // (shape[0] * row_bytes))
        self.block_rows = max(1, BUNDLE_BYTES // row_bytes)
        self._address, self._wait_s = address, wait_s
        self._client = _connect(address)
        self._setup = _Setup(
            tuple(os.path.abspath(folder) for folder in sys.path),
            workload.spec,
            workload.task,
            {name: workload.examples[name] for name in workload.examples.layout},
            workload.result,
        )
        self._base_M: Float32 | None = None
        self._reports: queue.SimpleQueue[tuple[DaskWorker, object, Message | BaseException]] = queue.SimpleQueue()
        self._next_look = self._seen = 0.0

    def begin(self, base_M: Float32 | None) -> None:
        self._base_M = None if base_M is None else base_M.copy()
        self._next_look, self._seen = 0.0, time.monotonic()

    def poll(self, *, block: bool = True) -> list[tuple[Worker, Message]]:
        events = self._look() if time.monotonic() >= self._next_look else []
        wait_s = max(0.0, self._next_look - time.monotonic()) if block and not events else 0.0
        with suppress(queue.Empty):  # SimpleQueue.get raises it
            while True:
                events += self._event(*self._reports.get(timeout=wait_s))
                wait_s = 0.0
        return events

    def _look(self) -> list[tuple[Worker, Message]]:
        """Look which workers there are and take work. Prepare the new ones; report those that are gone."""
        problem = ""
        try:
            ask = self._client.scheduler.ncores_running
            addresses = set(self._client.sync(ask, workers=None, callback_timeout=self._wait_s))
        except Exception as error:
            addresses, problem = set(), one_line(error)
        self._next_look = time.monotonic() + LOOK_S
        if addresses:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > self._wait_s or self._client.status in ("closing", "closed"):
            raise self._unreachable(problem)
        known = {worker.address for worker in self.workers}
        joined = [DaskWorker(address) for address in addresses - known]
        self.workers += joined
        if joined:
            self._start(self._prepare(joined))
        return [(worker, Message(lost="it is gone")) for worker in self.workers if worker.address not in addresses]

    def _unreachable(self, problem: str) -> Unreachable:
        if problem:
            return Unreachable(
                f"the Dask scheduler at {self._address} does not answer any more: {problem}",
                hint="start it again, and its workers; then resume the run",
            )
        return Unreachable(
            f"the Dask scheduler at {self._address} has had no worker for {self._wait_s:g} s",
            hint="start workers (docs/operations.md, Dask), then resume the run; execution.wait_s is how long to wait",
        )

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Begin to run a coroutine in the client's event loop."""
        asyncio.run_coroutine_threadsafe(coroutine, self._client.loop.asyncio_loop)

    async def _prepare(self, workers: Sequence[DaskWorker]) -> None:
        """Send the setup to new workers, together, and have each build its engine."""
        addresses = [worker.address for worker in workers]
        setup = asyncio.ensure_future(self._client.scatter(self._setup, workers=addresses, broadcast=True, hash=False))
        await asyncio.gather(*(self._report(worker, "engine", self._build(worker, setup)) for worker in workers))

    async def _build(self, worker: DaskWorker, setup: asyncio.Future[Future]) -> Message:
        engine = self._submit(worker, build_engine, await asyncio.shield(setup))
        message: Message
        message, theirs = await self._call(worker, "engine", first_message, engine)
        worker.engine, ours = engine, _environment()
        differences = [
            f"{name} is {theirs[name]!r}, here {ours[name]!r}" for name in ours if theirs[name] != ours[name]
        ]
        if differences:
            note = f"a Dask worker differs from this machine: {'; '.join(differences)}; {LAST_BITS}"
            message = replace(message, notes=(*message.notes, note))
        return message

    def submit(self, worker: Worker, bundle: tuple[Job, ...]) -> None:
        assert isinstance(worker, DaskWorker)
        self._start(self._report(worker, bundle, self._run(worker, bundle, self._base_M)))

    async def _run(self, worker: DaskWorker, bundle: tuple[Job, ...], base_M: Float32 | None) -> Message:
        params = None if base_M is None else await asyncio.shield(self._sent_params(worker, base_M))
        message: Message = await self._call(worker, bundle, run_bundle, worker.engine, params, bundle)
        return message

    def _sent_params(self, worker: DaskWorker, base_M: Float32) -> asyncio.Future[Future]:
        """Return the parameters at the worker, which its bundles share."""
        if worker.params is None or worker.params[0] is not base_M:
            scatter = self._client.scatter(base_M, workers=[worker.address], hash=False)
            worker.params = (base_M, asyncio.ensure_future(scatter))
        return worker.params[1]

    def _submit(self, worker: DaskWorker, function: Callable[..., Any], *arguments: Any) -> Future:
        """Have one worker, and no other, call a function."""
        return self._client.submit(
            function, *arguments, workers=[worker.address], allow_other_workers=False, pure=False
        )

    async def _call(self, worker: DaskWorker, key: object, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function returns at the worker. Releasing the future ends the wait."""
        future = worker.futures[key] = self._submit(worker, function, *arguments)
        return await self._client.gather(future)

    async def _report(self, worker: DaskWorker, key: object, work: Awaitable[Message]) -> None:
        """Put what comes of `work` into the queue."""
        outcome: Message | BaseException
        try:
            outcome = await work
        except BaseException as error:
            outcome = error
        self._reports.put((worker, key, outcome))

    def _event(self, worker: DaskWorker, key: object, outcome: Message | BaseException) -> list[tuple[Worker, Message]]:
        """Return what a report means for the scheduler: nothing where it comes too late."""
        worker.futures.pop(key, None)
        if worker not in self.workers or (key != "engine" and key not in worker.bundles):
            return []
        if isinstance(outcome, Message):
            return [(worker, outcome)]
        from distributed.client import FutureCancelledError

        if isinstance(outcome, (FutureCancelledError, asyncio.CancelledError, OSError, KeyError)):
            return [(worker, Message(lost=one_line(outcome)))]
        self.remove(worker)
        raise RunFailed(
            f"{worker.name} cannot train: {one_line(outcome)}",
            hint="scheduler and workers need the same packages as this process, fedrounds among them",
        )

    def abandon(self, worker: Worker) -> None:
        """Cancel what waits at the worker. What it is running, it finishes; the report is ignored."""
        self._release(worker)

    def remove(self, worker: Worker) -> None:
        assert isinstance(worker, DaskWorker)
        self.workers.remove(worker)
        self._release(worker)

    def _release(self, worker: Worker) -> None:
        assert isinstance(worker, DaskWorker)
        for key in list(worker.futures):
            if (future := worker.futures.pop(key, None)) is not None:
                future.release()

    def close(self) -> None:
        self._client.close()


def _connect(address: str) -> Client:
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"execution.kind is dask, and {error.name} is not installed", hint="pip install 'fedrounds[server]'"
        ) from error
    try:
        return Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ImportError, ValueError, RuntimeError, TypeError) as error:
        raise Unreachable(
            f"the Dask scheduler at {address} does not answer: {one_line(error)}",
            hint="start one (docs/operations.md, Dask), or set execution.address to that of one that runs",
        ) from error
