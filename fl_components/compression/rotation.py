"""A random rotation that costs D log D: signs and a Hadamard transform, twice (Ailon and Chazelle 2009, "The fast
Johnson-Lindenstrauss transform"). What comes out of it looks like normal noise, whatever went in.

Once would not do: a vector with one number becomes one of 2 D vectors whose coordinates are all as large, and one with
a few numbers keeps such a pattern, which a quantiser gets wrong in the same way each time.

Vectors are cut into blocks of a power of two numbers, up to 4,096. Zeros that fill up the last one travel too: one
block for all, of the next power of two, would cost up to as much again.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import torch

from fl_components.compression.base import Known, in_buckets
from fl_components.values import Float32

LARGEST: Final = 4096
ROUNDS: Final = 2


def block_of(num_values: int) -> int:
    """The size of the blocks of a vector of so many numbers: the largest for which few zeros fill up the last one.

    >>> block_of(199_210), block_of(1992), block_of(650), block_of(3)
    (4096, 2048, 1024, 4)
    """
    most_filled = max(0.03 * num_values, min(num_values, 512))
    return next(size for size in _SIZES if -num_values % size <= most_filled)


_SIZES: Final = [LARGEST >> shift for shift in range(LARGEST.bit_length())]


def rotate(values_ND: Float32, block: int, known: Known) -> Float32:
    """Each row rotated in blocks, float32 [N, blocks, block]."""
    rotated = torch.from_numpy(in_buckets(values_ND, block).copy())
    signs_RND = _signs(known, rotated.shape[1] * block)
    for signs_ND in signs_RND:
        _flip(rotated, signs_ND)
        rotated = _hadamard(rotated)
    return rotated.numpy()


def rotate_back(rotated_NKB: Float32, num_values: int, known: Known) -> Float32:
    """The rows that `rotate` made these of, float32 [N, num_values]."""
    values = torch.from_numpy(rotated_NKB)
    for signs_ND in reversed(_signs(known, values[0].numel())):
        values = _hadamard(values)
        _flip(values, signs_ND)
    return values.flatten(1)[:, :num_values].numpy()


def _signs(known: Known, size: int) -> list[torch.Tensor]:
    """For each round and row, as bits of a float32's sign, int32 [N, size]."""
    found, draws, num_bytes = [], known.draws("rotation"), -(-size // 8)
    for _ in range(ROUNDS):
        signs_N = np.empty((len(draws), num_bytes, 8), np.int32)
        for signs, draw in zip(signs_N, draws, strict=True):
            np.take(_SIGNS_OF_BYTE, np.frombuffer(draw.bytes(num_bytes), np.uint8), axis=0, out=signs, mode="clip")
        found.append(torch.from_numpy(signs_N).flatten(1)[:, :size])
    return found


_SIGNS_OF_BYTE: Final = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.int32) << 31


def _flip(values: torch.Tensor, signs_ND: torch.Tensor) -> None:
    values.view(torch.int32).view(signs_ND.shape).bitwise_xor_(signs_ND)


def _hadamard(values: torch.Tensor) -> torch.Tensor:
    """[N, blocks, block]: each block times the orthonormal Hadamard matrix, which is symmetric and its own inverse.

    It is a Kronecker product of three small ones, each of which works along one axis of a block seen as a cube: in
    blocks of 4,096 that is 48 multiplications a number.
    """
    first, second, third = _factors(values.shape[-1])
    cubes = first @ values.view(-1, len(first), len(second) * len(third))
    cubes = second @ cubes.view(-1, len(second), len(third))
    return (cubes.view(-1, len(third)) @ third).view(values.shape)


@cache
def _factors(block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal Hadamard matrices whose sizes multiply to `block`."""
    log = block.bit_length() - 1
    return _matrix(log // 3), _matrix((log + 1) // 3), _matrix((log + 2) // 3)


def _matrix(log: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(log):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / 2 ** (log / 2)
