"""The random rotations of EDEN and of a byte budget. What comes out of one looks like normal noise, whatever went in.

EDEN is unbiased under a uniformly random rotation (Vargaftik et al. 2022, theorem 1). How nearly a block gets one
depends on its size:

- Up to 128 numbers the rotation is uniform (Haar): a product of Householder reflections at random vectors (Stewart
  1980, "The efficient generation of random orthogonal matrices"; Diaconis and Shahshahani 1987), D^2 operations.
- Above, it is a product of random signs and Hadamard transforms (Ailon and Chazelle 2009, "The fast
  Johnson-Lindenstrauss transform"), D log D operations: three of each up to 2,048 numbers, two at 4,096. Fewer would
  leave a pattern of vectors with few numbers, which a quantiser gets wrong in the same way each time. With two of each
  EDEN at 1 bit has a bias of 2.8 % of the norm at 64 numbers, 1.2 % at 128 and .16 % at 512, and of about .05 % at
  4,096; with three, none was seen from 256 numbers on, to within .05 %.

Vectors are cut into blocks of a power of two numbers, up to 4,096. Zeros that fill up the last one travel too: one
block for all, of the next power of two, would cost up to as much again.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import torch

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.compression.base import CodecContext, in_buckets

LARGEST: Final = 4096

UNIFORM: Final = 128
"""The length of the longest blocks that are rotated uniformly."""

NORMALS_AT_ONCE: Final = 1_000_000
"""How many normal numbers reflections are drawn from at a time: what they take of the memory."""


def _rounds(block: int) -> int:
    """How many times a block gets signs and a Hadamard transform."""
    return 2 if block == LARGEST else 3


def block_of(num_values: int) -> int:
    """The size of the blocks of a vector of so many numbers: the largest for which few zeros fill up the last one.

    >>> block_of(199_210), block_of(1992), block_of(650), block_of(3)
    (4096, 2048, 1024, 4)
    """
    most_filled = max(0.03 * num_values, min(num_values, 512))
    return next(size for size in _SIZES if -num_values % size <= most_filled)


_SIZES: Final = [LARGEST >> shift for shift in range(LARGEST.bit_length())]


def rotate(values_ND: Float32, block: int, context: CodecContext) -> Float32:
    """Each row rotated in blocks, float32 [N, blocks, block]."""
    values_NKB = in_buckets(values_ND, block)
    if block <= UNIFORM:
        return _reflect(values_NKB, context, back=False)
    rotated = torch.from_numpy(values_NKB.copy())
    for signs_ND in _signs(context, rotated.shape[1], block):
        _flip(rotated, signs_ND)
        rotated = _hadamard(rotated)
    return rotated.numpy()


def rotate_back(rotated_NKB: Float32, num_values: int, context: CodecContext) -> Float32:
    """The rows that `rotate` made these of, float32 [N, num_values]."""
    num_rows, blocks, block = rotated_NKB.shape
    if block <= UNIFORM:
        return _reflect(rotated_NKB, context, back=True).reshape(num_rows, -1)[:, :num_values]
    values = torch.from_numpy(rotated_NKB)
    for signs_ND in reversed(_signs(context, blocks, block)):
        values = _hadamard(values)
        _flip(values, signs_ND)
    return values.flatten(1)[:, :num_values].numpy()


def _reflect(values_NKB: Float32, context: CodecContext, *, back: bool) -> Float32:
    """Each block times its own uniformly random orthogonal matrix, or times the inverse of that matrix.

    A reflection that takes the first axis to a uniformly random direction, after a uniformly random matrix of the other
    axes, is a uniformly random matrix: one reflection of the last axis, of the last two, ... of all.
    """
    num_rows, blocks, block = values_NKB.shape
    rotated_NKB, draws = values_NKB.astype(np.float64), context.draws("rotation")
    ends = np.cumsum(np.arange(1, block + 1))
    starts, num_normals = ends - np.arange(1, block + 1), int(ends[-1])
    rows_at_once = max(1, NORMALS_AT_ONCE // (blocks * num_normals))
    sizes = range(block, 0, -1) if back else range(1, block + 1)
    for first in range(0, num_rows, rows_at_once):
        own_NKB = rotated_NKB[first : first + rows_at_once]
        # The difference of each direction and the first of its axes, which the reflection exchanges.
        axes_NKE = np.stack([draw.standard_normal((blocks, num_normals)) for draw in draws[first:][: len(own_NKB)]])
        axes_NKE[..., starts] -= np.sqrt(np.add.reduceat(np.square(axes_NKE), starts, axis=-1))
        squares_NKB = np.add.reduceat(np.square(axes_NKE), starts, axis=-1)
        shares_NKB = np.divide(2, squares_NKB, out=np.zeros_like(squares_NKB), where=squares_NKB > 0)
        with np.errstate(invalid="ignore"):  # what is not finite stays so
            for size in sizes:
                axes_NKs = axes_NKE[..., starts[size - 1] : ends[size - 1]]
                tail_NKs = own_NKB[..., block - size :]
                products_NK = np.einsum("nks,nks->nk", tail_NKs, axes_NKs) * shares_NKB[..., size - 1]
                tail_NKs -= products_NK[..., None] * axes_NKs
    with np.errstate(over="ignore"):
        return rotated_NKB.astype(np.float32)


def _signs(context: CodecContext, blocks: int, block: int) -> list[torch.Tensor]:
    """For each round and row, as bits of a float32's sign, int32 [N, blocks * block]."""
    size = blocks * block
    found, draws, num_bytes = [], context.draws("rotation"), -(-size // 8)
    for _ in range(_rounds(block)):
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
