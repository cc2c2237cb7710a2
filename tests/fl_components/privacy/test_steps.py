"""DP-SGD's batches, and that what is released of a step stands on sums that one example moves by at most C."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.privacy import ExampleLevel
from fedrounds.fl_components.privacy.clipping import squared_norms
from fedrounds.fl_components.privacy.noise import WholeNormals
from fedrounds.fl_components.privacy.steps import LARGEST, PIECE_ROWS, Mechanism, private_batches
from tests.support import cases


def rule(**changes: object) -> ExampleLevel:
    return ExampleLevel.model_validate({"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sampling_rate": 0.2, **changes})


class TestBatches:
    @given(
        num_examples=st.integers(1, 60),
        rate=st.floats(0.01, 1),
        most=st.none() | st.integers(1, 20),
        key=st.binary(min_size=32, max_size=32),
    )
    def test_rows_of_the_client_each_once(self, num_examples: int, rate: float, most: int | None, key: bytes) -> None:
        batches = private_batches(rule(sampling_rate=rate, max_batch_size=most), key, num_examples, 5)
        assert len(batches) == 5
        for rows in batches:
            assert (np.diff(rows) > 0).all() and all(0 <= row < num_examples for row in rows)
            assert len(rows) <= (most or num_examples)

    def test_each_row_by_a_coin_of_its_own(self) -> None:
        """Sizes are binomial; rows come independently of each other and of the step before."""
        taken = np.zeros((4000, 50))
        for step, rows in enumerate(private_batches(rule(), b"k" * 32, 50, len(taken))):
            taken[step, rows] = 1
        assert taken.mean() == pytest.approx(0.2, abs=0.005)
        assert taken.sum(1).var() == pytest.approx(50 * 0.2 * 0.8, rel=0.1)
        assert np.abs(np.corrcoef(taken.T) - np.eye(50)).max() < 0.09
        assert abs(np.corrcoef(taken[:-1].ravel(), taken[1:].ravel())[0, 1]) < 0.01

    def test_a_cut_batch_is_a_random_part(self) -> None:
        batches = private_batches(rule(sampling_rate=1, max_batch_size=3), b"k" * 32, 10, 3000)
        assert all(len(rows) == 3 for rows in batches)
        assert np.bincount(np.concatenate(batches)) / 3000 == pytest.approx(np.full(10, 0.3), abs=0.04)

    def test_a_rate_of_one_takes_all(self) -> None:
        assert [rows.tolist() for rows in private_batches(rule(sampling_rate=1), bytes(32), 3, 2)] == [[0, 1, 2]] * 2

    def test_another_key_draws_others(self) -> None:
        first, again, other = (private_batches(rule(), key * 32, 1000, 2) for key in (b"a", b"a", b"b"))
        assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
        assert not any(np.array_equal(*pair) for pair in zip(first, other, strict=True))


def sum_of(gradients_BD: Tensor, mechanism: Mechanism) -> Tensor:
    """Clipped and added up in float32 one after the other, as whole units in float64."""
    total = torch.zeros(gradients_BD.shape[1])
    for gradient, factor in zip(gradients_BD, mechanism.factors(squared_norms(gradients_BD)), strict=True):
        total += torch.where(factor > 0, gradient * factor, 0)
    return total.round().double()


class TestSensitivity:
    @settings(max_examples=cases(40), deadline=None)
    @given(
        num_parameters=st.sampled_from([1, 2, 700, 30_000]),
        noise=st.sampled_from([1e-3, 0.3, 1.0, 20.0]),
        norm=st.sampled_from([1e-3, 1.0, 37.5]),
        others=st.sampled_from([0, 1, PIECE_ROWS - 1]),
        spread=st.sampled_from([0.0, 1e-3, 1.0]),
        seed=st.integers(0, 1000),
    )
    def test_one_example_moves_a_sum_by_at_most_the_norm(
        self, num_parameters: int, noise: float, norm: float, others: int, spread: float, seed: int
    ) -> None:
        """All aligned, nearly, or not at all; all longer than the norm."""
        mechanism = Mechanism.of(rule(noise_multiplier=noise, max_grad_norm=norm), num_parameters)
        generator = torch.Generator().manual_seed(seed)
        common = torch.randn(num_parameters, generator=generator)
        own = torch.randn(others + 1, num_parameters, generator=generator)
        gradients_BD = (common + spread * own) * norm * 3
        moved = sum_of(gradients_BD, mechanism) - sum_of(gradients_BD[:-1], mechanism)
        assert float(moved.norm()) * mechanism.unit <= norm
        long = squared_norms(gradients_BD[-1:]) > norm**2
        assert not long or float(moved.norm()) * mechanism.unit >= 0.97 * norm  # and next to nothing is lost

    @pytest.mark.parametrize("num_parameters", [10, 199_210])
    def test_what_is_kept(self, num_parameters: int) -> None:
        mechanism = Mechanism.of(rule(), num_parameters)
        assert 0.999 < mechanism.kept < 1 and mechanism.unit == 2.0**-20

    def test_too_much_noise_for_so_many_parameters(self) -> None:
        with pytest.raises(ModelError, match="would take more than half of the clipping norm"):
            Mechanism.of(rule(noise_multiplier=1e4), 1_000_000)

    def test_factors(self) -> None:
        mechanism = Mechanism(4, kept=3.0, unit=0.5)
        norms = torch.tensor([0.0, 1.5, 3.0, 6.0, LARGEST, math.inf, math.nan], dtype=torch.float64)
        assert mechanism.factors(norms.square()).tolist() == [2, 2, 2, 1, 0, 0, 0]


class TestRelease:
    @pytest.mark.parametrize("sizes", [[7], [40_000, 3, 70_001, 1]])
    def test_units_plus_noise_times_alpha(self, sizes: list[int]) -> None:
        mechanism, key = Mechanism.of(rule(), sum(sizes)), b"k" * 32
        sums = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)) * 1e6
        noise = torch.cat([block.clone() for block in mechanism.noise(key).blocks(sum(sizes))])
        found = []
        for dtype in (torch.float32, torch.float64):
            parts = sums.round().to(dtype).clone() if dtype == torch.float64 else sums.clone()
            into = torch.ones(sum(sizes))
            mechanism.release(parts.split(sizes), mechanism.noise(key), into.split(sizes), 0.25)
            fresh = torch.full((sum(sizes),), math.nan)
            parts = sums.round().to(dtype)
            mechanism.release(parts.split(sizes), mechanism.noise(key), fresh.split(sizes), 0.25, fresh=True)
            found += [into - 1, fresh]
        expected = ((sums.round().double() + noise.double()) * 0.25).float()
        assert torch.equal(found[1], expected) and torch.equal(found[3], expected)
        torch.testing.assert_close(found[0], expected, rtol=0, atol=0.5)
        assert torch.equal(found[0], found[2])

    def test_the_stream_goes_on_from_step_to_step(self) -> None:
        mechanism = Mechanism.of(rule(), 5)
        noise = mechanism.noise(b"k" * 32)
        steps = [torch.empty(5), torch.empty(5)]
        for step in steps:
            mechanism.release([torch.zeros(5)], noise, [step], 1.0, fresh=True)
        assert not torch.equal(*steps)
        assert not torch.equal(
            steps[0], torch.cat(list(WholeNormals(b"k" * 32, 2.0**20).blocks(5)))
        )  # a key of its own


@pytest.mark.parametrize("key", [None, b""])
def test_without_a_key_there_is_no_noise_to_draw(key: bytes | None) -> None:
    with pytest.raises(ValueError, match="draws its noise from a key of its own"):
        Mechanism.of(rule(), 10).noise(key)
