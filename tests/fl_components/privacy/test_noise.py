"""Noise: the distribution that is claimed, the same for a key and for no other."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedrounds.fl_components.privacy.noise import MAX_DEVIATION, WholeNormals, gaussian
from tests.support import cases

KEY = bytes(range(32))


def test_it_is_normal() -> None:
    """Kolmogorov and Smirnov's distance of a million draws; the first moments; the tails."""
    noise = gaussian(KEY, 1e6, 1_000_000)
    assert stats.kstest(noise / 1e6, "norm").pvalue > 1e-3
    assert abs(noise.mean()) < 4e3 and noise.std() == pytest.approx(1e6, rel=4e-3)
    assert stats.kurtosis(noise) == pytest.approx(0, abs=0.03)
    assert 3.0e-5 < (np.abs(noise) > 4e6).mean() < 1.0e-4  # 6.3e-5


def test_neighbours_are_not_correlated() -> None:
    """The two draws of a pair, and one draw and the next."""
    noise = gaussian(KEY, 1e3, 1 << 19).astype(np.float64)
    for lag in (1, 1 << 17, 1 << 18):
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 0.01


def test_small_deviations_are_rounded() -> None:
    """In whole units: P(0) is the mass between -1/2 and 1/2."""
    noise = gaussian(KEY, 0.8, 200_000)
    assert (noise == 0).mean() == pytest.approx(stats.norm.cdf(0.5 / 0.8) - stats.norm.cdf(-0.5 / 0.8), abs=0.005)


@settings(max_examples=cases(30), deadline=None)
@given(size=st.integers(0, 1000), key=st.binary(min_size=32, max_size=32))
def test_a_key_gives_the_same_draws_and_another_gives_others(size: int, key: bytes) -> None:
    noise = gaussian(key, 1e9, size)
    assert noise.shape == (size,) and noise.dtype == np.int64
    assert np.array_equal(noise, gaussian(key, 1e9, size))
    other = bytes([key[0] ^ 1]) + key[1:]
    assert size < 2 or not np.array_equal(noise, gaussian(other, 1e9, size))


def test_the_first_draws_by_hand() -> None:
    """RFC 8439's stream for this key, and the transform, written out with Python's numbers."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(16))
    first, second = struct.unpack("<QQ", stream)
    radius, angle = math.sqrt(-2 * math.log((first + 1) / 2**64)), 2 * math.pi * second / 2**64
    expected = [round(1e6 * radius * math.cos(angle)), round(1e6 * radius * math.sin(angle))]
    assert gaussian(KEY, 1e6, 2).tolist() == expected


def test_none_and_too_much() -> None:
    assert not gaussian(KEY, 0.0, 100).any()
    assert np.abs(gaussian(KEY, MAX_DEVIATION, 1000).astype(np.float64)).max() < 2.0**62
    with pytest.raises(ValueError, match="is not between"):
        gaussian(KEY, MAX_DEVIATION * 2, 1)


def drawn(key: bytes, deviation: float, size: int) -> np.ndarray:
    return np.concatenate([block.numpy().copy() for block in WholeNormals(key, deviation).blocks(size)])


class TestWholeNormals:
    def test_they_are_normal_and_whole(self) -> None:
        noise = drawn(KEY, 2.0**20, 1_000_000)
        assert noise.dtype == np.float32 and (noise == np.rint(noise)).all() and np.abs(noise).max() < 2**24
        standard = noise.astype(np.float64) / 2**20
        assert stats.kstest(standard, "norm").pvalue > 1e-3
        assert abs(standard.mean()) < 4e-3 and standard.std() == pytest.approx(1, rel=3e-3)
        assert stats.kurtosis(standard) == pytest.approx(0, abs=0.03)
        assert 3.0e-5 < (np.abs(standard) > 4).mean() < 1.0e-4  # 6.3e-5
        for units in (2, 4, 3):  # down to the last unit
            shares = np.bincount(noise.astype(np.int64) % units) / len(noise)
            assert shares == pytest.approx(np.full(units, 1 / units), abs=2e-3)
        for lag in (1, 1 << 14, 1 << 15):
            assert abs(np.corrcoef(standard[:-lag], standard[lag:])[0, 1]) < 0.006

    @pytest.mark.parametrize("byte", [0, 255])
    def test_the_longest_and_the_shortest_radius(self, monkeypatch: pytest.MonkeyPatch, byte: int) -> None:
        """A stream of equal bits: 9.4 deviations, which a float32 still holds exactly, and none."""
        stream = WholeNormals(KEY, 2.0**20)

        class Constant:
            def update_into(self, zeros: bytes, into: bytearray) -> None:
                into[:] = bytes([byte]) * len(zeros)

        monkeypatch.setattr(stream, "_stream", Constant())
        (block,) = stream.blocks(2)
        radius = math.hypot(*block.tolist()) / 2**20
        assert radius == pytest.approx(math.sqrt(-2 * math.log(2.0**-64)) if byte == 0 else 0, abs=1e-5)
        assert radius * 2**20 < 2**24

    @settings(max_examples=cases(30), deadline=None)
    @given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4), key=st.binary(min_size=32, max_size=32))
    def test_a_key_gives_the_same_stream_and_another_gives_another(self, sizes: list[int], key: bytes) -> None:
        """Whatever other streams draw in between."""
        first, again, other = (WholeNormals(each, 1e6) for each in (key, key, bytes([key[0] ^ 1]) + key[1:]))
        seen = set()
        for size in sizes:
            (draws,) = [block.clone() for block in first.blocks(size)]
            (others,) = [block.clone() for block in other.blocks(size)]
            assert draws.shape == (size,)
            assert torch.equal(draws, next(again.blocks(size)))
            assert size < 3 or not torch.equal(draws, others)
            seen.add(tuple(draws.tolist()))
        assert len(seen) == len(sizes) or max(sizes) < 3  # it goes on, and does not begin again

    def test_the_first_draws_by_hand(self) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        stream = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor().update(bytes(12))
        first, second = struct.unpack("<Qi", stream)
        radius, angle = math.sqrt(-2 * math.log((first % 2**63 + 0.5) / 2**63)), 2 * math.pi * second / 2**32
        expected = [1e6 * radius * math.cos(angle), 1e6 * radius * math.sin(angle)]
        assert drawn(KEY, 1e6, 2).tolist() == pytest.approx(expected, abs=0.5 + 1e-6)

    def test_too_much_for_float32(self) -> None:
        with pytest.raises(ValueError, match="is not between"):
            WholeNormals(KEY, 2.0**20 + 1)
