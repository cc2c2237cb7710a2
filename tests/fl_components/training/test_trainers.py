"""Whoever trains, in how many processes, and whatever dies on the way: the same bits come out, or the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedrounds.fl_components.admission import Admission, Clip, RoundAdmission
from fedrounds.fl_components.aggregation import Mean
from fedrounds.fl_components.errors import ModelError, RunFailed
from fedrounds.fl_components.models import Mlp, ModelRule, ModelSpec, ModuleModel, build_seeded
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.training import SGD, LocalExecution, Result, StreamingSum, Trainer, Workload
from fedrounds.fl_components.training import execution as executions
from fedrounds.fl_components.training.processes import MAX_ATTEMPTS, ProcessTrainer
from fedrounds.fl_components.training.trainer import OwnTrainer
from fedrounds.fl_components.values import SimulatedClient

RULE = SGD(learning_rate=0.1, batch_size=4, epochs=2, momentum=0.5)
SHARD_SIZE = 3


class Fragile(torch.nn.Sequential):
    """Its process is killed by what `FRAGILE` names: a file that it removes, so that it happens once, or "always"."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cause = os.environ.get("FRAGILE", "")
        # Always evaluated: vmap refuses this branch, so every process trains client by client, whatever FRAGILE is.
        if (x > 100).any():
            if cause == "always":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.path.exists(cause):
                os.remove(cause)
                os.kill(os.getpid(), signal.SIGKILL)
            if cause.startswith("pause:"):
                Path(cause.removeprefix("pause:")).write_text(str(os.getpid()))
                time.sleep(600)
            if cause == "raise":
                raise ValueError("no such ward")
        return super().forward(x)


def fragile() -> torch.nn.Module:
    return Fragile(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


def unsteady() -> torch.nn.Module:
    """Its frozen parameters are others in each process."""
    module = fragile()
    module[0].requires_grad_(False)
    with torch.no_grad():
        module[0].bias.fill_(os.getpid())
    return module


def workload(rule: ModelRule | None = None, *, how: str = "sum", num_clients: int = 10) -> Workload:
    rule = rule or Mlp(hidden=(5,))
    module = build_seeded(rule, (6,), (3,), seed=1)
    generator = np.random.default_rng(0)
    stops = np.cumsum(generator.integers(1, 20, num_clients))
    x = generator.standard_normal((stops[-1], 6)).astype(np.float32)
    starts = np.concatenate([[0], stops[:-1]])
    num_parameters = len(flatten(module))
    results: dict[str, Result] = {
        "sum": (np.float32, (num_parameters,)),
        "contributions": (np.float64, (num_parameters + 1,)),
        "each": (np.float32, (SHARD_SIZE, num_parameters)),
    }
    x[starts[4], 0] = 101.0
    return Workload(
        module=module,
        spec=ModelSpec.of(rule, (6,), (3,), 1, module),
        examples=SharedMemory.holding(
            {"x": x, "y": generator.integers(0, 3, len(x)), "starts": starts, "stops": stops}
        ),
        num_parameters=num_parameters,
        most_of_shard=SHARD_SIZE,
        result=results[how],
    )


def tasks_of(work: Workload) -> list[list[SimulatedClient]]:
    tasks = [
        SimulatedClient(f"c{row}", row, int(stop - start), seed=row)
        for row, (start, stop) in enumerate(zip(work.examples["starts"], work.examples["stops"], strict=True))
    ]
    return [tasks[start : start + SHARD_SIZE] for start in range(0, len(tasks), SHARD_SIZE)]


def summing_of(work: Workload) -> StreamingSum | None:
    dtype, shape = work.result
    if dtype is np.float64:
        return StreamingSum(Mean(weights="uniform"), RoundAdmission(Admission(), Clip(0.1)))
    return StreamingSum(Mean(), RoundAdmission(Admission())) if len(shape) == 1 else None


def outcome(trainer: Trainer, work: Workload, params_D: Any = None, rounds_left: int = 1) -> list[tuple[Any, bytes]]:
    """Each shard's report, and the bytes of its result."""
    params_D = flatten(work.module) if params_D is None else params_D
    return [
        (report, (result if result.ndim == 1 else result[: len(report.client_ids)]).tobytes())
        for report, result in trainer.train(RULE, params_D, tasks_of(work), summing_of(work), rounds_left)
    ]


def is_running(pid: int) -> bool:
    """Not only waiting for its new parent to take note of its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def processes(work: Workload, num_processes: int = 2) -> Iterator[tuple[ProcessTrainer, list[str]]]:
    said: list[str] = []
    trainer = ProcessTrainer(work, num_processes, said.append)
    try:
        yield trainer, said
    finally:
        pids = [process.popen.pid for process in trainer._processes]
        trainer.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("how", "counts"),
    [
        ("sum", [2]),
        pytest.param("contributions", [2], marks=pytest.mark.ci),
        pytest.param("each", [2], marks=pytest.mark.ci),
        pytest.param("sum", [1, 3, 5], marks=pytest.mark.slow),
    ],
)
def test_processes_change_no_bit(how: str, counts: list[int]) -> None:
    """Nor does it matter what was trained before, or that a round was given up."""
    work = workload(how=how)
    other_D = np.random.default_rng(5).standard_normal(work.num_parameters).astype(np.float32)
    own = OwnTrainer(work, print)
    expected, expected_later = outcome(own, work), outcome(own, work, other_D)
    assert expected != expected_later
    assert [report.client_ids for report, _ in expected] == [
        tuple(task.client_id for task in shard) for shard in tasks_of(work)
    ]
    for num_processes in counts:
        with processes(work, num_processes) as (trainer, said):
            assert outcome(trainer, work) == expected
            assert outcome(trainer, work, other_D) == expected_later
            given_up = trainer.train(RULE, other_D, tasks_of(work), summing_of(work), 1)
            next(given_up)
            given_up.close()
            assert all(process.job is None for process in trainer._processes)  # none writes into the next round
            assert outcome(trainer, work) == expected
            assert said == []
            assert trainer.peak_memory_bytes > own.peak_memory_bytes > 50e6


def deaths(said: list[str]) -> list[str]:
    """What was said, but for the way in which a model with code of its own trains."""
    return [each for each in said if not each.startswith("many clients at once: ")]


class TestDeath:
    def fragile(self) -> Workload:
        return workload(ModuleModel(path=f"{__name__}:fragile"))

    @pytest.mark.ci
    def test_a_killed_process_is_replaced_and_its_shard_trained_again(self, monkeypatch: Any, tmp_path: Any) -> None:
        work = self.fragile()
        expected = outcome(OwnTrainer(work, print), work)
        (tmp_path / "once").touch()
        monkeypatch.setenv("FRAGILE", str(tmp_path / "once"))
        with processes(work) as (trainer, said):
            assert outcome(trainer, work) == expected
            assert not (tmp_path / "once").exists()
            assert deaths(said) == [
                "a training process died (SIGKILL) and is replaced; its work is done again: clients c3, c4, c5"
            ]
            assert outcome(trainer, work) == expected

    @pytest.mark.slow
    def test_one_that_dies_while_it_is_idle_is_replaced(self) -> None:
        work = self.fragile()
        with processes(work) as (trainer, said):
            expected = outcome(trainer, work)
            killed = trainer._processes[0].popen
            killed.kill()
            killed.wait()
            assert outcome(trainer, work) == expected
            assert [each[: each.index(" and is replaced")] for each in deaths(said)] == [
                "a training process died (SIGKILL)"
            ]

    @pytest.mark.ci
    def test_a_shard_that_kills_every_process_ends_the_round(self, monkeypatch: Any) -> None:
        work = self.fragile()
        monkeypatch.setenv("FRAGILE", "always")
        with processes(work) as (trainer, said):
            with pytest.raises(
                RunFailed, match=r"3 training processes died \(SIGKILL\) of .*: clients c3, c4, c5"
            ) as caught:
                outcome(trainer, work)
            assert "execution.shard_size" in str(caught.value.hint)
            assert len(deaths(said)) == MAX_ATTEMPTS - 1
            monkeypatch.delenv("FRAGILE")
            for process in trainer._processes:
                process.popen.kill()  # those that were started with the old environment
            assert outcome(trainer, work) == outcome(OwnTrainer(work, print), work)  # another round goes well

    @pytest.mark.slow
    def test_an_error_of_the_model_names_its_clients(self, monkeypatch: Any) -> None:
        work = self.fragile()
        monkeypatch.setenv("FRAGILE", "raise")
        with processes(work) as (trainer, _):
            with pytest.raises(ModelError, match=r"while client.*c4.* trained .*: ValueError: no such ward") as caught:
                outcome(trainer, work)
            assert caught.value.hint == "correct the model, then resume the run"

    @pytest.mark.slow
    def test_a_model_that_is_another_in_each_process(self) -> None:
        work = workload(ModuleModel(path=f"{__name__}:unsteady"))
        with processes(work) as (trainer, _), pytest.raises(ModelError, match="are others in each process"):
            outcome(trainer, work)
        assert len(outcome(OwnTrainer(work, print), work)) == 4

    @pytest.mark.ci
    def test_they_end_soon_after_the_process_that_started_them(self, tmp_path: Any) -> None:
        """Killed, while one of them is idle and others still start."""
        script = tmp_path / "starts.py"
        script.write_text(
            "import sys, time\n"
            f"sys.path[:] = {sys.path!r}\n"
            f"from {__name__} import RULE, ProcessTrainer, outcome, workload\n"
            "work = workload()\n"
            "trainer = ProcessTrainer(work, 2, print)\n"
            "outcome(trainer, work)\n"
            "late = ProcessTrainer(work, 1, print)\n"
            "print(*(p.popen.pid for p in trainer._processes + late._processes), flush=True)\n"
            "time.sleep(600)\n"
        )
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 3
            parent.kill()
            died = time.monotonic()
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() - died < 2  # a promise (docs/durability.md), not a benchmark
            time.sleep(0.01)

    @pytest.mark.ci
    def test_one_that_trains_ends_too(self, monkeypatch: Any, tmp_path: Any) -> None:
        """Killed while a process is in the middle of a shard: it does not wait for what it is doing."""
        script = tmp_path / "starts.py"
        script.write_text(
            "import sys\n"
            f"sys.path[:] = {sys.path!r}\n"
            f"from {__name__} import ModuleModel, ProcessTrainer, outcome, workload\n"
            f"work = workload(ModuleModel(path='{__name__}:fragile'))\n"
            "trainer = ProcessTrainer(work, 2, print)\n"
            "print(*(p.popen.pid for p in trainer._processes), flush=True)\n"
            "outcome(trainer, work)\n"
        )
        training = tmp_path / "training"
        monkeypatch.setenv("FRAGILE", f"pause:{training}")
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            deadline = time.monotonic() + 60
            while not (training.exists() and training.read_text()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert int(training.read_text()) in pids
            parent.kill()
            died = time.monotonic()
        while any(is_running(pid) for pid in pids):
            assert time.monotonic() - died < 2
            time.sleep(0.01)


ROWS_ND = np.arange(20 * 53, dtype=np.float32).reshape(20, 53)


def halved(first: int, rows_ND: Any) -> tuple[int, float, int]:
    """Halves the rows. Says which they are, what they added up to, and who did it."""
    total = float(rows_ND.sum())
    rows_ND /= 2
    return first, total, os.getpid()


def counted(rows_ND: Any) -> int:
    """Writes ones, whatever is there."""
    rows_ND[:] = 1
    return len(rows_ND)


def halved_at_last(cause: str, first: int, rows_ND: Any) -> tuple[int, float, int]:
    """The first time in a process that dies when it has halved them."""
    found = halved(first, rows_ND)
    if first == 3 and os.path.exists(cause):
        os.remove(cause)
        os.kill(os.getpid(), signal.SIGKILL)
    return found


class TestSpread:
    def spread(self, trainer: Trainer, unit: int = 1, cause: str = "", **how: bool) -> tuple[list[Any], Any]:
        """What the pieces returned, and the rows afterwards."""
        rows_ND = ROWS_ND.copy()
        options = {"reads": True, "writes": True} | how
        work = partial(halved_at_last, cause)
        found = trainer.spread(lambda rows: partial(work, rows.start), rows_ND, unit, **options)
        return list(found), rows_ND

    @pytest.mark.ci
    def test_pieces_come_in_order_and_leave_what_they_wrote(self) -> None:
        work = workload(how="each")
        assert work.num_parameters == ROWS_ND.shape[1]
        with processes(work) as (trainer, said):
            outcome(trainer, work)
            for unit, size in ((1, 3), (2, 2), (3, 3)):  # a slot has three rows
                found, halves_ND = self.spread(trainer, unit)
                assert [first for first, _, _ in found] == list(range(0, 20, size))
                assert [total for _, total, _ in found] == [
                    ROWS_ND[row : row + size].sum() for row in range(0, 20, size)
                ]
                assert {pid for _, _, pid in found} <= {each.popen.pid for each in trainer._processes}
                assert np.array_equal(halves_ND, ROWS_ND / 2)
            _, left_ND = self.spread(trainer, writes=False)
            assert np.array_equal(left_ND, ROWS_ND)
            ones_ND = np.zeros_like(ROWS_ND)
            assert sum(trainer.spread(lambda rows: counted, ones_ND, 1, reads=False, writes=True)) == 20
            assert (ones_ND == 1).all()
            assert outcome(trainer, work) == outcome(OwnTrainer(work, print), work)
            assert said == []

    @pytest.mark.parametrize(("how", "unit"), [("each", 4), ("each", 20), ("sum", 1)])
    def test_what_has_no_room_elsewhere_is_done_here(self, how: str, unit: int) -> None:
        work = workload(how=how)
        with processes(work) as (trainer, _):
            found, halves_ND = self.spread(trainer, unit)
        assert found == [(0, ROWS_ND.sum(), os.getpid())] and np.array_equal(halves_ND, ROWS_ND / 2)

    def test_so_is_all_of_it_without_processes(self) -> None:
        found, halves_ND = self.spread(OwnTrainer(workload(how="each"), print))
        assert found == [(0, ROWS_ND.sum(), os.getpid())] and np.array_equal(halves_ND, ROWS_ND / 2)

    def test_nothing(self) -> None:
        with processes(workload(how="each")) as (trainer, _):
            assert list(trainer.spread(lambda rows: len, ROWS_ND[:0], 1, reads=True, writes=True)) == [0]

    @pytest.mark.ci
    def test_a_killed_process_is_replaced_and_its_piece_worked_on_from_the_start(self, tmp_path: Any) -> None:
        """What it wrote before it died does not stay."""
        (tmp_path / "once").touch()
        with processes(workload(how="each")) as (trainer, said):
            found, halves_ND = self.spread(trainer, cause=str(tmp_path / "once"))
        assert not (tmp_path / "once").exists() and np.array_equal(halves_ND, ROWS_ND / 2)
        assert [total for _, total, _ in found] == [ROWS_ND[row : row + 3].sum() for row in range(0, 20, 3)]
        assert said == ["a training process died (SIGKILL) and is replaced; its work is done again: updates 4 to 6"]


class TestGrowing:
    def trainer(
        self, monkeypatch: Any, worth_s: float, rule: ModelRule | None = None, say: Any = print
    ) -> tuple[Any, Workload]:
        monkeypatch.setattr(executions, "WORTH_PROCESSES_S", worth_s)
        monkeypatch.setattr(executions, "num_processors", lambda: 2)
        work = workload(rule)
        return LocalExecution().trainer(work, say), work

    def test_short_work_starts_nothing(self, monkeypatch: Any) -> None:
        trainer, work = self.trainer(monkeypatch, worth_s=1e9)
        before = set(psutil.Process().children())
        for _ in range(3):
            outcome(trainer, work, rounds_left=100)
        assert set(psutil.Process().children()) == before
        trainer.close()

    @pytest.mark.ci
    def test_long_work_goes_on_in_processes_with_the_same_bits(self, monkeypatch: Any) -> None:
        trainer, work = self.trainer(monkeypatch, worth_s=0.0)
        expected = outcome(OwnTrainer(work, print), work)
        try:
            deadline = time.monotonic() + 60
            while trainer._processes is None or not trainer._processes.is_ready():
                assert outcome(trainer, work) == expected
                assert time.monotonic() < deadline
            assert outcome(trainer, work) == expected
            assert trainer._own.is_new is False
        finally:
            trainer.close()

    @pytest.mark.ci
    def test_they_take_over_in_the_middle_of_a_round(self, monkeypatch: Any) -> None:
        trainer, work = self.trainer(monkeypatch, worth_s=1e9)
        expected = outcome(trainer, work)
        monkeypatch.setattr(executions, "WORTH_PROCESSES_S", 0.0)
        trained_by: list[int] = []
        trainer.on_shard = lambda name, began, ended, process: trained_by.append(process)
        found = []
        try:
            for report, result in trainer.train(RULE, flatten(work.module), tasks_of(work), summing_of(work), 1):
                found.append((report, result.tobytes()))
                deadline = time.monotonic() + 60
                while trainer._processes is not None and not trainer._processes.is_ready():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert found == expected
            assert [process == os.getpid() for process in trained_by] == [True, False, False, False]
        finally:
            trainer.close()

    @pytest.mark.slow
    def test_where_processes_cannot_start_it_goes_on_without(self, monkeypatch: Any) -> None:
        said: list[str] = []
        unsteady_model = ModuleModel(path=f"{__name__}:unsteady")
        trainer, work = self.trainer(monkeypatch, 0.0, unsteady_model, said.append)
        why = "training goes on in one process: the model's frozen parameters or buffers are others"
        deadline = time.monotonic() + 60
        while not any(line.startswith(why) for line in said):
            assert len(outcome(trainer, work)) == 4
            assert time.monotonic() < deadline
        known = list(said)
        outcome(trainer, work)
        outcome(trainer, work)
        assert said == known and trainer._processes is None
        trainer.close()

    @pytest.mark.parametrize(
        ("fields", "kind"),
        [({"processes": 1}, OwnTrainer), ({}, executions.GrowingTrainer)],
    )
    def test_what_is_asked_for(self, monkeypatch: Any, fields: dict[str, int], kind: type) -> None:
        monkeypatch.setattr(executions, "num_processors", lambda: 4)
        assert type(LocalExecution.model_validate(fields).trainer(workload(), print)) is kind
        monkeypatch.setattr(executions, "num_processors", lambda: 1)
        assert type(LocalExecution().trainer(workload(), print)) is OwnTrainer


@pytest.mark.slow
def test_a_note_is_said_once() -> None:
    said: list[str] = []
    work = workload(ModuleModel(path=f"{__name__}:Scaled"))
    own = OwnTrainer(work, said.append)
    outcome(own, work)
    outcome(own, work)
    with processes(work) as (trainer, heard):
        outcome(trainer, work)
        assert heard == said
    assert len(said) == 1 and "Scaled" in said[0]


class Scaled(torch.nn.Linear):
    """Of a type that no layer's form is known for."""

    def __init__(self) -> None:
        super().__init__(6, 3)
