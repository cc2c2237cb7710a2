"""Processes that train: each on one thread, for as long as the run lasts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import FedroundsError, ModelError, RunFailed, one_line
from fedrounds.fl_components.shared_memory import ArraySpec, SharedMemory
from fedrounds.fl_components.training.chunk import ExampleTable
from fedrounds.fl_components.training.engine import Engine, ShardReport, StreamingSum, names_of
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.training.trainer import (
    ModelSpec,
    RowTask,
    Shard,
    T,
    Trainer,
    Workload,
    name_of,
    peak_memory_bytes,
    private_memory_bytes,
)

MAX_ATTEMPTS: Final = 3
"""How many processes may die of one shard before the round is given up."""

# What a process runs. It ends when the one that started it does: a thread sees to that, and on Linux the kernel for as
# long as imports keep threads from running (later it would be wrong: it looks at the thread that started the process).
_MAIN: Final = """
import ctypes, json, os, select, sys, threading
PR_SET_PDEATHSIG, SIGKILL = 1, 9
path, connection, parent = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
kernel = ctypes.CDLL(None) if sys.platform == "linux" else None
if kernel:
    kernel.prctl(PR_SET_PDEATHSIG, SIGKILL)
hung_up = select.poll()
hung_up.register(connection, 0)
def leave_with_parent():
    try:
        while not hung_up.poll(500) and os.getppid() == parent:
            pass
    finally:
        os._exit(1)
threading.Thread(target=leave_with_parent, daemon=True).start()
sys.path[:] = path
from fedrounds.fl_components.training.processes import serve
if kernel:
    kernel.prctl(PR_SET_PDEATHSIG, 0)
serve(connection)
"""


@dataclass(frozen=True, slots=True)
class _Setup:
    """The first message to a process: all that stays."""

    spec: ModelSpec
    examples: tuple[int, dict[str, ArraySpec]]
    exchange: tuple[int, dict[str, ArraySpec]]


@dataclass(frozen=True, slots=True)
class _Training:
    """A shard to train."""

    rule: SGD
    streaming: StreamingSum | None
    tasks: Shard

    def __call__(self, engine: Engine, params_D: Float32, slot: NDArray[Any]) -> ShardReport:
        return engine.train(self.rule, params_D, self.tasks, slot, self.streaming)


@dataclass(frozen=True, slots=True)
class _OnRows:
    """Work on the first rows of a slot."""

    work: RowTask[Any]
    num_rows: int

    def __call__(self, engine: Engine, params_D: Float32, slot: NDArray[Any]) -> Any:
        _ = engine, params_D
        with one_thread():
            return self.work(slot[: self.num_rows])


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What a process is to do with a slot of the exchange.

    Args:
      about: the clients or the updates, in words.
      fill: puts into the slot what the work is to find there.
    """

    work: _Training | _OnRows
    about: str
    fill: Callable[[NDArray[Any]], object] = lambda slot: None


@dataclass(frozen=True, slots=True)
class _Answer:
    """That a process is ready, that a job is done, or what went wrong, with the mend."""

    done: bool = False
    result: Any = None
    note: str = ""
    problem: str | None = None
    hint: str | None = None
    memory_bytes: int = 0
    began: float = 0.0
    ended: float = 0.0


class _Process:
    """One of them, seen from the process that started it. Raises OSError when it cannot be started."""

    def __init__(self, setup: _Setup) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        # What Python says of an end that it cannot tell otherwise; closed by `end`.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        fds = (theirs.fileno(), setup.examples[0], setup.exchange[0])
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                env=os.environ | threads,
                start_new_session=True,  # Ctrl-C is for the process that started it
            )
        self.ready = False
        self.job: int | None = None
        self.memory_bytes = 0
        with suppress(OSError):  # it died already, which is found out when its connection is read
            self.connection.send(setup)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.connection.close()
        self._said.close()

    def how_it_ended(self) -> str:
        code = self.popen.wait()
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().rpartition("\n")[2]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{how}: {last[:200]}" if last else how


class ProcessTrainer(Trainer):
    """Jobs go to whichever process is free. One that dies is replaced, and its job is done again."""

    def __init__(self, workload: Workload, num_processes: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._slots = 2 * num_processes  # for the jobs in work, and as many that wait for their turn
        _, self._slot_shape = workload.result
        self._examples = workload.examples
        self._exchange = SharedMemory.create(
            {"params": (np.float32, (workload.num_parameters,))}
            | {f"slot{slot}": workload.result for slot in range(self._slots)}
        )
        self._setup = _Setup(
            workload.spec,
            (self._examples.fd, dict(self._examples.places)),
            (self._exchange.fd, dict(self._exchange.places)),
        )
        self._notes: set[str] = set()
        self._failed_starts = 0  # in a row
        self._processes: list[_Process] = []
        self._num_processes = num_processes
        self._fill_up()

    def _fill_up(self) -> None:
        """Start the processes that are missing."""
        try:
            while len(self._processes) < self._num_processes:
                self._processes.append(_Process(self._setup))
        except OSError as error:
            self.close()
            raise RunFailed(
                f"a training process cannot be started: {one_line(error)}",
                hint="execution.processes: 1 trains without any; then resume the run",
            ) from error

    def is_ready(self) -> bool:
        """Whether all processes have built their engines. Does not wait. Raises what `train` raises."""
        for process in list(self._processes):
            if not process.ready and process.connection.poll():
                self._receive(process, _Round([]))
        return all(process.ready for process in self._processes)

    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], streaming: StreamingSum | None, rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        self._exchange["params"][:] = params_D
        jobs = [_Job(_Training(rule, streaming, tasks), names_of(tasks)) for tasks in shards]
        yield from self._done(jobs)

    def spread(
        self, work_on: Callable[[slice], RowTask[T]], rows_ND: Float32, unit: int, *, reads: bool, writes: bool
    ) -> Iterator[T]:
        pieces = self._pieces(rows_ND.shape, unit)
        if len(pieces) < 2:
            yield from super().spread(work_on, rows_ND, unit, reads=reads, writes=writes)
            return

        def job(rows: slice) -> _Job:
            num_rows = rows.stop - rows.start

            def fill(slot: NDArray[Any]) -> None:
                slot[:num_rows] = rows_ND[rows]

            work, about = _OnRows(work_on(rows), num_rows), f"updates {rows.start + 1} to {rows.stop}"
            return _Job(work, about, fill) if reads else _Job(work, about)

        for rows, (result, slot) in zip(pieces, self._done([job(rows) for rows in pieces]), strict=True):
            if writes:
                rows_ND[rows] = slot[: rows.stop - rows.start]
            yield result

    def _pieces(self, shape: tuple[int, ...], unit: int) -> list[slice]:
        """Rows for all slots and as many again, so that no process waits long for another; one piece where a slot, made
        for a shard's result, has no room for them."""
        num_rows, size = shape[0], -(-shape[0] // (2 * self._slots * unit)) * unit
        room = self._slot_shape[0] if self._slot_shape[1:] == shape[1:] else 0
        size = min(size, room // unit * unit) or num_rows or 1
        return [slice(start, min(num_rows, start + size)) for start in range(0, num_rows, size)]

    def _done(self, jobs: Sequence[_Job]) -> Iterator[tuple[Any, NDArray[Any]]]:
        """What each job returned, and its slot, in their order. Asking for the next one overwrites a slot."""
        self._fill_up()
        round, free = _Round(jobs), deque(range(self._slots))
        try:
            for turn in range(len(jobs)):
                while turn not in round.done:
                    self._hand_out(round, free)
                    talking = {process.connection: process for process in self._processes}
                    for connection in wait(list(talking)):
                        assert isinstance(connection, Connection)
                        self._receive(talking[connection], round)
                slot = round.slots.pop(turn)
                yield round.done.pop(turn), self._exchange[f"slot{slot}"]
                free.append(slot)
        finally:
            for process in list(self._processes):
                if process.job is not None:  # the round was given up: nothing may write into the next one's slots
                    self._end(process)

    def _hand_out(self, round: _Round, free: deque[int]) -> None:
        """Give each idle process the next job, as long as there is a slot for it."""
        for process in self._processes:
            if process.job is not None or not process.ready or not round.waiting:
                continue
            number = round.waiting[0]
            if number not in round.slots:
                if not free:
                    return
                round.slots[number] = free.popleft()
            process.job, job, slot = round.waiting.popleft(), round.jobs[number], f"slot{round.slots[number]}"
            job.fill(self._exchange[slot])
            # A process that died while it was idle is found out when its connection is read.
            with suppress(OSError):
                process.connection.send((job.work, slot))

    def _receive(self, process: _Process, round: _Round) -> None:
        """Take in what a process says, or that it died."""
        try:
            answer: _Answer = process.connection.recv()
        except (EOFError, OSError):
            self._died(process, round)
            return
        process.memory_bytes = max(process.memory_bytes, answer.memory_bytes)
        if answer.problem is not None:
            raise ModelError(answer.problem, hint=answer.hint)
        if answer.done and process.job is not None:
            work = round.jobs[process.job].work
            if isinstance(work, _Training):
                self.on_shard(name_of(work.tasks), answer.began, answer.ended, process.popen.pid)
            round.done[process.job], process.job = answer.result, None
            return
        process.ready, self._failed_starts = True, 0
        if answer.note and answer.note not in self._notes:
            self._notes.add(answer.note)
            self._say(answer.note)

    def _died(self, process: _Process, round: _Round) -> None:
        how = process.how_it_ended()
        if process.job is None:
            self._failed_starts += not process.ready
            if self._failed_starts == MAX_ATTEMPTS:
                raise RunFailed(
                    f"{MAX_ATTEMPTS} training processes ended as they started ({how})",
                    hint="execution.processes: 1 trains without any",
                )
            self._say(f"a training process died ({how}) and is replaced")
        else:
            round.deaths[process.job] += 1
            about = round.jobs[process.job].about
            if round.deaths[process.job] == MAX_ATTEMPTS:
                raise RunFailed(
                    f"{MAX_ATTEMPTS} training processes died ({how}) of the same work: {about}",
                    hint="where memory ran out, a smaller execution.shard_size or fewer execution.processes need less",
                )
            self._say(f"a training process died ({how}) and is replaced; its work is done again: {about}")
            round.waiting.appendleft(process.job)
        self._end(process)
        self._fill_up()

    def _end(self, process: _Process) -> None:
        self._processes.remove(process)
        process.end()

    def close(self) -> None:
        while self._processes:
            self._end(self._processes[0])

    @property
    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes() + sum(process.memory_bytes for process in self._processes)


class _Round:
    """Where jobs are: waiting, in work in some slot, done in some slot; and how often they failed."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.jobs = jobs
        self.waiting = deque(range(len(jobs)))
        self.slots: dict[int, int] = {}
        self.done: dict[int, Any] = {}
        self.deaths = [0] * len(jobs)


def serve(fd: int) -> None:
    """The life of a training process. `fd` is its connection to the process that started it."""
    connection = Connection(fd)
    try:
        setup: _Setup = connection.recv()
        examples, exchange = SharedMemory(*setup.examples), SharedMemory(*setup.exchange)
        x, y = (torch.from_numpy(examples[name]) for name in ("x", "y"))
        engine = Engine(setup.spec.build(), ExampleTable(x, y, examples["starts"], examples["stops"], setup.spec.task))
        connection.send(_Answer(note=engine.note, memory_bytes=private_memory_bytes()))
        while True:
            work, slot = connection.recv()
            began = time.time()
            result = work(engine, exchange["params"], exchange[slot])
            connection.send(_Answer(True, result, memory_bytes=private_memory_bytes(), began=began, ended=time.time()))
    except EOFError:
        return
    except FedroundsError as error:
        connection.send(_Answer(problem=error.message, hint=error.hint))
    except Exception as error:
        connection.send(_Answer(problem=f"a training process failed: {one_line(error)}"))
