"""Codings: every part comes back bit for bit, in as few bytes as is promised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrounds.fl_components.arrays import Indices, Part, Symbols
from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.wire.codings import CODINGS, Gaps, Packed, Raw, Rice, Zstd, coding_of, encode, entry
from tests.support import cases

from .samples import DTYPES, indices, same, skewed, symbols

D = 199_210


def there_and_back(part: Part) -> Any:
    """The coding of a part, after all that a coding promises has been checked."""
    coding, data = encode(part)
    found = coding_of(entry(coding)).decode(memoryview(bytes(data)))
    assert same(found, part)
    assert len(data) == coding.coded_bytes
    array = part.values if isinstance(part, Symbols) else part.positions if isinstance(part, Indices) else part
    assert coding.decoded_bytes >= array.nbytes
    assert encode(found) == (coding, data)
    return coding


def draw_symbols(bits: int, count: int, likely: float, seed: int) -> Symbols:
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(count) < likely, 2**bits - 1, rng.integers(0, 2**bits, count))
    return symbols(bits, values)


class TestRaw:
    @settings(max_examples=cases(300), deadline=None)
    @given(
        array=st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3))
        )
    )
    def test_any_array(self, array: Any) -> None:
        coding = there_and_back(array)
        assert (type(coding), coding.coded_bytes) == (Raw, array.nbytes)

    def test_the_bytes_do_not_depend_on_how_it_lies_in_memory(self) -> None:
        array = np.arange(12, dtype=np.int32).reshape(3, 4)
        expected = bytes(encode(array)[1])
        assert expected == array.astype("<i4").tobytes()
        for other in (array.astype(">i4"), np.asfortranarray(array), np.repeat(array, 2, axis=1)[:, ::2]):
            assert bytes(encode(other)[1]) == expected

    def test_it_is_a_view_that_cannot_be_written_to(self) -> None:
        data = bytes(encode(np.arange(4, dtype=np.float32))[1])
        for buffer in (memoryview(data), memoryview(b"x" + data)[1:]):  # the second is copied, not aligned
            array = Raw("f4", [4]).decode(buffer)
            assert array.tobytes() == data
            assert not array.flags.writeable
            assert array.flags.aligned
        assert not Raw("f4", [4]).decode(memoryview(data)).flags.owndata

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros(2, bool),
            np.zeros(2, np.complex64),
            np.zeros(2, np.longdouble),
            np.zeros(2, object),
            np.zeros(2, "U1"),
            np.zeros(2, "S4"),
            np.zeros(2, "M8[s]"),
            np.zeros(2, [("a", "f4")]),
            np.zeros((1,) * 9, np.float32),
        ],
        ids=lambda array: str(array.dtype),
    )
    def test_other_arrays_do_not_travel(self, array: Any) -> None:
        with pytest.raises(WireError):
            encode(array)


class TestSymbols:
    @settings(max_examples=cases(500), deadline=None)
    @given(
        bits=st.integers(1, 16),
        count=st.integers(0, 40) | st.integers(0, 3000),
        likely=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        seed=st.integers(0, 2**32),
    )
    def test_any_symbols(self, bits: int, count: int, likely: float, seed: int) -> None:
        coding = there_and_back(draw_symbols(bits, count, likely, seed))
        assert coding.coded_bytes <= math.ceil(count * bits / 8)

    @pytest.mark.parametrize("bits", range(1, 17))
    def test_those_that_cannot_be_shortened_take_exactly_their_bits(self, bits: int) -> None:
        for count in range(20):
            coding = there_and_back(draw_symbols(bits, count, 0.0, seed=count))
            assert (type(coding), coding.coded_bytes) == (Packed, math.ceil(count * bits / 8))

    def test_where_each_bit_goes(self) -> None:
        assert bytes(encode(symbols(1, [1, 0, 0, 0, 0, 0, 0, 0, 1]))[1]) == bytes([0b1, 0b1])
        assert bytes(encode(symbols(3, [1, 2, 3]))[1]) == bytes([0b11_010_001, 0b0])
        assert bytes(encode(symbols(4, [1, 2, 3]))[1]) == b"\x21\x03"
        assert bytes(encode(symbols(12, [0x321, 0x654]))[1]) == b"\x21\x54\x63"

    @pytest.mark.parametrize("bits", range(1, 17))
    def test_those_of_which_some_are_frequent_take_less(self, bits: int) -> None:
        part = skewed(bits, 10_000)
        coding = there_and_back(part)
        assert isinstance(coding, Zstd)
        assert coding.coded_bytes < 0.8 * 10_000 * bits / 8

    @pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
    def test_a_rounded_gaussian_takes_little_more_than_its_entropy(self, bits: int) -> None:
        levels = np.random.default_rng(0).standard_normal(D) * 2**bits / 6 + 2 ** (bits - 1)
        values = np.clip(np.round(levels), 0, 2**bits - 1).astype(np.uint8)
        shares = np.bincount(values) / D
        entropy_bits = -sum(share * math.log2(share) for share in shares if share)
        assert 8 * there_and_back(Symbols(values, bits)).coded_bytes / D < 1.02 * entropy_bits

    @pytest.mark.parametrize(
        ("values", "bits"),
        [([0], 0), ([0], 17), ([2], 1), ([16], 4), ([4096], 12)],
    )
    def test_values_that_are_no_symbols(self, values: list[int], bits: int) -> None:
        with pytest.raises(ValueError, match="symbols"):
            symbols(bits, values)

    def test_arrays_that_are_no_symbols(self) -> None:
        for array, bits in ((np.zeros(2, np.uint16), 8), (np.zeros(2, np.uint8), 9), (np.zeros((2, 1), np.uint8), 1)):
            with pytest.raises(ValueError, match="symbols"):
                Symbols(array, bits)


class TestIndices:
    @settings(max_examples=cases(500), deadline=None)
    @given(
        positions=st.sets(st.integers(0, 300) | st.integers(0, 2**32 - 1) | st.integers(2**20, 2**20 + 50)),
        room=st.integers(1, 1000),
    )
    def test_any_indices(self, positions: set[int], room: int) -> None:
        bound = min(max(positions, default=-1) + room, 2**32)
        there_and_back(indices(sorted(positions), bound))

    @settings(max_examples=cases(200), deadline=None)
    @given(rate=st.floats(0, 1), bound=st.integers(1, 5000), seed=st.integers(0, 2**32))
    @example(rate=0.40625, bound=135, seed=135)
    def test_random_ones_take_the_fewest_bytes_of_all_parameters(self, rate: float, bound: int, seed: int) -> None:
        part = indices(np.flatnonzero(np.random.default_rng(seed).random(bound) < rate), bound)
        gaps = np.diff(part.positions, prepend=-1) - 1
        count, fixed_bits = len(gaps), int(gaps.max(initial=0)).bit_length()
        rice = [math.ceil(int((gaps >> r).sum() + count) / 8) + math.ceil(r * count / 8) for r in range(33)]
        coding = there_and_back(part)
        filled_up = 1  # two streams, each to whole bytes
        assert coding.coded_bytes <= math.ceil(bound / 8) + filled_up
        assert coding.coded_bytes <= min(*rice, math.ceil(fixed_bits * count / 8)) + filled_up

    def test_one_of_a_hundred_at_random(self) -> None:
        """The expectation of Golomb-Rice coding is 1 + r + p / (1 - p) bits a gap, with p = .99^(2^r)."""
        expected_bits = min(1 + r + 0.99 ** (2**r) / (1 - 0.99 ** (2**r)) for r in range(12))
        assert round(expected_bits, 2) == 8.11
        for seed in range(10):
            chosen = np.random.default_rng(seed).choice(D, 1992, replace=False)
            coding = there_and_back(indices(np.sort(chosen), D))
            assert isinstance(coding, Rice)
            assert 8 * coding.coded_bytes / 1992 < 1.01 * expected_bits

    def test_even_gaps_are_packed(self) -> None:
        assert there_and_back(indices(range(4, 1000, 5), 1000)) == Gaps(200, 1000, 3)
        assert there_and_back(indices(range(1000), 1000)) == Gaps(1000, 1000, 0)
        assert there_and_back(indices([], 1000)) == Gaps(0, 1000, 0)

    @pytest.mark.parametrize(
        ("positions", "bound"),
        [([3, 2], 9), ([2, 2], 9), ([-1, 2], 9), ([2, 9], 9), ([0], 0), ([], -1), ([], 2**32 + 1)],
    )
    def test_positions_that_are_no_indices(self, positions: list[int], bound: int) -> None:
        with pytest.raises(ValueError, match="position"):
            indices(positions, bound)

    def test_arrays_that_are_no_indices(self) -> None:
        for array in (np.zeros(1, np.int32), np.zeros((1, 1), np.int64)):
            with pytest.raises(ValueError, match="positions"):
                Indices(array, 9)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CODINGS)
def test_an_entry_is_the_name_and_the_fields(name: str) -> None:
    numbers: dict[str, list[Any]] = {
        "raw": ["f4", [2]],
        "bits": [9, 3],
        "zstd": [9, 8, 5],
        "gaps": [3, 9, 2],
        "rice": [3, 9, 1, 1],
    }
    assert entry(coding_of([name, *numbers[name]])) == [name, *numbers[name]]
    for wrong in (numbers[name][:-1], [*numbers[name], 0]):
        with pytest.raises(WireError, match="items"):
            coding_of([name, *wrong])
