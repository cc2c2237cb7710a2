"""Arrays of fixed types, the parts of a compressed update, and digests of both: NumPy alone, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.errors import ModelError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Tensors = Mapping[str, NDArray[Any]]

MAX_BOUND: Final = 2**32
"""Positions are below this: no model here has more parameters."""

IGNORED: Final = -1
"""The label of a position that is neither trained on nor counted (padding, context), in sequences of labels."""


@dataclass(frozen=True, slots=True)
class Symbols:
    """Whole numbers of `bits` bits each, as a quantiser makes them: they travel bit-packed or entropy-coded.

    Args:
      values: uint8 [n] for up to 8 bits, uint16 [n] for up to 16; each below 2**bits.
      bits: 1 to 16.

    Raises:
      ValueError: it is not so.

    >>> Symbols(np.array([0, 3, 1], np.uint8), bits=2).values
    array([0, 3, 1], dtype=uint8)
    >>> Symbols(np.array([0, 4, 1], np.uint8), bits=2)
    Traceback (most recent call last):
    ValueError: symbols of 2 bits are below 4; there is a 4
    """

    values: NDArray[np.uint8] | NDArray[np.uint16]
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise ValueError(f"symbols have 1 to 16 bits, not {self.bits}")
        dtype = np.uint8 if self.bits <= 8 else np.uint16
        if self.values.dtype != dtype or self.values.ndim != 1:
            expected, found = f"{np.dtype(dtype)} [n]", f"{self.values.dtype} {list(self.values.shape)}"
            raise ValueError(f"symbols of {self.bits} bits are {expected}, not {found}")
        largest = int(self.values.max(initial=0))
        if largest >> self.bits:
            raise ValueError(f"symbols of {self.bits} bits are below {2**self.bits}; there is a {largest}")


@dataclass(frozen=True, slots=True)
class Indices:
    """Distinct positions among `bound`, as a sparsifier chooses them: they travel as coded gaps.

    Args:
      positions: int64 [k], strictly ascending, each in [0, bound).
      bound: at most 2**32.

    Raises:
      ValueError: it is not so.

    >>> Indices(np.array([0, 2, 7]), bound=8).positions
    array([0, 2, 7])
    >>> Indices(np.array([0, 7, 2]), bound=8)
    Traceback (most recent call last):
    ValueError: positions must ascend, each in [0, 8)
    """

    positions: Int64
    bound: int

    def __post_init__(self) -> None:
        if not 0 <= self.bound <= MAX_BOUND:
            raise ValueError(f"the bound of positions is 0 to 2**32, not {self.bound}")
        if self.positions.dtype != np.int64 or self.positions.ndim != 1:
            raise ValueError(f"positions are int64 [k], not {self.positions.dtype} {list(self.positions.shape)}")
        if len(self.positions) and not (
            self.positions[0] >= 0
            and self.positions[-1] < self.bound
            and (self.positions[1:] > self.positions[:-1]).all()
        ):
            raise ValueError(f"positions must ascend, each in [0, {self.bound})")


Part = NDArray[Any] | Symbols | Indices
Payload = Mapping[str, Part]
"""What stands for an update while it travels: arrays as they are, symbols and indices, each under its name."""


def params_digest(params_D: Float32) -> str:
    """The sha256, in hex, of the parameters' little-endian bytes: equal digests are equal bits.

    Raises `ModelError` when `params_D` is not a float32 vector.

    >>> params_digest(np.zeros(2, dtype=np.float32))[:12]
    'af5570f5a181'
    """
    check_vector(params_D)
    return hashlib.sha256(params_D.astype("<f4", copy=False).tobytes()).hexdigest()


def check_vector(params_D: Float32) -> None:
    """Raise `ModelError` unless `params_D` is a float32 vector."""
    if params_D.ndim != 1 or params_D.dtype != np.float32:
        raise ModelError(
            f"parameters are one float32 vector; this is {params_D.dtype} of shape {list(params_D.shape)}",
            hint="get the vector from flatten(module)",
        )


def tensors_digest(tensors: Tensors) -> str:
    """Return the sha256, in hex, over the names, types, shapes and bytes of tensors; equal digests are equal bits.

    >>> tensors_digest({"a": np.zeros(2)}) == tensors_digest({"a": np.zeros(2, np.float32)})
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype.str, tensor.shape)).encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
