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
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from fl_components.errors import FedroundsError, ModelError, RunFailed, one_line
from fl_components.shared_memory import Place, SharedMemory
from fl_components.training.chunk import Examples
from fl_components.training.engine import Engine, ShardReport, Summing, names_of
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
import ctypes, json, os, select, sys, threading
PR_SET_PDEATHSIG, SIGKILL = 1, 9
path, connection, parent = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
kernel = ctypes.CDLL(None) if sys.platform == "linux" else None
if kernel:
    kernel.prctl(PR_SET_PDEATHSIG, SIGKILL)
hung_up = select.poll()
hung_up.register(connection, 0)
def leave_with_parent():
    while not hung_up.poll(500) and os.getppid() == parent:
        pass
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
    examples: tuple[int, dict[str, Place]]
    exchange: tuple[int, dict[str, Place]]


@dataclass(frozen=True, slots=True)
class _Job:
    """A shard to train from the parameters in the exchange; its result goes into that slot of the exchange."""

    rule: SGD
    summing: Summing | None
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
        self.shard: int | None = None
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
    """Shards go to whichever process is free. One that dies is replaced, and its shard is trained again."""

    def __init__(self, workload: Workload, num_processes: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._slots = 2 * num_processes  # for the shards in work, and as many that wait for their turn
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
        self, rule: SGD, params_D: Float32, shards: Sequence[Shard], summing: Summing | None, rounds_left: int
    ) -> Iterator[tuple[ShardReport, NDArray[np.floating]]]:
        self._exchange["params"][:] = params_D
        self._fill_up()
        round, free = _Round(shards), deque(range(self._slots))
        try:
            for turn in range(len(shards)):
                while turn not in round.done:
                    self._hand_out(rule, summing, round, free)
                    talking = {process.connection: process for process in self._processes}
                    for connection in wait(list(talking)):
                        assert isinstance(connection, Connection)
                        self._receive(talking[connection], round)
                slot = round.slots.pop(turn)
                yield round.done.pop(turn), self._exchange[f"slot{slot}"]
                free.append(slot)
        finally:
            for process in list(self._processes):
                if process.shard is not None:  # the round was given up: nothing may write into the next one's slots
                    self._end(process)

    def _hand_out(self, rule: SGD, summing: Summing | None, round: _Round, free: deque[int]) -> None:
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
                process.connection.send(_Job(rule, summing, round.shards[shard], round.slots[shard]))

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
        if answer.report is not None and process.shard is not None:
            name = name_of(round.shards[process.shard])
            self.on_shard(name, answer.began, answer.ended, process.popen.pid)
            round.done[process.shard], process.shard = answer.report, None
            return
        process.ready, self._failed_starts = True, 0
        if answer.note and answer.note not in self._notes:
            self._notes.add(answer.note)
            self._say(answer.note)

    def _died(self, process: _Process, round: _Round) -> None:
        how = process.how_it_ended()
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
            clients = names_of(round.shards[shard])
            if round.deaths[shard] == MOST_ATTEMPTS:
                raise RunFailed(
                    f"{MOST_ATTEMPTS} training processes died ({how}) of the same shard: {clients}",
                    hint="where memory ran out, a smaller execution.shard_size or fewer execution.processes need less",
                )
            self._say(f"a training process died ({how}) and is replaced; its shard is trained again: {clients}")
            round.waiting.appendleft(shard)
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
    try:
        setup: _Setup = connection.recv()
        examples, exchange = SharedMemory(*setup.examples), SharedMemory(*setup.exchange)
        x, y = (torch.from_numpy(examples[name]) for name in ("x", "y"))
        engine = Engine(setup.spec.build(), Examples(x, y, examples["starts"], examples["stops"]))
        connection.send(_Answer(note=engine.note, memory_bytes=private_memory_bytes()))
        while True:
            job: _Job = connection.recv()
            began = time.time()
            report = engine.train(job.rule, exchange["params"], job.tasks, exchange[f"slot{job.slot}"], job.summing)
            connection.send(_Answer(report, memory_bytes=private_memory_bytes(), began=began, ended=time.time()))
    except EOFError:
        return
    except FedroundsError as error:
        connection.send(_Answer(problem=error.message, hint=error.hint))
    except Exception as error:
        connection.send(_Answer(problem=f"a training process failed: {one_line(error)}"))
