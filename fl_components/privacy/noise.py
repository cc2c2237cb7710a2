"""Gaussian noise from a cryptographic stream: whoever does not hold the key cannot tell it from noise that nobody drew.

The stream is ChaCha20 (RFC 8439), the transform Box and Muller's (1958, "A note on the generation of random normal
deviates"). Noise is rounded to whole units, as what it is added to is whole units: the sum then shows nothing of the
floating point numbers that it came from (Mironov 2012, "On significance of the least significant bits for differential
privacy").
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedrounds.fl_components.arrays import Int64

KEY_BYTES: Final = 32
_BLOCK: Final = 1 << 18  # normals at a time: what a processor's cache holds

MAX_DEVIATION: Final = 2.0**58
"""In units: no draw (at most 9.5 deviations) then leaves int64."""


def gaussian(key: bytes, deviation: float, size: int) -> Int64:
    """`size` independent draws from a normal distribution of mean 0, each rounded to a whole number, int64 [size].

    Args:
      key: 32 bytes. The same key gives the same draws: it must never serve two different sums.
      deviation: in units.

    A draw is at most 9.5 deviations (of 2^64 equally likely radii the largest), which is passed with a probability of
    3e-21 otherwise.

    >>> noise = gaussian(b"k" * 32, 1000.0, 10_000)
    >>> bool(abs(noise.std() - 1000) < 30), noise.dtype
    (True, dtype('int64'))
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    if not 0 <= deviation <= MAX_DEVIATION:
        raise ValueError(f"a deviation of {deviation:g} units is not between 0 and {MAX_DEVIATION:g}")
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    zeros = bytes(8 * min(_BLOCK, size + size % 2))
    noise = np.empty(size + size % 2, np.int64)
    for start in range(0, len(noise), _BLOCK):
        block = noise[start : start + _BLOCK]
        uniform = np.frombuffer(stream.update(zeros[: 8 * len(block)]), "<u8").astype(np.float64)
        half = len(block) // 2
        radius = np.sqrt(-2 * (np.log(uniform[:half] + 1) - 64 * math.log(2)).clip(max=0)) * deviation
        angle = uniform[half:] * (2 * math.pi / 2**64)
        block[:half], block[half:] = np.rint(radius * np.cos(angle)), np.rint(radius * np.sin(angle))
    return noise[:size]


MOST_OF_FLOAT32: Final = 2.0**20
"""The largest deviation, in units, of `WholeNormals`: a draw is then below 2^24, and a float32 holds it exactly."""

_PAIRS: Final = 1 << 14  # at a time: what a processor's cache holds, and too few for torch to wake a second thread


class WholeNormals:
    """An endless stream of draws like those of `gaussian`, float32 whole numbers, at about the speed of torch.normal_.

    A pair of draws takes 12 bytes of the stream: 63 bits and a half for the radius, so that draws reach 9.4 deviations;
    32 bits for the angle. All is float64 until it is rounded: next to a deviation of 2^20 units float32 has so few bits
    left that it prefers even numbers (54 to 46), from which one could tell sums of many coordinates apart.

    Args:
      key: 32 bytes. The same key gives the same draws: it must never serve two different sums.
      deviation: in units, at most `MOST_OF_FLOAT32`.

    >>> stream = WholeNormals(b"k" * 32, 1000.0)
    >>> draws = torch.cat([block.clone() for block in stream.blocks(50_000)])
    >>> bool(abs(draws.std() - 1000) < 15), bool((draws == draws.round()).all())
    (True, True)
    """

    def __init__(self, key: bytes, deviation: float) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        if not 0 <= deviation <= MOST_OF_FLOAT32:
            raise ValueError(f"a deviation of {deviation:g} units is not between 0 and {MOST_OF_FLOAT32:g}")
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._deviation = deviation

    def blocks(self, size: int) -> Iterator[Tensor]:
        """The next `size` draws, in blocks. A block holds until the next one is drawn, from any stream of the thread.

        The stream goes on behind them, after a last pair where `size` is odd.
        """
        for start in range(0, size, 2 * _PAIRS):
            yield self._draw(min(_PAIRS, (size - start + 1) // 2))[: size - start]

    def _draw(self, pairs: int) -> Tensor:
        room, variance = _ROOMS.of(pairs), self._deviation**2
        self._stream.update_into(room.zeros, room.bytes)
        radius = room.radius.copy_(room.radius_bits.bitwise_and_(2**63 - 1)).add_(0.5).log_()
        # -2 log of (bits + 1/2) / 2^63, and next to nothing more: rounding must not make it negative.
        radius.mul_(-2 * variance).add_((126 * math.log(2) + 1e-13) * variance).sqrt_()
        room.angle.copy_(room.angle_bits).mul_(2 * math.pi / 2**32)
        torch.cos(room.angle, out=room.cosines).mul_(radius)
        torch.sin(room.angle, out=room.sines).mul_(radius)
        return room.draws.copy_(room.pairs.round_())


class _Room:
    """What a block of draws is made in."""

    def __init__(self, pairs: int) -> None:
        self.zeros, self.bytes = bytes(12 * pairs), bytearray(12 * pairs)
        bits = torch.frombuffer(self.bytes, dtype=torch.uint8)
        self.radius_bits, self.angle_bits = bits[: 8 * pairs].view(torch.int64), bits[8 * pairs :].view(torch.int32)
        self.radius, self.angle = torch.empty(2, pairs, dtype=torch.float64)
        self.pairs, self.draws = torch.empty(2 * pairs, dtype=torch.float64), torch.empty(2 * pairs)
        self.cosines, self.sines = self.pairs[:pairs], self.pairs[pairs:]


class _Rooms(threading.local):
    """One for whole blocks and one for what is left of a vector, for each thread.

    All streams take turns in them, since they stay in the cache.
    """

    def __init__(self) -> None:
        self._rooms: dict[int, _Room] = {}

    def of(self, pairs: int) -> _Room:
        if pairs not in self._rooms:
            self._rooms = {size: room for size, room in self._rooms.items() if size == _PAIRS}
            self._rooms[pairs] = _Room(pairs)
        return self._rooms[pairs]


_ROOMS: Final = _Rooms()
