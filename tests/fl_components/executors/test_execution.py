"""Waves and shards cover the cohort; a wave is whole shards and fits the memory given. Processes where they pay off."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedrounds.fl_components.errors import ConfigError, ModelError
from fedrounds.fl_components.executors import InProcessExecutor, LocalExecution
from fedrounds.fl_components.executors import execution as module
from fedrounds.fl_components.executors.execution import (
    COPIES_OF_AN_UPDATE,
    MAX_OF_SHARD,
    WORK_OF_SHARD,
    WORTH_PROCESSES,
    WORTH_SHARING,
    num_processors,
)
from fedrounds.fl_components.executors.scheduler import ScheduledExecutor
from fedrounds.fl_components.models import ModuleModel
from tests.fl_components.executors import contract
from tests.fl_components.executors.contract import expected_outcome, outcome, workload

sizes = st.integers(1, 40)


def rows(slices: tuple[slice, ...]) -> list[int]:
    return [row for piece in slices for row in range(piece.start, piece.stop)]


@given(
    cohort_size=st.integers(0, 500),
    num_parameters=st.integers(1, 10**6),
    memory_mb=st.integers(1, 50),
    shard_size=st.none() | sizes,
)
def test_waves(cohort_size: int, num_parameters: int, memory_mb: int, shard_size: int | None) -> None:
    execution = LocalExecution(memory_mb=memory_mb, shard_size=shard_size)
    shards = execution.shards([1e7] * cohort_size)
    waves = execution.waves(shards, num_parameters, additive=False)
    assert rows(waves) == list(range(cohort_size))
    assert all(wave.start < wave.stop for wave in waves) or (cohort_size == 0 and waves == (slice(0, 0),))
    assert {wave.start for wave in waves} <= {shard.start for shard in shards} | {0}
    for wave in waves:
        fits = (wave.stop - wave.start) * num_parameters * 4 * COPIES_OF_AN_UPDATE <= memory_mb * 1e6
        assert fits or wave in shards  # a shard is never cut
    assert execution.waves(shards, num_parameters, additive=True) == (slice(0, cohort_size),)


@given(cohort_size=st.integers(0, 500), shard_size=sizes)
def test_shards_of_a_size(cohort_size: int, shard_size: int) -> None:
    shards = LocalExecution(shard_size=shard_size).shards([1.0] * cohort_size)
    assert rows(shards) == list(range(cohort_size))
    assert all(shard.stop - shard.start == shard_size for shard in shards[:-1])


@given(work_N=st.lists(st.floats(0, 1e9), max_size=300))
def test_shards_by_default_have_about_as_much_to_do(work_N: list[float]) -> None:
    shards = LocalExecution().shards(work_N)
    assert rows(shards) == list(range(len(work_N)))
    assert all(0 < shard.stop - shard.start <= MAX_OF_SHARD for shard in shards)
    most, share = max(work_N, default=0), sum(work_N) / max(1, len(shards))
    if sum(work_N) > WORTH_SHARING and len(work_N) <= MAX_OF_SHARD:
        assert all(sum(work_N[shard]) <= WORK_OF_SHARD + most for shard in shards)
        assert all(sum(work_N[shard]) <= share + most or len(shards) % 2 for shard in shards)


@pytest.mark.parametrize(
    ("clients", "work", "sizes"),
    [
        (100, 60 * 199_210, [50, 50]),  # W1 of benchmarks/peers
        (20, 60 * 1_663_370, [5, 5, 5, 5]),  # W2
        (4, 200 * 28, [4]),  # four hospitals
        (1000, 60 * 650, [50] * 20),
    ],
)
def test_some_shards(clients: int, work: float, sizes: list[int]) -> None:
    assert [shard.stop - shard.start for shard in LocalExecution().shards([work] * clients)] == sizes


def test_more_memory_means_fewer_waves() -> None:
    def waves(memory_mb: int) -> int:
        execution = LocalExecution(memory_mb=memory_mb, shard_size=10)
        return len(execution.waves(execution.shards([1.0] * 1000), 100_000, additive=False))

    assert [waves(memory_mb) for memory_mb in (1, 100, 2020, 10_000)] == [100, 20, 1, 1]


@pytest.mark.parametrize("field", ["memory_mb", "shard_size", "processes"])
def test_what_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        LocalExecution.model_validate({field: 0})


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(ValidationError, match="device"):
        LocalExecution.model_validate({"device": device})


def test_a_gpu_that_is_not_there() -> None:
    LocalExecution().check()
    with pytest.raises(ConfigError, match=r"execution\.device is cuda:99 and torch finds \d+ such devices"):
        LocalExecution(device="cuda:99").check()


def test_one_process_for_a_gpu() -> None:
    assert LocalExecution(device="cuda:1").processes is None
    with pytest.raises(ValidationError, match=r"execution\.processes is 2 and execution\.device is cuda"):
        LocalExecution.model_validate({"device": "cuda", "processes": 2})


def test_processors_of_a_container(tmp_path: Path) -> None:
    machine = num_processors(tmp_path / "there is none")
    assert machine >= 1
    for text, processors in (("max 100000", machine), ("100000 100000\n", 1), ("30000 100000", 1), ("x", machine)):
        (tmp_path / "cpu.max").write_text(text)
        assert num_processors(tmp_path / "cpu.max") == processors
    (tmp_path / "cpu.max").write_text(f"{1000 * machine}00 100000")
    assert num_processors(tmp_path / "cpu.max") == machine


W1, HOSPITALS = [60 * 199_210.0] * 100, [200 * 28.0] * 4  # work of a round; W1 is two shards, the hospitals are one


class TestDefaultProcesses:
    @pytest.fixture(autouse=True)
    def _processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "num_processors", lambda: 4)

    @pytest.mark.parametrize(
        ("work_N", "rounds", "shard_size", "processes"),
        [
            (W1, WORTH_PROCESSES // 2, None, 1),
            (W1, WORTH_PROCESSES // 2 + 1, None, 2),  # no more than there are shards
            (W1, 1000, 10, 4),  # no more than there are processors
            (W1, WORTH_PROCESSES // 2, 10, 1),  # small shards are no more work
            (W1, 1000, 100, 1),  # one shard
            (HOSPITALS, 1000, None, 1),
            ([], 1000, None, 1),
        ],
    )
    def test_they_follow_from_the_work_that_is_left(
        self, work_N: list[float], rounds: int, shard_size: int | None, processes: int
    ) -> None:
        assert LocalExecution(shard_size=shard_size)._default_processes(work_N, rounds) == processes

    def test_a_short_run_has_none(self) -> None:
        before = set(psutil.Process().children())
        executor = LocalExecution().executor(workload(), print, W1, rounds=10)
        assert type(executor) is InProcessExecutor and set(psutil.Process().children()) == before

    def test_one_process_is_this_one(self) -> None:
        assert type(LocalExecution(processes=1).executor(workload(), print, W1, rounds=1000)) is InProcessExecutor

    @pytest.mark.ci
    def test_a_long_run_has_them(self) -> None:
        work = workload()
        with closing(LocalExecution().executor(work, print, W1, rounds=1000)) as executor:
            assert isinstance(executor, ScheduledExecutor) and len(executor.transport.workers) == 2
            assert outcome(executor, work) == expected_outcome(work)

    @pytest.mark.slow
    def test_where_they_cannot_start_training_continues_without(self) -> None:
        messages: list[str] = []
        work, before = workload(ModuleModel(path=f"{contract.__name__}:unsteady")), set(psutil.Process().children())
        with closing(LocalExecution().executor(work, messages.append, W1, rounds=1000)) as executor:
            assert type(executor) is InProcessExecutor and len(outcome(executor, work)) == 4
        assert set(psutil.Process().children()) == before
        assert messages[0].startswith("training continues in one process: the model's frozen parameters or buffers")

    @pytest.mark.ci
    def test_processes_that_were_asked_for_must_start(self) -> None:
        work = workload(ModuleModel(path=f"{contract.__name__}:unsteady"))
        with closing(LocalExecution(processes=2).executor(work, print)) as executor, pytest.raises(ModelError):
            outcome(executor, work)
