"""Training on the workers of a Dask cluster, on this machine and others.

Each worker has an engine of its own. It is the result of a Dask task and stays on the worker for as long as this client
is connected; shards go to a worker as tasks that take its engine, so Dask moves them nowhere else. Who trains what is
decided here, where it is known which shard a worker was at when it was lost.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import FedroundsError, ModelError, NotInstalled, RunFailed, Unreachable, one_line
from fedrounds.fl_components.training.chunk import ExampleTable
from fedrounds.fl_components.training.engine import Engine, ShardReport, StreamingSum, names_of
from fedrounds.fl_components.training.facts import engine_environment
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.training.trainer import (
    ModelSpec,
    Result,
    Shard,
    Trainer,
    Workload,
    empty,
    name_of,
    peak_memory_bytes,
)

if TYPE_CHECKING:
    from distributed import Client, Future

MAX_ATTEMPTS: Final = 3
"""How many workers may be lost while they train one shard before the round is given up."""

BUNDLE_BYTES: Final = 8_000_000
"""Of results that a worker sends in one piece: a message costs about as much as the training of a small client."""

DEPTH: Final = 2  # bundles that a worker has: one to train, and one while the result of another travels
TURNS: Final = 4  # a bundle is at most this part of a worker's share of what waits: all end at about the same time
CONNECT_S: Final = 10.0
LOOK_S: Final = 0.5  # between two looks at which workers there are

LAST_BITS: Final = "the last bits of the model may differ from those of a training on either alone"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Setup:
    """What goes to each worker once. `path` is where the driver finds modules."""

    path: tuple[str, ...]
    spec: ModelSpec
    examples: dict[str, NDArray[Any]]  # as in `Workload`
    result: Result


@dataclass(frozen=True, slots=True)
class _Hello:
    """What a worker says of itself when it has its engine, or has none because of a problem."""

    note: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    problem: str | None = None
    hint: str | None = None
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Trained:
    """What a shard came to: its report, its result, when it was trained by the worker's clock, and by which process."""

    report: ShardReport
    result: NDArray[np.floating]
    began: float
    ended: float
    process: int


@dataclass(frozen=True, slots=True)
class _Job:
    """Shards to train one after the other."""

    rule: SGD
    streaming: StreamingSum | None
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """What a job came to, or what went wrong. Only text crosses: an exception of the model's may not survive it."""

    trained: list[_Trained]
    problem: str | None = None
    hint: str | None = None
    peak_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Replica:
    """On a worker: its engine. None where it could not be built."""

    engine: Engine | None
    hello: _Hello
    result: Result = (np.float32, ())


_one_at_a_time = threading.Lock()  # engines are for one thread, and so is torch's number of threads


def build_engine(setup: _Setup) -> _Replica:
    """On a worker: make its engine."""
    sys.path += [each for each in setup.path if each not in sys.path and os.path.isdir(each)]
    try:
        with _one_at_a_time:
            x, y = (_aligned(setup.examples[name]) for name in ("x", "y"))
            examples = ExampleTable(x, y, setup.examples["starts"], setup.examples["stops"], setup.spec.task)
            engine = Engine(setup.spec.build(), examples)
    except Exception as error:
        return _Replica(None, _Hello(problem=_problem(error), hint=getattr(error, "hint", None)))
    facts = tuple((name, str(value)) for name, value in engine_environment().items())
    hello = _Hello(engine.note, facts, peak_memory_bytes=peak_memory_bytes())
    return _Replica(engine, hello, setup.result)


def say_hello(replica: _Replica) -> _Hello:
    """On a worker: what there is to say of its engine, which stays where it is."""
    return replica.hello


def train_shards(replica: _Replica, params_D: Float32, job: _Job) -> _Answer:
    """On a worker: train shards."""
    assert replica.engine is not None
    trained = []
    try:
        with _one_at_a_time, one_thread():
            start_D = _aligned(params_D).numpy()
            for shard in job.shards:
                began, result = time.time(), empty(replica.result)
                report = replica.engine.train(job.rule, start_D, shard, result, job.streaming)
                result = result if job.streaming else result[: len(report.client_ids)]
                trained.append(_Trained(report, result, began, time.time(), os.getpid()))
    except Exception as error:
        return _Answer([], _problem(error), getattr(error, "hint", None))
    return _Answer(trained, peak_memory_bytes=peak_memory_bytes())


def _aligned(array: NDArray[Any]) -> torch.Tensor:
    """A copy in memory of torch's own: what arrives may lie anywhere, and kernels may then sum in another order."""
    return torch.tensor(array)


def _problem(error: Exception) -> str:
    return error.message if isinstance(error, FedroundsError) else f"a training process failed: {one_line(error)}"


class DaskTrainer(Trainer):
    """Shards go to whichever worker is free. What a lost worker was at is trained again by another.

    Raises `NotInstalled` without Dask, `Unreachable` when the scheduler does not answer; `train` also raises
    `Unreachable` when there is no worker for `wait_s`.
    """

    def __init__(self, workload: Workload, address: str, wait_s: float, say: Callable[[str], None]) -> None:
        self._say = say
        self._client = _connect(address)
        self._cluster = _Cluster(self._client, workload, address, wait_s)

    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], streaming: StreamingSum | None, rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        round = _Round(self._cluster, rule, streaming, params_D, shards)
        self._sync(round.begin)
        try:
            for turn, shard in enumerate(shards):
                trained = self._sync(round.take, turn)
                self.on_shard(name_of(shard), trained.began, trained.ended, trained.process)
                yield trained.report, trained.result
        finally:
            self._sync(round.end)

    def _sync(self, step: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Do a step on the client's event loop, then say what there is to say."""
        try:
            result: T = self._client.sync(step, *arguments)
            return result
        finally:
            messages, self._cluster.messages = self._cluster.messages, []
            for message in messages:
                self._say(message)

    def close(self) -> None:
        self._client.close()

    @property
    def peak_memory_bytes(self) -> int:
        """This process's, and that of each worker that is there."""
        return peak_memory_bytes() + sum(worker.peak_memory_bytes for worker in self._cluster.workers.values())


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


class _Worker:
    """One of them, seen from here."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.engine: Future | None = None
        self.prepared: asyncio.Task[None]
        self.peak_memory_bytes = 0
        self.bundles: deque[tuple[tuple[int, ...], Future]] = deque()  # what it has to do, in this order


class _Cluster:
    """The workers, each with its engine. For the client's event loop, except `messages`: what is still to be said."""

    def __init__(self, client: Client, workload: Workload, address: str, wait_s: float) -> None:
        self.client, self.address, self.wait_s = client, address, wait_s
        self.workers: dict[str, _Worker] = {}
        self.messages: list[str] = []
        self.result_bytes = np.dtype(workload.result[0]).itemsize * math.prod(workload.result[1])
        self._setup = _Setup(
            tuple(os.path.abspath(each) for each in sys.path),
            workload.spec,
            {name: workload.examples[name] for name in workload.examples.places},
            workload.result,
        )
        self._said: set[str] = set()
        self._failed_starts = 0  # in a row

    async def addresses(self) -> set[str]:
        """Of the workers that are there and take work."""
        return set(await self.client.scheduler.ncores_running(workers=None))

    def welcome(self, addresses: Collection[str]) -> None:
        """Begin to prepare new workers."""
        if not addresses:
            return
        setup = asyncio.ensure_future(
            self.client.scatter(self._setup, workers=list(addresses), broadcast=True, hash=False)
        )
        for address in addresses:
            worker = self.workers[address] = _Worker(address)
            worker.prepared = asyncio.ensure_future(self._prepare(worker, setup))

    async def _prepare(self, worker: _Worker, setup: asyncio.Future[Future]) -> None:
        engine = self.submit(worker, build_engine, await asyncio.shield(setup))
        hello: _Hello = await self.client.gather(self.submit(worker, say_hello, engine))
        if hello.problem is not None:
            raise ModelError(hello.problem, hint=hello.hint)
        worker.engine, worker.peak_memory_bytes = engine, hello.peak_memory_bytes
        self._failed_starts = 0
        if hello.note:
            self.say_once(hello.note)
        ours = {name: str(value) for name, value in engine_environment().items()}
        others = [f"{name} is {value!r}, here {ours[name]!r}" for name, value in hello.facts if value != ours[name]]
        if others:
            self.say_once(f"a Dask worker differs from this machine: {'; '.join(others)}; {LAST_BITS}")

    def submit(self, worker: _Worker, function: Callable[..., Any], *arguments: Any) -> Future:
        """Have one worker, and no other, call a function."""
        return self.client.submit(function, *arguments, workers=[worker.address], allow_other_workers=False, pure=False)

    def say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self.messages.append(message)

    def forget(self, worker: _Worker, how: str) -> None:
        """A worker was lost. Raises `RunFailed` when one after the other is, before it can train."""
        self.workers.pop(worker.address, None)
        worker.prepared.cancel()
        self._failed_starts += worker.engine is None
        if self._failed_starts == MAX_ATTEMPTS:
            raise RunFailed(
                f"{MAX_ATTEMPTS} Dask workers were lost as they were prepared ({how})",
                hint="see the workers' logs; each needs memory for all clients' examples and twice that for a moment",
            )


class _Round:
    """The shards of one round: waiting, with a worker, or done; and how many workers each has lost."""

    def __init__(
        self, cluster: _Cluster, rule: SGD, streaming: StreamingSum | None, params_D: Float32, shards: Sequence[Shard]
    ) -> None:
        self._cluster, self._params_D, self._shards = cluster, params_D, shards
        self._rule, self._summing = rule, streaming
        self._waiting = deque(range(len(shards)))
        self._done: dict[int, _Trained] = {}
        self._losses = [0] * len(shards)
        self._taken = 0
        self._over = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._serving: dict[_Worker, asyncio.Task[None]] = {}

    async def begin(self) -> None:
        self._watching = self._going_on(self._watch())

    def _going_on(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """What has to go on for as long as the round does: without it `take` would wait for ever."""
        task = asyncio.ensure_future(work)

        def ended(task: asyncio.Task[None]) -> None:
            if not self._over and self._error is None and task in (self._watching, *self._serving.values()):
                why = "it was cancelled" if task.cancelled() else one_line(task.exception() or Exception("it returned"))
                self._fail(RunFailed(f"the driver of the Dask workers ended: {why}", hint="resume the run"))

        task.add_done_callback(ended)
        return task

    async def take(self, turn: int) -> _Trained:
        """A shard's outcome. The shards are asked for in their order."""
        self._taken = turn
        self._notify()
        while turn not in self._done:
            if self._error is not None:
                raise self._error
            await self._changed.wait()
        return self._done.pop(turn)

    async def end(self) -> None:
        """Nothing more is wanted. What a worker is at, it ends, and nobody hears of it."""
        self._over, tasks = True, [self._watching, *self._serving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self._cluster.workers.values():
            worker.bundles.clear()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._notify()

    async def _watch(self) -> None:
        """Take note of workers that come and go, for as long as the round lasts."""
        seen, cluster = time.monotonic(), self._cluster
        while self._error is None:
            problem = ""
            try:
                async with asyncio.timeout(cluster.wait_s):  # wait_for can swallow a cancellation (Python 3.11)
                    addresses = await cluster.addresses()
            except Exception as error:
                addresses, problem = set(), one_line(error)
            if addresses:
                seen = time.monotonic()
            elif time.monotonic() - seen > cluster.wait_s or cluster.client.status in ("closing", "closed"):
                self._fail(self._nobody(problem))
                return
            for worker in [each for each in cluster.workers.values() if each.address not in addresses]:
                self._lost(worker, "it is gone")
            cluster.welcome(addresses - cluster.workers.keys())
            for worker in cluster.workers.values():
                if worker not in self._serving:
                    self._serving[worker] = self._going_on(self._serve(worker))
            await asyncio.sleep(LOOK_S)

    def _nobody(self, problem: str) -> FedroundsError:
        address, wait_s = self._cluster.address, self._cluster.wait_s
        if problem:
            return Unreachable(
                f"the Dask scheduler at {address} does not answer any more: {problem}",
                hint="start it again, and its workers; then resume the run",
            )
        lost = f"; {sum(map(bool, self._losses))} shards of this round lost theirs" if any(self._losses) else ""
        return Unreachable(
            f"the Dask scheduler at {address} has had no worker for {wait_s:g} s{lost}",
            hint="start workers (docs/operations.md, Dask), then resume the run; execution.wait_s is how long to wait",
        )

    async def _serve(self, worker: _Worker) -> None:
        """Have one worker train, for as long as the round lasts or the worker is there."""
        from distributed.client import FutureCancelledError

        cluster = self._cluster
        try:
            await asyncio.shield(worker.prepared)
            # Answers are shielded: Dask fetches those of several workers together.
            params_D = await asyncio.shield(
                cluster.client.scatter(self._params_D, workers=[worker.address], hash=False)
            )
            while True:
                # Once a worker was lost, one at a time: else a shard whose result was still on its way when the next
                # one killed its worker would be blamed.
                depth = 1 if any(self._losses) else DEPTH
                while len(worker.bundles) < depth and (bundle := self._next_bundle()):
                    job = _Job(self._rule, self._summing, tuple(self._shards[index] for index in bundle))
                    future = cluster.submit(worker, train_shards, worker.engine, params_D, job)
                    worker.bundles.append((bundle, future))
                if not worker.bundles:
                    await self._changed.wait()
                    continue
                bundle, future = worker.bundles[0]
                answer: _Answer = await asyncio.shield(cluster.client.gather(future))
                if answer.problem is not None:
                    raise ModelError(answer.problem, hint=answer.hint)
                worker.bundles.popleft()
                worker.peak_memory_bytes = answer.peak_memory_bytes
                self._done.update(zip(bundle, answer.trained, strict=True))
                self._notify()
        except FedroundsError as error:
            self._fail(error)
        except (FutureCancelledError, OSError, KeyError) as error:
            self._lost(worker, one_line(error))
        except Exception as error:
            self._fail(
                RunFailed(
                    f"the Dask worker at {worker.address} cannot train: {one_line(error)}",
                    hint="scheduler and workers need the same packages as this process, fedrounds among them",
                )
            )

    def _next_bundle(self) -> tuple[int, ...]:
        """The next shards that one worker trains; a shard that lost one already is trained alone."""
        workers, most = len(self._serving), max(1, BUNDLE_BYTES // self._cluster.result_bytes)
        end = self._taken + 2 * DEPTH * workers * most  # results are held until it is their turn
        size = min(most, -(-len(self._waiting) // (TURNS * workers)))
        bundle: list[int] = []
        while self._waiting and self._waiting[0] < end and len(bundle) < size:
            if bundle and self._losses[self._waiting[0]]:
                break
            bundle.append(self._waiting.popleft())
            if self._losses[bundle[0]]:
                break
        return tuple(bundle)

    def _lost(self, worker: _Worker, how: str) -> None:
        task = self._serving.pop(worker, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        bundles = [bundle for bundle, _ in worker.bundles]
        worker.bundles.clear()
        for bundle in reversed(bundles):
            self._waiting.extendleft(reversed(bundle))
        try:
            self._cluster.forget(worker, how)
            told = ""
            if bundles:
                told = f"; trained again: {_names(self._shards, bundles[0])}"
                for index in bundles[0]:
                    self._losses[index] += 1
                if max(self._losses[index] for index in bundles[0]) == MAX_ATTEMPTS:
                    raise RunFailed(
                        f"{MAX_ATTEMPTS} Dask workers were lost ({how}) while they trained the same shard: "
                        f"{_names(self._shards, bundles[0])}",
                        hint="see the workers' logs; where memory ran out, a smaller execution.shard_size needs less",
                    )
            self._cluster.messages.append(f"the Dask worker at {worker.address} was lost ({how}){told}")
        except RunFailed as error:
            self._fail(error)
        self._notify()


def _names(shards: Sequence[Shard], bundle: Sequence[int]) -> str:
    return names_of([task for index in bundle for task in shards[index]])
