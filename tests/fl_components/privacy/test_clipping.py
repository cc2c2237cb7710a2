"""No contribution is longer than the clipping norm, whatever was sent; sums of them are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedrounds.fl_components.admission import Clip
from fedrounds.fl_components.privacy.clipping import EXACT_IN_FLOAT32, UNITS, clip_norm_in_units, contributions
from tests.support import cases

any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
updates = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=any_float32)


def clipped(deltas_CD: np.ndarray, norm: float, sizes: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Contributions of equal weight; `sizes` asks for clipping layer by layer."""
    shares_C = torch.ones(len(deltas_CD), dtype=torch.float64)
    units_CD = torch.from_numpy(deltas_CD.copy())
    parts = units_CD.split_with_sizes(sizes or [deltas_CD.shape[1]], dim=1)
    return units_CD, contributions(parts, shares_C, Clip(norm, per_layer=sizes is not None))


def squared_norm(units_D: torch.Tensor) -> int:
    """Exactly: in Python's whole numbers."""
    return sum(int(each) ** 2 for each in units_D.tolist())


@settings(max_examples=cases(300))
@given(deltas_CD=updates, clipping_norm=st.floats(1e-6, 1e6), per_layer=st.booleans())
def test_the_exact_norm_is_at_most_the_clipping_norm(
    deltas_CD: np.ndarray, clipping_norm: float, per_layer: bool
) -> None:
    size = deltas_CD.shape[1]
    units_CD, unclipped_C = clipped(deltas_CD, clipping_norm, [size // 2, size - size // 2] if per_layer else None)
    norms = np.linalg.norm(deltas_CD.astype(np.float64), axis=1)
    for unclipped, norm in zip(unclipped_C.tolist(), norms, strict=True):
        near = abs(norm - clipping_norm) < 1e-5 * clipping_norm  # where float32 may see it on the other side
        assert per_layer or near or unclipped == (norm <= clipping_norm)
    assert units_CD.dtype == torch.float32
    for units_D, delta_D in zip(units_CD, deltas_CD, strict=True):
        assert squared_norm(units_D) <= UNITS**2
        assert all(float(each).is_integer() for each in units_D.tolist())
        if not np.isfinite(delta_D).all():
            assert not units_D.any()


@pytest.mark.parametrize("value", [1e30, np.nan, np.inf])
def test_one_client_changes_nothing_of_the_others(value: float) -> None:
    deltas_CD = np.random.default_rng(3).normal(size=(4, 700)).astype(np.float32)
    before, _ = clipped(deltas_CD, 1.0)
    deltas_CD[1, 5] = value
    after, _ = clipped(deltas_CD, 1.0)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [0.5, 1.0, 1.0 + 1e-7, 3.0, 1e30])
def test_large_updates_too(seed: int, length: float) -> None:
    """Many coordinates, where rounding adds most, at and around the clipping norm."""
    generator = torch.Generator().manual_seed(seed)
    deltas_CD = torch.randn(4, 300_000, generator=generator)
    deltas_CD *= length / deltas_CD.double().norm(dim=1, keepdim=True).float()
    units_CD, _ = clipped(deltas_CD.numpy(), 1.0)
    squares_C = units_CD.to(torch.int64).square().sum(1)  # exact: below 2^63
    assert (squares_C <= UNITS**2).all()
    kept_C = units_CD.double().norm(dim=1) / UNITS
    assert kept_C.tolist() == pytest.approx([min(length, 1.0)] * 4, rel=2e-3)  # next to nothing is lost


@given(deltas_CD=updates)
def test_what_is_shorter_keeps_its_direction_and_length(deltas_CD: np.ndarray) -> None:
    deltas_CD = np.nan_to_num(deltas_CD, nan=0, posinf=0, neginf=0)
    deltas_CD = deltas_CD.clip(-1, 1)
    norm = math.sqrt(deltas_CD.shape[1])
    units_CD, _ = clipped(deltas_CD, norm)
    back_CD = units_CD.double().numpy() * norm / clip_norm_in_units(deltas_CD.shape[1])
    np.testing.assert_allclose(back_CD, deltas_CD, rtol=0, atol=norm / UNITS)


def test_a_float32_holds_the_sum_of_so_many() -> None:
    """In any order: every partial sum is a whole number below 2^24."""
    units_CD, _ = clipped(np.full((EXACT_IN_FLOAT32, 1), 1e9, np.float32), 1.0)
    assert units_CD.sum().item() == sum(int(each) for each in units_CD.ravel().tolist()) <= 2**24


@settings(max_examples=cases(50))
@given(deltas_CD=updates, row=st.integers(0, 4))
def test_a_neighbour_moves_the_sum_by_what_the_relation_says(deltas_CD: np.ndarray, row: int) -> None:
    """C where a client goes or sends zero, 2 C where it sends something else."""
    row %= len(deltas_CD)

    def total(rows: np.ndarray) -> torch.Tensor:
        return clipped(rows, 1.0)[0].to(torch.int64).sum(0)

    replaced = deltas_CD.copy()
    replaced[row] = -replaced[row]
    without = total(np.delete(deltas_CD, row, axis=0)) if len(deltas_CD) > 1 else 0
    assert squared_norm(total(deltas_CD) - without) <= UNITS**2
    assert squared_norm(total(deltas_CD) - total(replaced)) <= (2 * UNITS) ** 2
