"""Training processes: the contract, and their end with the process that started them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedrounds.fl_components.errors import RunFailed
from fedrounds.fl_components.executors import Workload
from fedrounds.fl_components.executors.processes import ProcessTransport, TrainingProcess
from fedrounds.fl_components.executors.scheduler import ScheduledExecutor
from tests.fl_components.executors import contract
from tests.fl_components.executors.contract import (
    NUM_ROWS,
    ROWS_ND,
    WorkerContract,
    expected_outcome,
    fragile_workload,
    halve,
    losses,
    outcome,
    workload,
)

SCRIPT = f"""
import sys, time
sys.path[:] = {sys.path!r}
from {contract.__name__} import fragile_workload, outcome, workload
from {__name__} import started, pids
"""


def started(work: Workload, num_processes: int, say: Any = print) -> ScheduledExecutor:
    return ScheduledExecutor(work, ProcessTransport(work, num_processes), say)


def processes_of(executor: ScheduledExecutor) -> list[TrainingProcess]:
    return list(executor.transport.workers)  # type: ignore[arg-type]


def pids(executor: ScheduledExecutor) -> list[int]:
    return [process.popen.pid for process in processes_of(executor)]


def is_running(pid: int) -> bool:
    """Whether it runs, rather than only waits for its new parent to take note of its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def running(work: Workload, num_processes: int = 2) -> Iterator[tuple[ScheduledExecutor, list[str]]]:
    messages: list[str] = []
    executor = started(work, num_processes, messages.append)
    try:
        yield executor, messages
    finally:
        last = pids(executor)
        executor.close()
        assert not any(psutil.pid_exists(pid) for pid in last)


@pytest.mark.ci
class TestProcesses(WorkerContract):
    noun = "training processes"

    @contextmanager
    def executor(self, work: Workload, **_: Any) -> Iterator[tuple[ScheduledExecutor, list[str]]]:
        with running(work) as executor:
            yield executor

    @pytest.mark.slow
    @pytest.mark.parametrize("num_processes", [1, 3, 5])
    def test_their_number_changes_no_bit(self, num_processes: int) -> None:
        work = workload()
        with running(work, num_processes) as (executor, messages):
            assert outcome(executor, work) == expected_outcome(work)
            assert messages == []

    def test_a_round_that_was_given_up_leaves_no_process_at_work(self) -> None:
        """None may write into the memory of the next one."""
        work = workload()
        with running(work) as (executor, _):
            outcome(executor, work)
            rounds = executor.map_rows(halve, ROWS_ND.copy(), list(range(NUM_ROWS)), access="r+")
            next(rounds)
            rounds.close()  # type: ignore[attr-defined]
            assert all(not process.bundles for process in processes_of(executor))

    def test_rows_go_to_processes_in_blocks_that_fit_a_slot(self) -> None:
        work = workload(how="each")
        with running(work) as (executor, _):
            outcome(executor, work)
            for block_rows, size in ((1, 3), (2, 2), (3, 3)):  # a slot has three rows
                halved = list(
                    executor.map_rows(halve, ROWS_ND.copy(), list(range(NUM_ROWS)), block_rows=block_rows, access="r+")
                )
                assert [block[0] for block, _, _ in halved] == list(range(0, NUM_ROWS, size))
                assert {pid for _, _, pid in halved} <= set(pids(executor))

    @pytest.mark.slow
    def test_one_that_dies_while_it_is_idle_is_replaced(self) -> None:
        work = fragile_workload()
        with running(work) as (executor, messages):
            expected = outcome(executor, work)
            killed = processes_of(executor)[0].popen
            killed.kill()
            killed.wait()
            assert outcome(executor, work) == expected
            assert losses(messages) == [f"training process {killed.pid} was lost (SIGKILL)"]
            assert len(pids(executor)) == 2 and killed.pid not in pids(executor)

    def test_after_a_failed_round_the_next_one_succeeds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work = fragile_workload()
        monkeypatch.setenv("FRAGILE", "always")
        with running(work) as (executor, _):
            with pytest.raises(RunFailed):
                outcome(executor, work)
            monkeypatch.delenv("FRAGILE")
            for process in processes_of(executor):
                process.popen.kill()  # those that were started with the old environment
            assert outcome(executor, work) == expected_outcome(work)

    @pytest.mark.slow
    def test_processes_that_die_as_they_start_fail_the_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fedrounds.fl_components.executors.processes._MAIN", "raise SystemExit('no torch here')")
        work = workload()
        with running(work) as (executor, messages):
            pattern = r"3 training processes were lost before they were ready \(exit code 1: no torch here\)"
            with pytest.raises(RunFailed, match=pattern) as caught:
                outcome(executor, work)
            assert "execution.processes: 1" in str(caught.value.hint) and len(messages) == 2


@pytest.mark.ci
class TestEnd:
    def test_they_end_soon_after_the_process_that_started_them(self, tmp_path: Path) -> None:
        """Killed, while one of them is idle and others still start."""
        script = tmp_path / "starts.py"
        script.write_text(
            SCRIPT
            + "work = workload()\n"
            + "executor = started(work, 2)\n"
            + "outcome(executor, work)\n"
            + "late = started(work, 1)\n"
            + "late.transport.begin(None)\n"
            + "print(*pids(executor), *pids(late), flush=True)\n"
            + "time.sleep(600)\n"
        )
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            children = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(children) == 3
            parent.kill()
            died = time.monotonic()
        while any(is_running(pid) for pid in children):
            assert time.monotonic() - died < 2  # a promise (docs/durability.md), not a benchmark
            time.sleep(0.01)

    def test_one_that_trains_ends_too(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Killed while a process is in the middle of a shard: it does not wait for what it is doing."""
        script = tmp_path / "starts.py"
        script.write_text(
            SCRIPT
            + "work = fragile_workload()\n"
            + "executor = started(work, 2)\n"
            + "executor.transport.begin(None)\n"
            + "print(*pids(executor), flush=True)\n"
            + "outcome(executor, work)\n"
        )
        training = tmp_path / "training"
        monkeypatch.setenv("FRAGILE", f"pause:{training}")
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            children = [int(pid) for pid in parent.stdout.readline().split()]
            deadline = time.monotonic() + 60
            while not (training.exists() and training.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert int(training.read_text()) in children
            parent.kill()
            died = time.monotonic()
        while any(is_running(pid) for pid in children):
            assert time.monotonic() - died < 2
            time.sleep(0.01)
