"""Gaussian noise from a cryptographic stream: whoever does not hold the key cannot tell it from noise that nobody drew.

The stream is ChaCha20 (RFC 8439), the transform Box and Muller's (1958, "A note on the generation of random normal
deviates"). Noise is rounded to whole units, as what it is added to is whole units: the sum then shows nothing of the
floating point numbers that it came from (Mironov 2012, "On significance of the least significant bits for differential
privacy").
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from fl_components.values import Int64

KEY_BYTES: Final = 32
_BLOCK: Final = 1 << 18  # normals at a time: what a processor's cache holds

MOST_DEVIATION: Final = 2.0**58
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

    if not 0 <= deviation <= MOST_DEVIATION:
        raise ValueError(f"a deviation of {deviation:g} units is not between 0 and {MOST_DEVIATION:g}")
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
