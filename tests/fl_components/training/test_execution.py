"""Waves and shards cover the cohort; a wave is whole shards and fits the memory given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fl_components.training import LocalExecution
from fl_components.training.execution import COPIES_OF_AN_UPDATE

sizes = st.integers(1, 40)


def rows(slices: tuple[slice, ...]) -> list[int]:
    return [row for piece in slices for row in range(piece.start, piece.stop)]


@given(
    cohort_size=st.integers(0, 500),
    num_parameters=st.integers(1, 10**6),
    memory_mb=st.integers(1, 50),
    shard_size=sizes,
)
def test_waves(cohort_size: int, num_parameters: int, memory_mb: int, shard_size: int) -> None:
    execution = LocalExecution(memory_mb=memory_mb, shard_size=shard_size)
    waves = execution.waves(cohort_size, num_parameters, additive=False)
    assert rows(waves) == list(range(cohort_size))
    assert all(wave.start < wave.stop for wave in waves) or (cohort_size == 0 and waves == (slice(0, 0),))
    assert all((wave.stop - wave.start) % shard_size == 0 for wave in waves[:-1])
    for wave in waves:
        clients = wave.stop - wave.start
        fits = clients * num_parameters * 4 * COPIES_OF_AN_UPDATE <= memory_mb * 1e6
        assert fits or clients <= shard_size  # a shard is never cut


@given(cohort_size=st.integers(0, 500), shard_size=sizes, wave_shards=st.integers(1, 5))
def test_shards_are_the_same_whatever_the_waves(cohort_size: int, shard_size: int, wave_shards: int) -> None:
    execution = LocalExecution(shard_size=shard_size)
    whole = execution.shards(cohort_size, 10)
    assert rows(whole) == list(range(cohort_size))
    assert all(shard.stop - shard.start == shard_size for shard in whole[:-1])
    in_waves = [
        (start + shard.start, start + shard.stop)
        for start in range(0, cohort_size, wave_shards * shard_size)
        for shard in execution.shards(min(wave_shards * shard_size, cohort_size - start), 10)
    ]
    assert in_waves == [(shard.start, shard.stop) for shard in whole]


def test_more_memory_means_fewer_waves() -> None:
    counts = [len(LocalExecution(memory_mb=mb).waves(1000, 100_000, additive=False)) for mb in (1, 100, 2020, 10_000)]
    assert counts == [40, 20, 1, 1]


@given(cohort_size=st.integers(0, 500), num_parameters=st.integers(1, 10**6))
def test_updates_that_are_added_up_are_one_wave(cohort_size: int, num_parameters: int) -> None:
    execution = LocalExecution(memory_mb=1)
    assert execution.waves(cohort_size, num_parameters, additive=True) == (slice(0, cohort_size),)


@pytest.mark.parametrize("field", ["memory_mb", "shard_size", "processes"])
def test_what_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        LocalExecution.model_validate({field: 0})


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(ValidationError, match="device"):
        LocalExecution.model_validate({"device": device})


def test_one_process_for_a_gpu() -> None:
    assert LocalExecution(device="cuda:1").processes is None
    with pytest.raises(ValidationError, match=r"execution\.processes is 2 and execution\.device is cuda"):
        LocalExecution.model_validate({"device": "cuda", "processes": 2})
