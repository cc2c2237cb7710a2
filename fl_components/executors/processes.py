"""Training processes of this machine: each on one thread, for as long as the run lasts.

They share the examples, the parameters and the results with the process that started them; only small values are sent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import RunFailed, one_line
from fedrounds.fl_components.executors.base import Workload, make_engine, private_memory_bytes
from fedrounds.fl_components.executors.scheduler import (
    Job,
    Message,
    Transport,
    Worker,
    problem_message,
    run_job,
)
from fedrounds.fl_components.models import ModelSpec
from fedrounds.fl_components.shared_memory import ArraySpec, SharedMemory
from fedrounds.fl_components.task import LearningTask

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
from fedrounds.fl_components.executors.processes import serve
if kernel:
    kernel.prctl(PR_SET_PDEATHSIG, 0)
serve(connection)
"""


@dataclass(frozen=True, slots=True)
class _Setup:
    """The first message to a process: everything that stays the same."""

    spec: ModelSpec
    task: LearningTask
    examples: tuple[int, dict[str, ArraySpec]]
    exchange: tuple[int, dict[str, ArraySpec]]


class TrainingProcess(Worker):
    """A training process, seen from the process that started it. Raises OSError when it cannot be started."""

    def __init__(self, setup: _Setup) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        # Python's last words, where it ends in a way that it cannot report otherwise; closed by `end`.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        fds = (theirs.fileno(), setup.examples[0], setup.exchange[0])
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                env=os.environ | threads,
                start_new_session=True,  # Ctrl-C is for the process that started it
            )
        super().__init__(f"training process {self.popen.pid}")
        with suppress(OSError):  # it died already, which is noticed when its connection is read
            self.connection.send(setup)

    def end(self) -> None:
        """End it at once, whatever it is doing."""
        self.popen.kill()
        self.popen.wait()
        self.connection.close()
        self._stderr.close()

    def wait_for_cause(self) -> str:
        """Wait for its end, and return the cause."""
        code = self.popen.wait()
        self._stderr.seek(0)
        last_line = self._stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{cause}: {last_line[:200]}" if last_line else cause


class ProcessTransport(Transport):
    """Keeps a number of training processes. Arrays are exchanged in slots of a shared memory."""

    noun = "training processes"
    depth = 1
    bundle_size = 1
    loss_hint = "where memory ran out, a smaller execution.shard_size or fewer execution.processes need less"
    start_hint = "execution.processes: 1 trains without any"

    def __init__(self, workload: Workload, num_processes: int) -> None:
        self.workers: list[TrainingProcess] = []
        self.block_rows = workload.result[1][0]
        self._num_processes = num_processes
        # The scheduler is ahead by so many jobs at most, so a job's slot is free when it is submitted.
        self._num_slots = 2 * num_processes
        self._exchange = SharedMemory.create(
            {"params": (np.float32, (workload.num_parameters,))}
            | {f"slot{slot}": workload.result for slot in range(self._num_slots)}
        )
        self._examples = workload.examples  # which keeps its file descriptor open
        self._setup = _Setup(
            workload.spec,
            workload.task,
            (self._examples.fd, dict(self._examples.layout)),
            (self._exchange.fd, dict(self._exchange.layout)),
        )

    def _start_missing(self) -> None:
        try:
            while len(self.workers) < self._num_processes:
                self.workers.append(TrainingProcess(self._setup))
        except OSError as error:
            self.close()
            raise RunFailed(
                f"a training process cannot be started: {one_line(error)}",
                hint=f"{self.start_hint}; then resume the run",
            ) from error

    def begin(self, base_M: Float32 | None) -> None:
        if base_M is not None:
            self._exchange["params"][:] = base_M
        self._start_missing()

    def _slot(self, job: Job) -> str:
        return f"slot{job.index % self._num_slots}"

    def submit(self, worker: Worker, bundle: tuple[Job, ...]) -> None:
        assert isinstance(worker, TrainingProcess)
        (job,) = bundle
        if job.rows is not None:
            self._exchange[self._slot(job)][: job.length] = job.rows
        with suppress(OSError):  # it died while it was idle, which is noticed when its connection is read
            worker.connection.send((job.index, job.work, self._slot(job), job.length))

    def poll(self, *, block: bool = True) -> list[tuple[Worker, Message]]:
        self._start_missing()
        by_connection = {worker.connection: worker for worker in self.workers}
        readable = wait(list(by_connection), None if block else 0)
        return [(worker, self._receive(worker)) for worker in map(by_connection.__getitem__, readable)]  # type: ignore[arg-type]

    def _receive(self, process: TrainingProcess) -> Message:
        try:
            message: Message = process.connection.recv()
        except (EOFError, OSError):
            return Message(lost=process.wait_for_cause())
        if not message.results:
            return message
        ((job,),) = process.bundles
        array = self._exchange[self._slot(job)][: job.length] if job.returns_array else None
        return replace(message, results=(replace(message.results[0], array=array),))

    def abandon(self, worker: Worker) -> None:
        self.remove(worker)  # it may not write into a slot of the next jobs

    def remove(self, worker: Worker) -> None:
        assert isinstance(worker, TrainingProcess)
        self.workers.remove(worker)
        worker.end()

    def close(self) -> None:
        while self.workers:
            self.remove(self.workers[0])


def serve(fd: int) -> None:
    """Run jobs in a training process until its parent hangs up. `fd` is the connection to the parent."""
    connection = Connection(fd)
    try:
        setup: _Setup = connection.recv()
        examples, exchange = SharedMemory(*setup.examples), SharedMemory(*setup.exchange)
        engine = make_engine(setup.spec.build(), examples, setup.task)
        notes = (engine.note,) if engine.note else ()
        connection.send(Message(notes=notes, memory_bytes=private_memory_bytes()))
        while True:
            index, work, slot, length = connection.recv()
            array: NDArray[Any] = exchange[slot][:length]
            result = run_job(index, work, engine, exchange["params"], array)
            connection.send(Message((result,), memory_bytes=private_memory_bytes()))
    except EOFError:
        return
    except Exception as error:
        connection.send(problem_message(error))
