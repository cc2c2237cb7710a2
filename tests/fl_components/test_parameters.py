from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedrounds.fl_components.arrays import params_digest
from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.parameters import check_trainable, flatten, load_into, num_parameters
from tests.support import cases


def stack(sizes: list[int], bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)))


@settings(deadline=None, max_examples=cases(50))
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), bias=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_loading_what_was_flattened_gives_the_same_bits(sizes: list[int], bias: bool, seed: int) -> None:
    module = stack(sizes, bias)
    expected = sum(a * b + b * bias for a, b in pairwise(sizes))
    params_D = np.random.default_rng(seed).standard_normal(expected).astype(np.float32)
    load_into(module, params_D)
    out_D = flatten(module)
    assert num_parameters(module) == expected
    assert out_D.dtype == np.float32 and np.array_equal(out_D, params_D)
    assert params_digest(out_D) == params_digest(params_D)


def test_order_is_that_of_named_parameters() -> None:
    module = stack([3, 4, 2], bias=True)
    expected = torch.cat([p.detach().ravel() for _, p in module.named_parameters()]).numpy()
    assert np.array_equal(flatten(module), expected)


def test_memory_order_of_a_tensor_does_not_matter() -> None:
    module = nn.Conv2d(2, 3, 2)
    expected = flatten(module)
    strided = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert np.array_equal(flatten(strided), expected)
    load_into(strided, expected[::-1])
    assert np.array_equal(flatten(strided), expected[::-1])


def test_the_vector_and_the_module_share_no_memory() -> None:
    module = nn.Linear(2, 1, bias=False)
    params_D = np.array([1, 2], dtype=np.float32)
    load_into(module, params_D)
    params_D[:] = 9
    flatten(module)[:] = 7
    assert flatten(module).tolist() == [1, 2]


def test_frozen_parameters_are_neither_read_nor_written() -> None:
    module = stack([3, 4, 2], bias=True)
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    assert num_parameters(module) == len(flatten(module)) == 4 * 2 + 2
    load_into(module, np.full(10, 5, dtype=np.float32))
    assert torch.equal(module[0].weight, before)
    assert (module[1].weight == 5).all()


def test_a_tied_tensor_counts_once_and_stays_tied() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    assert num_parameters(module) == len(flatten(module)) == 9
    load_into(module, np.arange(9, dtype=np.float32))
    assert module[1].weight is module[0].weight
    assert module[1].weight[2, 2] == 8


def test_digest_is_of_little_endian_bytes() -> None:
    params_D = np.array([1.5, -2.0], dtype=np.float32)
    expected = hashlib.sha256(bytes.fromhex("0000c03f000000c0")).hexdigest()
    assert params_digest(params_D) == expected
    assert params_digest(params_D.astype(">f4").astype(np.float32)) == expected
    assert params_digest(np.array([1.5, 0, -2.0], dtype=np.float32)[::2]) == expected


def test_digest_tells_one_bit() -> None:
    params_D = np.ones(3, dtype=np.float32)
    other = np.nextafter(params_D, np.float32(2))
    assert params_digest(params_D) != params_digest(other)
    assert params_digest(np.array([0.0], np.float32)) != params_digest(np.array([-0.0], np.float32))


@pytest.mark.parametrize(
    ("params_D", "words"),
    [
        (np.zeros(7, np.float32), "7 parameters do not fit a model that has 8"),
        (np.zeros(9, np.float32), "9 parameters do not fit a model that has 8"),
        (np.zeros(8, np.float64), "float64"),
        (np.zeros((2, 4), np.float32), r"\[2, 4\]"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_and_nothing_written(params_D: np.ndarray, words: str) -> None:
    module = nn.Linear(3, 2)
    before = flatten(module)
    with pytest.raises(ModelError, match=words) as caught:
        load_into(module, params_D)
    assert caught.value.hint
    assert np.array_equal(flatten(module), before)


@pytest.mark.parametrize("params_D", [np.zeros(2), np.zeros((1, 2), np.float32)])
def test_digest_refuses_what_is_not_a_float32_vector(params_D: np.ndarray) -> None:
    with pytest.raises(ModelError, match="one float32 vector"):
        params_digest(params_D)


def test_check_trainable_accepts() -> None:
    for layer in (
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4, affine=True),
    ):
        check_trainable(nn.Sequential(nn.Linear(4, 4), layer))
    half_frozen = nn.Sequential(nn.Linear(4, 4).double().requires_grad_(False), nn.Linear(4, 4))
    check_trainable(half_frozen)


@pytest.mark.parametrize(
    ("module", "words", "mend"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "'1' is a BatchNorm1d with running", "GroupNorm"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False)), "BatchNorm2d", "GroupNorm"),
        (nn.BatchNorm1d(4), "'model' is a BatchNorm1d", "GroupNorm"),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), "InstanceNorm1d", "GroupNorm"),
        (nn.Sequential(nn.Linear(4, 4).double()), "'0.weight' is float64", "torch.float32"),
        (nn.Linear(4, 4).to(torch.bfloat16), "'weight' is bfloat16", "torch.float32"),
        (nn.Sequential(nn.Flatten()), "no trainable parameters", "requires_grad"),
        (nn.Linear(4, 4).requires_grad_(False), "no trainable parameters", "requires_grad"),
        (nn.LazyLinear(4), "'weight' belongs to a lazy layer", "sizes"),
    ],
)
def test_check_trainable_refuses(module: nn.Module, words: str, mend: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        check_trainable(module)
    assert mend in (caught.value.hint or "")
