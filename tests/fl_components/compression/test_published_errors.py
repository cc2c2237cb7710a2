"""What the papers promise of each rule's error, by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrounds.fl_components.arrays import Payload, Symbols
from fedrounds.fl_components.compression import (
    ByteBudget,
    DeadZone,
    Dithered,
    Eden,
    LowRank,
    Qsgd,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    UniformQuantiser,
)
from fedrounds.fl_components.errors import UpdateRejected
from tests.fl_components.compression.samples import (
    SIZE,
    Vector,
    context,
    layers,
    mean_error,
    normal,
    sparse,
    squares,
    there_and_back,
    through_frames,
    update,
    vectors,
)


class TestPublishedErrors:
    """What the papers promise; for rules that draw, with four standard errors' room."""

    @given(delta_D=vectors, fraction=st.floats(0.01, 1.0))
    def test_top_k(self, delta_D: Any, fraction: float) -> None:
        """Stich et al. 2018, lemma A.1: (1 - k / d) |x|^2."""
        rule, what = TopK(fraction=fraction), context(shapes=((len(delta_D),),))
        kept = max(1, round(fraction * len(delta_D)))
        error = squares(there_and_back(rule, delta_D[None], what)[0] - delta_D)
        assert error <= (1 - kept / len(delta_D)) * squares(delta_D) * (1 + 1e-6)

    @pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1])
    @pytest.mark.parametrize(
        "kind", ["normal", "ascending", "large where the sample looks", "and elsewhere", "mostly zeros", "NaN"]
    )
    def test_top_k_of_many(self, kind: str, fraction: float) -> None:
        """The largest, also where the sample that spares ordering all of them misleads."""
        delta_D = update(size=20_000)
        if kind == "ascending":
            delta_D.sort()
        elif kind == "large where the sample looks":
            delta_D[::64] *= 100
        elif kind == "and elsewhere":
            delta_D[::64] = delta_D[1:1201] = 100  # three quarters of a tenth
        elif kind == "mostly zeros":
            delta_D[np.arange(20_000) % 50 > 0] = 0
        elif kind == "NaN":
            delta_D[[3, 70, 19_999]] = np.nan
        found_D = there_and_back(TopK(fraction=fraction), delta_D[None], context(shapes=((20_000,),)))[0]
        assert np.array_equal(np.isnan(found_D), np.isnan(delta_D))  # what is not a number must be seen
        sizes = [np.sort(np.nan_to_num(np.abs(each_D), nan=np.inf)) for each_D in (found_D, delta_D)]
        kept = round(fraction * 20_000)
        assert np.array_equal(sizes[0][-kept:], sizes[1][-kept:]) and not sizes[0][:-kept].any()

    @given(delta_D=vectors, threshold=st.floats(0.01, 100))
    def test_threshold(self, delta_D: Any, threshold: float) -> None:
        """Sahu et al. 2021: each that is left out is below the threshold."""
        found_D = there_and_back(Threshold(threshold=threshold), delta_D[None], context(shapes=((len(delta_D),),)))[0]
        left_out = found_D != delta_D
        assert (np.abs(delta_D[left_out]) < threshold).all() and (found_D[left_out] == 0).all()
        assert squares(found_D - delta_D) <= len(delta_D) * threshold**2

    @pytest.mark.parametrize("vector", [normal, layers, sparse(3)])
    @pytest.mark.parametrize("fraction", [0.05, pytest.param(0.5, marks=pytest.mark.ci)])
    def test_random_k(self, vector: Vector, fraction: float) -> None:
        """Stich et al. 2018, (1 - k/d) |x|^2 as they are; times d/k, (d/k - 1) |x|^2."""
        delta_D, exact = update(vector), round(fraction * SIZE) / SIZE
        assert mean_error(RandomK(fraction=fraction, error_feedback=True), delta_D, 4000) == pytest.approx(
            1 - exact, rel=0.05
        )
        assert mean_error(RandomK(fraction=fraction), delta_D, 4000) == pytest.approx(1 / exact - 1, rel=0.15)

    @pytest.mark.parametrize("vector", [normal, layers, sparse(1), sparse(10)])
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("bucket", [16, 512])
    def test_qsgd(self, vector: Vector, bits: int, bucket: int) -> None:
        """Alistarh et al. 2017, lemma 3.1: min(d / s^2, sqrt(d) / s) |x|^2."""
        dim, levels = min(bucket, SIZE), 2 ** (bits - 1) - 1
        assert mean_error(Qsgd(bits=bits, bucket=bucket), update(vector)) <= 1.1 * min(
            dim / levels**2, dim**0.5 / levels
        )

    @pytest.mark.parametrize("vector", [normal, layers, sparse(10)])
    def test_ternary(self, vector: Vector) -> None:
        """The variance of a coin for each number: max|x| |x|_1 - |x|_2^2."""
        delta_D = update(vector).astype(np.float64)
        exact = np.abs(delta_D).max() * np.abs(delta_D).sum() / squares(delta_D) - 1
        assert mean_error(Ternary(bucket=SIZE), update(vector), 4000) == pytest.approx(exact, rel=0.1)

    @pytest.mark.parametrize("vector", [normal, layers, sparse(10)])
    @pytest.mark.parametrize("bits", [1, 2, 8])
    def test_uniform(self, vector: Vector, bits: int) -> None:
        """Suresh et al. 2017, theorem 2: d (max - min)^2 / (4 (k - 1)^2), here for one bucket."""
        delta_D = update(vector)
        bound = SIZE * float(np.ptp(delta_D)) ** 2 / (4 * (2**bits - 1) ** 2) / squares(delta_D)
        assert mean_error(UniformQuantiser(bits=bits, bucket=SIZE), delta_D) <= 1.05 * bound

    @given(delta_D=vectors)
    def test_sign(self, delta_D: Any) -> None:
        """Karimireddy et al. 2019, assumption A: |x|_2^2 - |x|_1^2 / d, exactly."""
        found_D = there_and_back(Sign(bucket=64), delta_D[None], context(shapes=((len(delta_D),),)))[0]
        exact = squares(delta_D) - np.abs(delta_D.astype(np.float64)).sum() ** 2 / len(delta_D)
        assert squares(found_D - delta_D) == pytest.approx(exact, abs=1e-5 * squares(delta_D))

    @pytest.mark.parametrize("vector", [normal, layers, sparse(1), sparse(10)])
    @pytest.mark.parametrize(("bits", "published"), [(1, 0.5708), (2, 0.1331), (3, 0.0358), (4, 0.0096)])
    def test_eden(self, vector: Vector, bits: int, published: float) -> None:
        """Vargaftik et al. 2022, table 1, where nothing is filled up."""
        assert mean_error(Eden(bits=bits), update(vector, 4096), 100) == pytest.approx(published, rel=0.02)

    @pytest.mark.parametrize(("bits", "published"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
    def test_eden_with_the_least_error(self, bits: int, published: float) -> None:
        """Max 1960, table I: the distortion of the best quantiser of a normal variable."""
        rule = Eden(bits=bits, scale="least_error")
        assert mean_error(rule, update(size=4096), 100) == pytest.approx(published, rel=0.02)

    @pytest.mark.parametrize("vector", [normal, sparse(1), sparse(10)])
    @pytest.mark.parametrize("step", [0.05, 1.0, 4.0])
    def test_dithered(self, vector: Vector, step: float) -> None:
        """Schuchman 1964: uniform over a step, whatever went in: step^2 / 12 of the mean square."""
        assert mean_error(Dithered(step=step), update(vector), 1000) == pytest.approx(step**2 / 12, rel=0.03)

    @given(delta_D=vectors, step=st.floats(0.01, 8))
    def test_dead_zone(self, delta_D: Any, step: float) -> None:
        """Sullivan 1996, with an offset of 1/3: towards zero where two thirds of a step or less are over, else away."""
        rule, what = DeadZone(step=step), context(shapes=((len(delta_D),),))
        found_D = there_and_back(rule, delta_D[None], what)[0].astype(np.float64)
        step_itself = step * np.sqrt(squares(delta_D) / len(delta_D))
        if np.abs(delta_D).max() < step_itself * 2 / 3:
            step_itself = np.abs(delta_D).max()  # something always travels
        levels_D = found_D / step_itself
        assert np.allclose(levels_D, levels_D.round(), atol=1e-3)
        sizes_D = np.abs(delta_D.astype(np.float64))
        room = 1e-5 * (sizes_D + step_itself)
        assert (found_D * delta_D >= 0).all()
        assert (np.abs(found_D) <= 1.5 * sizes_D + room).all()
        assert (found_D[sizes_D < 0.66 * step_itself] == 0).all()
        assert (np.abs(found_D) <= sizes_D + step_itself / 3 + room).all()
        assert (np.abs(found_D) >= sizes_D - 2 * step_itself / 3 - room).all()
        assert squares(found_D - delta_D) <= squares(delta_D) * (1 + 1e-5)

    @pytest.mark.parametrize(("step", "room"), [(0.5, 0.05), (1.0, 0.05), (2.0, 0.06), (4.0, 0.13)])
    def test_dead_zone_of_laplacian_numbers(self, step: float, room: float) -> None:
        """What the density says of the squared error, by quadrature, and of the entropy: a frame takes few bits more,
        though a quarter of a bit at the least, where numbers have no pattern."""
        x = np.linspace(0, 40, 4_000_001)  # in root mean squares
        mass = np.sqrt(2) * np.exp(-np.sqrt(2) * x) * (x[1] - x[0])  # of both signs
        levels = np.floor(x / step + 1 / 3)
        expected = float((mass * np.square(x - step * levels)).sum())
        shares = np.bincount(levels.astype(int), mass)
        some = shares[shares > 0]
        entropy = -float((some * np.log2(some)).sum()) + float(some[1:].sum())  # and a bit for each sign
        delta_D = np.random.default_rng(0).laplace(size=500_000).astype(np.float32)
        found_ND, (frame,) = through_frames(DeadZone(step=step), delta_D[None], context(shapes=((500_000,),)))
        assert squares(found_ND[0] - delta_D) / squares(delta_D) == pytest.approx(expected, rel=0.03)
        assert entropy - 0.01 <= 8 * len(frame) / 500_000 <= entropy + room

    def test_a_dead_zone_whose_symbols_are_too_wide(self) -> None:
        (good,) = DeadZone().compress(update()[None], context())
        wide = Symbols(np.full(SIZE, 5, np.uint8), 3)
        with pytest.raises(UpdateRejected, match="wrong_shape: expected symbols: symbols of 2"):
            DeadZone().check({**good, "symbols": wide, "larger": Symbols(np.zeros(0, np.uint8), 1)}, context())

    def test_dead_zone_cuts_what_is_beyond_its_steps(self) -> None:
        size = 200_000
        delta_D = np.zeros(size, np.float32)
        delta_D[[3, 5]] = 1, -1  # 316 root mean squares
        found_D = there_and_back(DeadZone(step=0.01), delta_D[None], context(shapes=((size,),)))[0]
        assert found_D[3] == -found_D[5] == pytest.approx(1, rel=1e-4)
        delta_D[5] = 0  # 447 of them, 44,721 steps
        found_D = there_and_back(DeadZone(step=0.01), delta_D[None], context(shapes=((size,),)))[0]
        assert found_D[3] == pytest.approx(32_767 * 0.01 / np.sqrt(size), rel=1e-4)

    @pytest.mark.parametrize("error_feedback", [False, True])
    @pytest.mark.parametrize("update_bytes", [1200, 1700, 2300])
    @given(deviations=hnp.arrays(np.float64, 16, elements=st.floats(0.5, 3)))
    def test_byte_budget(self, deviations: Any, update_bytes: int, error_feedback: bool) -> None:
        """Shoham and Gersho 1988: with the bits that it spends no other choice for each block, of all that dynamic
        programming looks at, would lose less in expectation; and less is left than one more bit of a block takes."""
        size, rule = 16 * 512, ByteBudget(update_bytes=update_bytes, error_feedback=error_feedback)
        delta_D = (deviations.repeat(512) * np.random.default_rng(0).standard_normal(size)).astype(np.float32)
        (payload,) = rule.compress(delta_D[None], context(shapes=((size,),)))
        taken = payload["bits"].values.astype(int)  # type: ignore[union-attr]
        lost = [1, 0.3634, 0.1175, 0.03454, 0.009497] if error_feedback else [1, 0.5708, 0.1331, 0.0358, 0.0096]
        squares_K, unit = squares(delta_D.reshape(16, 512)), 32  # bits, which all costs are multiples of
        costs = [0, *((512 * bits + 32) // unit for bits in range(1, 5))]
        affordable = (8 * update_bytes - 3 * 16) // unit
        best = np.zeros(affordable + 1)  # the least that is lost of the blocks so far, by what they cost at most
        for square in squares_K:
            choices = []
            for bits in range(0 if error_feedback else 1, 5):
                after = np.concatenate([np.full(costs[bits], np.inf), best])[: len(best)]
                choices.append(after + square * lost[bits])
            best = np.min(choices, axis=0)
        spent = sum(costs[bits] for bits in taken)
        assert affordable - costs[1] < spent <= affordable
        assert squares_K @ np.array(lost)[taken] <= best[spent] * (1 + 1e-6)

    def test_byte_budget_loses_what_it_reckons_with(self) -> None:
        for rule in (ByteBudget(update_bytes=2000), ByteBudget(update_bytes=700, error_feedback=True)):
            delta_D = update(layers, 16 * 512)
            (payload,) = rule.compress(delta_D[None], context(shapes=((len(delta_D),),)))
            lost = [1, 0.5708, 0.1331, 0.0358, 0.0096] if rule.unbiased else [1, 0.3634, 0.1175, 0.0345, 0.0095]
            squares_K = squares(delta_D.reshape(16, 512))
            expected = squares_K @ np.array(lost)[payload["bits"].values] / squares_K.sum()  # type: ignore[union-attr]
            assert mean_error(rule, delta_D, 100) == pytest.approx(expected, rel=0.05)

    def test_a_byte_budget_with_more_bits_than_there_are_levels_for(self) -> None:
        rule, what = ByteBudget(update_bytes=500), context()
        (good,) = rule.compress(update()[None], what)
        (block,) = (len(part.values) for name, part in good.items() if name.startswith("symbols_"))  # type: ignore[union-attr]
        hostile: Payload = {
            "bits": Symbols(np.array([5], np.uint8), 3),
            "scales": good["scales"],
            "symbols_5": Symbols(np.zeros(block, np.uint8), 5),
        }
        with pytest.raises(UpdateRejected, match="blocks of 5 bits a number; 4 are the most"):
            rule.check(hostile, what)

    def test_low_rank(self) -> None:
        """A matrix of that rank comes back whole; of any other no more is lost than there is (a projection), and with
        more steps about what the best factors lose (Eckart and Young 1936)."""
        draw = np.random.default_rng(0)
        low = draw.standard_normal((40, 3)) @ draw.standard_normal((3, 30))
        what = context(shapes=((40, 30),))
        found = there_and_back(LowRank(rank=3), low.astype(np.float32).reshape(1, -1), what)
        assert np.allclose(found, low.reshape(1, -1), atol=1e-3)
        full = draw.standard_normal((40, 30)).astype(np.float32)
        best = np.square(np.linalg.svd(full, compute_uv=False)[3:]).sum()
        errors = [
            squares(there_and_back(LowRank(rank=3, steps=steps), full.reshape(1, -1), what)[0] - full.ravel())
            for steps in (1, 2, 8)
        ]
        assert squares(full.ravel()) > errors[0] > errors[1] > errors[2] > best * (1 - 1e-6)
        assert errors[2] < 1.05 * best
