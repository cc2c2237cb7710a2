"""Workers of a real Dask cluster, in processes of their own: the contract, and what only Dask can go through."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, NotInstalled, RunFailed, Unreachable
from fedrounds.fl_components.executors import DaskExecution, Workload
from fedrounds.fl_components.executors import dask as module
from fedrounds.fl_components.executors.dask import DaskTransport, DaskWorker
from fedrounds.fl_components.executors.scheduler import ScheduledExecutor
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from tests.fl_components.executors.contract import (
    NUM_ROWS,
    ROWS_ND,
    RULE,
    WorkerContract,
    expected_outcome,
    fragile_workload,
    halve,
    losses,
    outcome,
    shards_of,
    streaming_of,
    workload,
)
from tests.support import wait_until

PRELOAD = ("--preload", "fedrounds.fl_components.executors.dask")  # all import torch at the same time, not when needed


class Doomed(torch.nn.Sequential):
    """Kills the process that removes the file which the environment of Dask's workers names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with suppress(KeyError, FileNotFoundError):
            os.remove(os.environ["DOOM"])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def doomed() -> torch.nn.Module:
    return Doomed(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))


class Cluster:
    """A scheduler, and workers as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workers = folder, list[subprocess.Popen[bytes]]()
        self._log = (folder / "log").open("wb")
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.scheduler = self._start("scheduler", *PRELOAD, "--host", "127.0.0.1", "--port", str(self.port))
        wait_until(self._answers, "the scheduler answers")

    def add_worker(self, *options: str, preload: tuple[str, ...] = PRELOAD, **environment: str) -> None:
        arguments = [*preload, self.address, "--nthreads", "1", "--memory-limit", "0"]
        arguments += ["--local-directory", str(self.folder)]
        self.workers.append(self._start("worker", *arguments, *options, **environment))

    def _start(self, what: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            stdout=self._log,
            stderr=self._log,
        )

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def wait_for(self, workers: int) -> None:
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)

    def stop(self) -> None:
        for process in [*self.workers, self.scheduler]:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):  # a nanny's worker
                    child.kill()
            process.kill()
            process.wait()
        self._log.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    started = Cluster(folder)
    try:
        yield started
    finally:
        started.stop()


@contextmanager
def connected(work: Workload, address: str, wait_s: float = 120.0) -> Iterator[tuple[ScheduledExecutor, list[str]]]:
    messages: list[str] = []
    executor = ScheduledExecutor(work, DaskTransport(work, address, wait_s), messages.append)
    try:
        yield executor, messages
    finally:
        executor.close()


def workers_of(executor: Any) -> list[DaskWorker]:
    """The workers that have their engines."""
    return [worker for worker in executor.transport.workers if worker.engine is not None]


def config(execution: dict[str, Any]) -> Any:
    return parse_config(
        {
            "name": "far",
            "rounds": 3,
            "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 20}},
            "model": {"kind": "module", "path": f"{__name__}:doomed"},
            "training": {"learning_rate": 0.1, "epochs": 1, "batch_size": 10, "momentum": 0.9},
            "selection": {"kind": "uniform", "cohort_size": 20},
            "execution": {"shard_size": 2, **execution},
        }
    )


@pytest.mark.ci
def test_the_digest_is_that_of_a_local_training_also_when_a_worker_is_killed(home: Path, tmp_path: Path) -> None:
    doom, said = tmp_path / "doom", list[str]()

    def walked(run: Run) -> str:
        for round in range(1, 4):
            if round == 2 and run.config.execution.kind == "dask":
                wait_until(lambda: len(workers_of(run.executor)) == 2, "both workers have their engines")
                doom.touch()
            walk(stages, run, round)
        return run.state().params_digest

    with Store.open() as store, cluster(tmp_path) as far:
        for _ in range(2):
            far.add_worker("--no-nanny", DOOM=str(doom))
        far.wait_for(2)
        dask = config({"kind": "dask", "address": far.address, "wait_s": 120})
        with open_run(store, "far", config=dask, notify=said.append) as run:
            digest = walked(run)
            assert not doom.exists()
            assert run.executor.peak_memory_bytes > 100e6
        (lost,) = losses(said)
        assert lost.startswith("the Dask worker at tcp://127.0.0.1:") and "; its work is repeated: client" in lost
        assert [worker.poll() is None for worker in far.workers].count(True) == 1
        with open_run(store, "here", config=config({"kind": "local", "processes": 1})) as run:
            assert walked(run) == digest

        for worker in far.workers:
            worker.kill()
        work = workload()
        with (
            connected(work, far.address, wait_s=0.5) as (left, _),
            pytest.raises(Unreachable, match=r"has had no worker for 0\.5 s") as caught,
        ):
            outcome(left, work)
        assert caught.value.exit_code == 3 and "start workers" in str(caught.value.hint)


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.2)
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match=f"the Dask scheduler at {address} does not answer") as caught:
        DaskExecution(address=address).executor(workload(), print)
    assert caught.value.exit_code == 3 and "execution.address" in str(caught.value.hint)


def test_without_dask_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(NotInstalled, match="distributed is not installed") as caught:
        DaskExecution(address="tcp://127.0.0.1:1").executor(workload(), print)
    assert caught.value.exit_code == 3 and "fedrounds[server]" in str(caught.value.hint)


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "http://host:8786", "tcp://host"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"execution\.(dask\.)?address"):
        config({"kind": "dask", "address": address})


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as started:
        yield started


@pytest.mark.slow
class TestDask(WorkerContract):
    noun = "Dask workers"
    has_one_job = False

    @pytest.fixture(autouse=True)
    def _cluster(self, far: Cluster) -> None:
        self.far = far

    @contextmanager
    def executor(self, work: Workload, **environment: str) -> Iterator[tuple[ScheduledExecutor, list[str]]]:
        """With two workers, each with a nanny, which starts it again."""
        for _ in range(2):
            self.far.add_worker(**environment)
        self.far.wait_for(2)
        with connected(work, self.far.address) as executor:
            yield executor


@pytest.mark.ci
def test_updates_are_mapped_at_the_workers(far: Cluster) -> None:
    """Compression and decoding run where training runs."""
    far.add_worker("--no-nanny")
    work = workload(how="each")
    with connected(work, far.address) as (executor, messages):
        outcome(executor, work)
        rows_ND = ROWS_ND.copy()
        halved = list(executor.map_rows(halve, rows_ND, list(range(NUM_ROWS)), access="r+"))
        assert [len(block) for block, _, _ in halved] == [5] * 4
        assert {process for _, _, process in halved} == {far.workers[0].pid}
        assert (rows_ND == ROWS_ND / 2).all() and messages == []


@pytest.mark.slow
class TestWorkers:
    def test_workers_that_come_late_change_no_bit(self, far: Cluster) -> None:
        work = workload()
        expected = expected_outcome(work)
        with connected(work, far.address) as (executor, messages):
            far.add_worker("--no-nanny")
            assert outcome(executor, work) == expected
            far.add_worker("--no-nanny", "--nthreads", "3")
            far.wait_for(2)
            while len(workers_of(executor)) < 2:
                assert outcome(executor, work) == expected
            for _ in executor.train(RULE, flatten(work.module), shards_of(work), streaming_of(work)):
                break
            assert outcome(executor, work) == expected
            assert messages == []

    def test_the_size_of_bundles_changes_no_bit(self, far: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        work = workload(num_clients=61)
        expected = expected_outcome(work)
        far.add_worker("--no-nanny")
        for bundle_bytes in (1, 10**9):
            monkeypatch.setattr(module, "BUNDLE_BYTES", bundle_bytes)
            with connected(work, far.address) as (executor, _):
                assert outcome(executor, work) == expected

    def test_a_restarted_worker_is_given_its_engine_again(self, far: Cluster, tmp_path: Path) -> None:
        work = fragile_workload()
        expected = expected_outcome(work)
        (tmp_path / "once").touch()
        far.add_worker(FRAGILE=str(tmp_path / "once"))
        with connected(work, far.address) as (executor, messages):
            assert outcome(executor, work) == expected
            assert len(losses(messages)) == 1

    def test_a_worker_without_fedrounds(self, far: Cluster, tmp_path: Path) -> None:
        (tmp_path / "fedrounds.py").touch()  # hides the package
        far.add_worker("--no-nanny", preload=(), PYTHONPATH=str(tmp_path))
        work = workload()
        with connected(work, far.address) as (executor, _):
            with pytest.raises(RunFailed, match=r"cannot train: .*fedrounds") as caught:
                outcome(executor, work)
            assert "the same packages" in str(caught.value.hint)

    def test_a_scheduler_that_dies_ends_the_round(self, far: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "CONNECT_S", 2.0)
        work = workload()
        far.add_worker("--no-nanny")
        with connected(work, far.address, wait_s=3.0) as (executor, _):
            rounds = executor.train(RULE, flatten(work.module), shards_of(work), streaming_of(work))
            with pytest.raises(Unreachable):
                for _ in range(100):
                    next(rounds)
                    far.scheduler.kill()

    def test_a_different_engine_is_reported_once(self, far: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = module.engine_environment()
        monkeypatch.setattr(module, "engine_environment", lambda: ours | {"torch": "0.1"})
        far.add_worker("--no-nanny")
        work = workload()
        with connected(work, far.address) as (executor, messages):
            outcome(executor, work)
            outcome(executor, work)
            (message,) = messages
            assert f"torch is {str(ours['torch'])!r}, here '0.1'" in message
