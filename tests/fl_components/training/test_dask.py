"""A real Dask scheduler and its workers, in processes of their own: the bits of a local training, or the reason."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, ModelError, NotInstalled, RunFailed, Unreachable
from fedrounds.fl_components.models import ModuleModel
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.hub import Hub, open_hub
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.training import DaskExecution
from fedrounds.fl_components.training import dask as module
from fedrounds.fl_components.training.dask import DaskTrainer
from fedrounds.fl_components.training.trainer import OwnTrainer
from fedrounds.flows.round import walk
from tests.fl_components.training.test_trainers import RULE, deaths, outcome, summing_of, tasks_of, workload
from tests.support import wait_until

PRELOAD = ("--preload", "fedrounds.fl_components.training.dask")  # all import torch at the same time, not when needed
FRAGILE = "tests.fl_components.training.test_trainers:fragile"


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
def trainer(work: Any, address: str, wait_s: float = 120.0) -> Iterator[tuple[DaskTrainer, list[str]]]:
    said: list[str] = []
    made = DaskTrainer(work, address, wait_s, said.append)
    try:
        yield made, said
    finally:
        made.close()


def engines(made: Any) -> list[Any]:
    """Of the workers that a trainer knows."""
    return [worker.engine for worker in made._cluster.workers.values() if worker.engine is not None]


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

    def walked(hub: Hub) -> str:
        for round in range(1, 4):
            if round == 2 and hub.config.execution.kind == "dask":
                wait_until(lambda: len(engines(hub.trainer)) == 2, "both workers have their engines")
                doom.touch()
            walk(stages, hub, round)
        return hub.state().params_digest

    with Store.open() as store, cluster(tmp_path) as far:
        for _ in range(2):
            far.add_worker("--no-nanny", DOOM=str(doom))
        far.wait_for(2)
        dask = config({"kind": "dask", "address": far.address, "wait_s": 120})
        with open_hub(store, "far", config=dask, say=said.append) as hub:
            digest = walked(hub)
            assert not doom.exists()
            assert hub.trainer.peak_memory_bytes > 100e6
        (lost,) = deaths(said)
        assert lost.startswith("the Dask worker at tcp://127.0.0.1:") and "; trained again: client" in lost
        assert [worker.poll() is None for worker in far.workers].count(True) == 1
        with open_hub(store, "here", config=config({"kind": "local", "processes": 1})) as hub:
            assert walked(hub) == digest

        for worker in far.workers:
            worker.kill()
        work = workload()
        with (
            trainer(work, far.address, wait_s=0.5) as (left, _),
            pytest.raises(Unreachable, match=r"has had no worker for 0\.5 s") as caught,
        ):
            outcome(left, work)
        assert caught.value.exit_code == 3 and "start workers" in str(caught.value.hint)


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.2)
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match=f"the Dask scheduler at {address} does not answer") as caught:
        DaskExecution(address=address).trainer(workload(), print)
    assert caught.value.exit_code == 3 and "execution.address" in str(caught.value.hint)


def test_without_dask_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(NotInstalled, match="distributed is not installed") as caught:
        DaskExecution(address="tcp://127.0.0.1:1").trainer(workload(), print)
    assert caught.value.exit_code == 3 and "fedrounds[server]" in str(caught.value.hint)


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "http://host:8786", "tcp://host"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"execution\.(dask\.)?address"):
        config({"kind": "dask", "address": address})


class Watched:
    """What a round asks of a cluster while it looks who is there; `gate` lets the answer through."""

    def __init__(self) -> None:
        self.workers: dict[str, Any] = {}
        self.wait_s, self.gate, self.client = 60.0, asyncio.Event(), self
        self.status = "running"
        self.answer: Callable[[], set[str]] = lambda: {"a"}

    async def addresses(self) -> set[str]:
        await self.gate.wait()
        return self.answer()

    def welcome(self, addresses: set[str]) -> None:
        """Nobody is prepared."""


class TestRound:
    """Its end waits for what it has begun, so that must end too; and what ends too early must not be waited for."""

    @pytest.mark.parametrize("turns", range(6))
    def test_it_ends_also_where_an_answer_comes_at_that_moment(self, turns: int) -> None:
        """asyncio.wait_for of Python 3.11 would swallow the cancellation between two turns of the loop."""

        async def scenario() -> None:
            watched: Any = Watched()
            round = module._Round(watched, RULE, None, np.zeros(1, np.float32), [])
            await round.begin()
            await asyncio.sleep(0)
            watched.gate.set()
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.wait_for(round.end(), 5)

        asyncio.run(scenario())

    def test_a_watcher_that_is_cancelled_by_somebody_else_is_not_waited_for(self) -> None:
        async def scenario() -> None:
            watched: Any = Watched()
            watched.gate.set()

            def cancelled() -> set[str]:
                raise asyncio.CancelledError

            watched.answer = cancelled
            round = module._Round(watched, RULE, None, np.zeros(1, np.float32), [[]])
            await round.begin()
            with pytest.raises(RunFailed, match="the driver of the Dask workers ended: it was cancelled"):
                await asyncio.wait_for(round.take(0), 5)
            await asyncio.wait_for(round.end(), 5)

        asyncio.run(scenario())


@pytest.mark.slow
class TestWorkers:
    @pytest.fixture
    def far(self, tmp_path: Path) -> Iterator[Cluster]:
        with cluster(tmp_path) as started:
            yield started

    @pytest.mark.parametrize("how", ["sum", "contributions", "each"])
    def test_workers_change_no_bit(self, far: Cluster, how: str) -> None:
        """One, two of them, one of which comes late; also after a round that was given up."""
        work = workload(how=how)
        expected = outcome(OwnTrainer(work, print), work)
        with trainer(work, far.address) as (far_trainer, said):
            far.add_worker("--no-nanny")
            assert outcome(far_trainer, work) == expected
            far.add_worker("--no-nanny", "--nthreads", "3")
            far.wait_for(2)
            while len(engines(far_trainer)) < 2:
                assert outcome(far_trainer, work) == expected
            for _ in far_trainer.train(RULE, flatten(work.module), tasks_of(work), summing_of(work), 1):
                break
            assert outcome(far_trainer, work) == expected
            assert said == []

    def test_large_bundles_and_small_windows_change_no_bit(self, far: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        work = workload(num_clients=61)
        expected = outcome(OwnTrainer(work, print), work)
        far.add_worker("--no-nanny")
        for bundle_bytes in (1, 10**9):
            monkeypatch.setattr(module, "BUNDLE_BYTES", bundle_bytes)
            with trainer(work, far.address) as (far_trainer, _):
                assert outcome(far_trainer, work) == expected

    def test_a_shard_that_every_worker_dies_of_ends_the_round(self, far: Cluster) -> None:
        work = workload(ModuleModel(path=FRAGILE))
        for _ in range(2):
            far.add_worker(FRAGILE="always")  # each with a nanny, which starts it again
        with trainer(work, far.address) as (far_trainer, said):
            with pytest.raises(RunFailed, match=r"3 Dask workers were lost .* the same shard: clients c3, c4, c5$"):
                outcome(far_trainer, work)
            assert 2 <= len(deaths(said)) < 6

    def test_a_restarted_worker_is_given_its_engine_again(self, far: Cluster, tmp_path: Path) -> None:
        work = workload(ModuleModel(path=FRAGILE))
        expected = outcome(OwnTrainer(work, print), work)
        (tmp_path / "once").touch()
        far.add_worker(FRAGILE=str(tmp_path / "once"))
        with trainer(work, far.address) as (far_trainer, said):
            assert outcome(far_trainer, work) == expected
            assert len(deaths(said)) == 1

    def test_an_error_of_the_model_names_its_clients(self, far: Cluster) -> None:
        work = workload(ModuleModel(path=FRAGILE))
        far.add_worker("--no-nanny", FRAGILE="raise")
        with trainer(work, far.address) as (far_trainer, _):
            with pytest.raises(ModelError, match=r"while client.*c4.* trained .*: ValueError: no such ward") as caught:
                outcome(far_trainer, work)
            assert caught.value.hint == "correct the model, then resume the run"

    def test_a_model_that_is_another_in_each_process(self, far: Cluster) -> None:
        work = workload(ModuleModel(path=FRAGILE.replace("fragile", "unsteady")))
        far.add_worker("--no-nanny")
        with trainer(work, far.address) as (far_trainer, _), pytest.raises(ModelError, match="others in each process"):
            outcome(far_trainer, work)

    def test_a_worker_without_fedrounds(self, far: Cluster, tmp_path: Path) -> None:
        (tmp_path / "fedrounds.py").touch()  # hides the package
        far.add_worker("--no-nanny", preload=(), PYTHONPATH=str(tmp_path))
        work = workload()
        with trainer(work, far.address) as (far_trainer, _):
            with pytest.raises(RunFailed, match=r"cannot train: .*fedrounds") as caught:
                outcome(far_trainer, work)
            assert "the same packages" in str(caught.value.hint)

    def test_a_scheduler_that_dies_ends_the_round(self, far: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "CONNECT_S", 2.0)
        work = workload()
        far.add_worker("--no-nanny")
        with trainer(work, far.address, wait_s=3.0) as (far_trainer, _):
            rounds = far_trainer.train(RULE, flatten(work.module), tasks_of(work), summing_of(work), 1)
            with pytest.raises(Unreachable):
                for _ in range(100):
                    next(rounds)
                    far.scheduler.kill()

    def test_another_engine_is_told_once(self, far: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = module.engine_environment()
        monkeypatch.setattr(module, "engine_environment", lambda: ours | {"torch": "0.1"})
        far.add_worker("--no-nanny")
        work = workload()
        with trainer(work, far.address) as (far_trainer, said):
            outcome(far_trainer, work)
            outcome(far_trainer, work)
            (told,) = said
            assert f"torch is {str(ours['torch'])!r}, here '0.1'" in told
