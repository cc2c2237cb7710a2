"""The contract of every executor: the bits of plain training on one thread in order, or an error that says why.

A test module subclasses `ExecutorContract`, or `WorkerContract` where workers can die, and provides `executor`.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedrounds.fl_components.admission import Admission, Clip, RoundAdmission
from fedrounds.fl_components.aggregation import Mean
from fedrounds.fl_components.errors import ModelError, RunFailed
from fedrounds.fl_components.executors import ArrayType, Executor, InProcessExecutor, Workload
from fedrounds.fl_components.executors.scheduler import MAX_ATTEMPTS
from fedrounds.fl_components.models import Mlp, ModelRule, ModelSpec, ModuleModel, build_seeded
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.task import Classification
from fedrounds.fl_components.training import SGD, StreamingSum
from fedrounds.fl_components.values import SimulatedClient

RULE = SGD(learning_rate=0.1, batch_size=4, epochs=2, momentum=0.5)
SHARD_SIZE = 3
NUM_ROWS, NUM_PARAMETERS = 20, 53
ROWS_ND = np.arange(NUM_ROWS * NUM_PARAMETERS, dtype=np.float32).reshape(NUM_ROWS, NUM_PARAMETERS)
FRAGILE = f"{__name__}:fragile"


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
    """Its frozen parameters differ between processes."""
    module = fragile()
    module[0].requires_grad_(False)
    with torch.no_grad():
        module[0].bias.fill_(os.getpid())
    return module


class Scaled(torch.nn.Linear):
    """A layer of a type that the engine has no batched form of."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


def workload(rule: ModelRule | None = None, *, how: str = "sum", num_clients: int = 10) -> Workload:
    """Ten clients with a few rows each, of which client c4 has one that `Fragile` dies of."""
    rule = rule or Mlp(hidden=(5,))
    module = build_seeded(rule, (6,), (3,), seed=1)
    generator = np.random.default_rng(0)
    stops = np.cumsum(generator.integers(1, 20, num_clients))
    x = generator.standard_normal((stops[-1], 6)).astype(np.float32)
    starts = np.concatenate([[0], stops[:-1]])
    num_parameters = len(flatten(module))
    results: dict[str, ArrayType] = {
        "sum": (np.float32, (num_parameters,)),
        "contributions": (np.float64, (num_parameters + 1,)),
        "each": (np.float32, (SHARD_SIZE, num_parameters)),
    }
    x[starts[4], 0] = 101.0
    return Workload(
        module=module,
        spec=ModelSpec.of(rule, (6,), (3,), 1, module),
        task=Classification(),
        examples=SharedMemory.from_arrays(
            {"x": x, "y": generator.integers(0, 3, len(x)), "starts": starts, "stops": stops}
        ),
        num_parameters=num_parameters,
        result=results[how],
    )


def fragile_workload() -> Workload:
    return workload(ModuleModel(path=FRAGILE))


def shards_of(work: Workload) -> list[list[SimulatedClient]]:
    tasks = [
        SimulatedClient(f"c{row}", row, int(stop - start), seed=row)
        for row, (start, stop) in enumerate(zip(work.examples["starts"], work.examples["stops"], strict=True))
    ]
    return [tasks[start : start + SHARD_SIZE] for start in range(0, len(tasks), SHARD_SIZE)]


def streaming_of(work: Workload) -> StreamingSum | None:
    dtype, shape = work.result
    if dtype is np.float64:
        return StreamingSum(Mean(weights="uniform"), RoundAdmission(Admission(), Clip(0.1)))
    return StreamingSum(Mean(), RoundAdmission(Admission())) if len(shape) == 1 else None


def outcome(executor: Executor, work: Workload, params_D: Any = None) -> list[tuple[Any, bytes]]:
    """Each shard's report, and the bytes of its result."""
    params_D = flatten(work.module) if params_D is None else params_D
    return [
        (report, result.tobytes())
        for report, result in executor.train(RULE, params_D, shards_of(work), streaming_of(work))
    ]


def expected_outcome(work: Workload, params_D: Any = None) -> list[tuple[Any, bytes]]:
    """The outcome of plain training in this process."""
    return outcome(InProcessExecutor(work, print), work, params_D)


def losses(messages: list[str]) -> list[str]:
    """The messages, except the one about how a model with code of its own trains."""
    return [message for message in messages if not message.startswith("many clients at once: ")]


def halve(rows_BD: Any, numbers: list[int], cause: str = "") -> tuple[list[int], float, int]:
    """Halve the rows. Return their numbers, their sum before, and the process that halved them.

    If the file `cause` exists, the process that has halved row 3 removes it and is killed.
    """
    total = float(rows_BD.sum())
    rows_BD /= 2
    if 3 in numbers and os.path.exists(cause):
        os.remove(cause)
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers, total, os.getpid()


def total(rows_BD: Any, numbers: list[int]) -> tuple[list[int], float]:
    return numbers, float(rows_BD.sum())


def fill(rows_BD: Any, numbers: list[int]) -> int:
    """Write each row's number, whatever is there."""
    rows_BD[:] = np.array(numbers, np.float32)[:, None]
    return len(rows_BD)


class ExecutorContract:
    """Tests that hold for every executor. Each call of `executor` starts a new one."""

    blocks = True
    """Whether the executor has workers, to which blocks of rows can be sent."""

    def executor(self, work: Workload, **options: Any) -> AbstractContextManager[tuple[Executor, list[str]]]:
        """Return an executor and the list of its messages."""
        raise NotImplementedError

    @pytest.mark.parametrize("how", ["sum", "contributions", "each"])
    def test_results_come_in_order_and_no_bit_depends_on_the_executor(self, how: str) -> None:
        """Nor on what was trained before, nor on a round that was given up."""
        work = workload(how=how)
        other_D = np.random.default_rng(5).standard_normal(work.num_parameters).astype(np.float32)
        expected, expected_other = expected_outcome(work), expected_outcome(work, other_D)
        assert expected != expected_other
        with self.executor(work) as (executor, messages):
            trained: list[str] = []
            executor.on_shard = lambda name, began, ended, process: trained.append(name)
            assert outcome(executor, work) == expected
            assert trained == [f"{len(shard)} clients from {shard[0].client_id}" for shard in shards_of(work)]
            assert outcome(executor, work, other_D) == expected_other
            given_up = executor.train(RULE, other_D, shards_of(work), streaming_of(work))
            next(given_up)
            given_up.close()  # type: ignore[attr-defined]
            assert outcome(executor, work) == expected
            assert list(executor.train(RULE, other_D, [], streaming_of(work))) == []
            assert messages == []
            assert executor.peak_memory_bytes > 50e6
        names = [tuple(task.client_id for task in shard) for shard in shards_of(work)]
        assert [report.client_ids for report, _ in expected] == names

    def test_mapped_rows_are_those_of_a_call_in_this_process(self) -> None:
        """In the order of the rows, bit for bit, whatever the function may do with them."""
        work = workload(how="each")
        assert work.num_parameters == NUM_PARAMETERS
        numbers = list(range(NUM_ROWS))
        with self.executor(work) as (executor, messages):
            outcome(executor, work)
            for block_rows in (1, 2, 3):
                rows_ND = ROWS_ND.copy()
                halved = list(executor.map_rows(halve, rows_ND, numbers, block_rows=block_rows, access="r+"))
                assert [number for block, _, _ in halved for number in block] == numbers
                assert [size % block_rows for size in (len(block) for block, _, _ in halved[:-1])] == [0] * (
                    len(halved) - 1
                )
                assert all(sum_ == ROWS_ND[block].sum() for block, sum_, _ in halved)
                assert (len(halved) > 1) == self.blocks
                assert np.array_equal(rows_ND, ROWS_ND / 2)
            totals = list(executor.map_rows(total, rows_ND, numbers))
            assert all(sum_ == rows_ND[block].sum() for block, sum_ in totals)
            assert np.array_equal(rows_ND, ROWS_ND / 2)
            assert sum(executor.map_rows(fill, rows_ND, numbers, access="w")) == NUM_ROWS
            assert np.array_equal(rows_ND, np.broadcast_to(np.arange(NUM_ROWS)[:, None], rows_ND.shape))
            assert outcome(executor, work) == expected_outcome(work)
            assert messages == []

    @pytest.mark.parametrize(("how", "block_rows"), [("each", NUM_ROWS), ("sum", 1)])
    def test_rows_that_no_job_has_room_for_are_mapped_in_this_process(self, how: str, block_rows: int) -> None:
        with self.executor(workload(how=how)) as (executor, _):
            rows_ND, numbers = ROWS_ND.copy(), list(range(NUM_ROWS))
            halved = list(executor.map_rows(halve, rows_ND, numbers, block_rows=block_rows, access="r+"))
            assert halved == [(numbers, ROWS_ND.sum(), os.getpid())] and np.array_equal(rows_ND, ROWS_ND / 2)
            assert list(executor.map_rows(fill, ROWS_ND[:0], [])) == [0]

    def test_a_note_about_the_model_is_said_once(self) -> None:
        work = workload(ModuleModel(path=f"{__name__}:Scaled"))
        with self.executor(work) as (executor, messages):
            outcome(executor, work)
            outcome(executor, work)
            assert len(messages) == 1 and "Scaled" in messages[0]

    def test_an_error_of_the_model_names_its_clients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work = fragile_workload()
        monkeypatch.setenv("FRAGILE", "raise")
        with self.executor(work, FRAGILE="raise") as (executor, _):
            with pytest.raises(ModelError, match=r"while client.*c4.* trained .*: ValueError: no such ward") as caught:
                outcome(executor, work)
            assert caught.value.hint == "correct the model, then resume the run"


class WorkerContract(ExecutorContract):
    """Tests of executors with workers, which can be killed. `executor` sets the workers' environment variables."""

    noun: str
    has_one_job = True
    """Whether a worker has one job at a time. Otherwise a first loss may be blamed on the job before: its result may
    still be on its way."""

    def test_the_shard_of_a_killed_worker_is_trained_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        work = fragile_workload()
        expected, once = expected_outcome(work), tmp_path / "once"
        once.touch()
        monkeypatch.setenv("FRAGILE", str(once))
        with self.executor(work, FRAGILE=str(once)) as (executor, messages):
            assert outcome(executor, work) == expected
            assert not once.exists()
            (message,) = losses(messages)
            assert " was lost (" in message and "; its work is repeated: clients " in message
            assert message.endswith(": clients c3, c4, c5") or not self.has_one_job
            assert outcome(executor, work) == expected

    def test_the_block_of_a_killed_worker_is_mapped_from_its_first_state(self, tmp_path: Path) -> None:
        """What the worker wrote before its end does not stay."""
        once = tmp_path / "once"
        once.touch()
        rows_ND, numbers = ROWS_ND.copy(), list(range(NUM_ROWS))
        work = workload(how="each")
        with self.executor(work) as (executor, messages):
            outcome(executor, work)
            halved = list(executor.map_rows(partial(halve, cause=str(once)), rows_ND, numbers, access="r+"))
            (message,) = messages
        assert not once.exists() and np.array_equal(rows_ND, ROWS_ND / 2)
        assert all(sum_ == ROWS_ND[block].sum() for block, sum_, _ in halved)
        first, last = next((block[0], block[-1]) for block, _, _ in halved if 3 in block)
        assert "; its work is repeated: updates " in message
        assert message.endswith(f": updates {first + 1} to {last + 1}") or not self.has_one_job

    def test_a_shard_that_kills_every_worker_fails_the_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        work = fragile_workload()
        monkeypatch.setenv("FRAGILE", "always")
        with self.executor(work, FRAGILE="always") as (executor, messages):
            pattern = rf"^3 {self.noun} were lost \(.*\) while they ran the same job: clients c3, c4, c5$"
            with pytest.raises(RunFailed, match=pattern) as caught:
                outcome(executor, work)
            assert "execution.shard_size" in str(caught.value.hint)
            assert len(losses(messages)) >= MAX_ATTEMPTS - 1

    def test_a_model_that_differs_in_each_process(self) -> None:
        work = workload(ModuleModel(path=f"{__name__}:unsteady"))
        with self.executor(work) as (executor, _), pytest.raises(ModelError, match="differ between the processes"):
            outcome(executor, work)
        assert len(expected_outcome(work)) == 4
