"""Processes that train: each on one thread, for as long as the run lasts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fl_components.errors import FedroundsError, ModelError, RunFailed, one_line
from fl_components.shared_memory import Place, SharedMemory
from fl_components.training.chunk import Examples
from fl_components.training.engine import Additive, Engine, ShardReport
from fl_components.training.sgd import SGD
from fl_components.training.trainer import (
    ModelSpec,
    Shard,
    Trainer,
    Workload,
    name_of,
    peak_memory_bytes,
    private_memory_bytes,
)
from fl_components.values import Float32

MOST_ATTEMPTS: Final = 3
"""How many processes may die of one shard before the round is given up."""

# What a process runs. It ends when the one that started it does: a thread sees to that, and on Linux the kernel for as
# long as imports keep threads from running (later it would be wrong: it looks at the thread that started the process).
_MAIN: Final = """
import ctypes, json, os, sys, threading, time
PR_SET_PDEATHSIG, SIGKILL = 1, 9
path, connection, parent = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
kernel = ctypes.CDLL(None) if sys.platform == "linux" else None
if kernel:
    kernel.prctl(PR_SET_PDEATHSIG, SIGKILL)
def leave_with_parent():
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
threading.Thread(target=leave_with_parent, daemon=True).start()
sys.path[:] = path
from fl_components.training.processes import serve
if kernel:
    kernel.prctl(PR_SET_PDEATHSIG, 0)
serve(connection)
"""


@dataclass(frozen=True, slots=True)
class _Setup:
    """The first message to a process: all that stays."""

    spec: ModelSpec
    additive: Additive | None
    examples: tuple[int, dict[str, Place]]
    exchange: tuple[int, dict[str, Place]]


@dataclass(frozen=True, slots=True)
class _Job:
    """A shard to train from the parameters in the exchange; its result goes into that slot of the exchange."""

    rule: SGD
    tasks: Shard
    slot: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """That a process is ready (no report), that a job is done, or what went wrong, with the mend."""

    report: ShardReport | None = None
    note: str = ""
    problem: str | None = None
    hint: str | None = None
    memory_bytes: int = 0
    began: float = 0.0
    ended: float = 0.0


class _Process:
    """One of them, seen from the process that started it."""

    def __init__(self, setup: _Setup) -> None:
        ours, theirs = socket.socketpair()
        fds = (theirs.fileno(), setup.examples[0], setup.exchange[0])
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | threads,
                start_new_session=True,  # Ctrl-C is for the process that started it
            )
        self.connection = Connection(ours.detach())
        self.ready = False
        self.shard: int | None = None
        self.memory_bytes = 0
        self.connection.send(setup)

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.connection.close()

    def how_it_ended(self) -> str:
        code = self.popen.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class ProcessTrainer(Trainer):
    """Shards go to whichever process is free. One that dies is replaced, and its shard is trained again."""

    def __init__(self, workload: Workload, num_processes: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._slots = 2 * num_processes  # for the shards in work, and as many that wait for their turn
        self._examples = workload.examples
        self._exchange = SharedMemory.create(
            {"params": (np.float32, (workload.num_parameters,))}
            | {f"slot{slot}": (np.float32, workload.result_shape) for slot in range(self._slots)}
        )
        self._setup = _Setup(
            workload.spec,
            workload.additive,
            (self._examples.fd, dict(self._examples.places)),
            (self._exchange.fd, dict(self._exchange.places)),
        )
        self._notes: set[str] = set()
        self._failed_starts = 0  # in a row
        self._processes = [_Process(self._setup) for _ in range(num_processes)]

    def is_ready(self) -> bool:
        """Whether all processes have built their engines. Does not wait. Raises what `train` raises."""
        for index, process in enumerate(self._processes):
            if not process.ready and process.connection.poll():
                self._receive(index, _Round([]))
        return all(process.ready for process in self._processes)

    def train(
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.float32]]]:
        self._exchange["params"][:] = params_D
        round, free = _Round(shards), deque(range(self._slots))
        try:
            for turn in range(len(shards)):
                while turn not in round.done:
                    self._hand_out(rule, round, free)
                    indices = {process.connection: index for index, process in enumerate(self._processes)}
                    for connection in wait(list(indices)):
                        assert isinstance(connection, Connection)
                        self._receive(indices[connection], round)
                slot = round.slots.pop(turn)
                yield round.done.pop(turn), self._exchange[f"slot{slot}"]
                free.append(slot)
        finally:
            for index, process in enumerate(self._processes):
                if process.shard is not None:  # the round was given up: nothing may write into the next one's slots
                    self._replace(index)

    def _hand_out(self, rule: SGD, round: _Round, free: deque[int]) -> None:
        """Give each idle process the next shard, as long as there is a slot for its result."""
        for process in self._processes:
            if process.shard is not None or not process.ready or not round.waiting:
                continue
            shard = round.waiting[0]
            if shard not in round.slots:
                if not free:
                    return
                round.slots[shard] = free.popleft()
            process.shard = round.waiting.popleft()
            # A process that died while it was idle is found out when its connection is read.
            with suppress(OSError):
                process.connection.send(_Job(rule, round.shards[shard], round.slots[shard]))

    def _receive(self, index: int, round: _Round) -> None:
        """Take in what a process says, or that it died."""
        process = self._processes[index]
        try:
            answer = process.connection.recv()
        except (EOFError, OSError):
            self._died(index, round)
            return
        process.memory_bytes = max(process.memory_bytes, answer.memory_bytes)
        if answer.problem is not None:
            raise ModelError(answer.problem, hint=answer.hint)
        if answer.report is not None and process.shard is not None:
            name = name_of(round.shards[process.shard])
            self.on_shard(name, answer.began, answer.ended, process.popen.pid)
            round.done[process.shard], process.shard = answer.report, None
            return
        process.ready, self._failed_starts = True, 0
        if answer.note and answer.note not in self._notes:
            self._notes.add(answer.note)
            self._say(answer.note)

    def _died(self, index: int, round: _Round) -> None:
        process, how = self._processes[index], self._processes[index].how_it_ended()
        if process.shard is None:
            self._failed_starts += not process.ready
            if self._failed_starts == MOST_ATTEMPTS:
                raise RunFailed(
                    f"{MOST_ATTEMPTS} training processes ended as they started ({how})",
                    hint="execution.processes: 1 trains without any",
                )
            self._say(f"a training process died ({how}) and is replaced")
        else:
            shard = process.shard
            round.deaths[shard] += 1
            clients = ", ".join(task.client_id for task in round.shards[shard])
            if round.deaths[shard] == MOST_ATTEMPTS:
                raise RunFailed(
                    f"{MOST_ATTEMPTS} training processes died ({how}) of the same shard of clients: {clients}",
                    hint="where memory ran out, a smaller execution.shard_size or fewer execution.processes need less",
                )
            self._say(f"a training process died ({how}) and is replaced; its shard is trained again: {clients}")
            round.waiting.appendleft(shard)
        self._replace(index)

    def _replace(self, index: int) -> None:
        self._processes[index].end()
        self._processes[index] = _Process(self._setup)

    def close(self) -> None:
        for process in self._processes:
            process.end()

    @property
    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes() + sum(process.memory_bytes for process in self._processes)


class _Round:
    """Where the shards of a round are: waiting, in work in some slot, done in some slot; and how often they failed."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = shards
        self.waiting = deque(range(len(shards)))
        self.slots: dict[int, int] = {}
        self.done: dict[int, ShardReport] = {}
        self.deaths = [0] * len(shards)


def serve(fd: int) -> None:
    """The life of a training process. `fd` is its connection to the process that started it."""
    connection = Connection(fd)
    setup: _Setup = connection.recv()
    try:
        examples, exchange = SharedMemory(*setup.examples), SharedMemory(*setup.exchange)
        x, y = (torch.from_numpy(examples[name]) for name in ("x", "y"))
        engine = Engine(setup.spec.build(), Examples(x, y, examples["starts"], examples["stops"]))
        connection.send(_Answer(note=engine.note, memory_bytes=private_memory_bytes()))
        while True:
            job: _Job = connection.recv()
            began = time.time()
            report = engine.train(job.rule, exchange["params"], job.tasks, exchange[f"slot{job.slot}"], setup.additive)
            connection.send(_Answer(report, memory_bytes=private_memory_bytes(), began=began, ended=time.time()))
    except EOFError:
        return
    except FedroundsError as error:
        connection.send(_Answer(problem=error.message, hint=error.hint))
    except Exception as error:
        connection.send(_Answer(problem=f"a training process failed: {one_line(error)}"))
