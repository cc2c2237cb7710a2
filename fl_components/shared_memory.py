"""Memory that several processes of a machine share, passed on as a file descriptor and freed with the last process that
holds it; and the settings of the allocator."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_ALIGNED_TO: Final = 64  # as torch aligns its own: kernels may sum in another order where it differs


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """The place of an array in the memory, its type and its shape."""

    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + np.dtype(self.dtype).itemsize * prod(self.shape)


class SharedMemory:
    """Named arrays that several processes see. Another process, given `fd` and `layout`, opens the same ones.

    It is not made in /dev/shm, which is small in most containers, but with memfd_create or, where there is none, as a
    temporary file that has no name. The file descriptor is closed with the object; arrays outlive it.

    >>> memory = SharedMemory.from_arrays({"x": np.arange(3), "y": np.ones((2, 2), np.float32)})
    >>> memory["x"][1] = 7
    >>> SharedMemory(os.dup(memory.fd), memory.layout)["x"]
    array([0, 7, 2])
    """

    def __init__(self, fd: int, layout: Mapping[str, ArraySpec]) -> None:
        self.fd, self.layout = fd, layout
        weakref.finalize(self, os.close, fd)
        self._memory = mmap.mmap(fd, max(1, *(spec.stop for spec in layout.values())))

    @classmethod
    def create(cls, arrays: Mapping[str, tuple[Any, Sequence[int]]]) -> SharedMemory:
        """Return a memory with arrays of these types and shapes, all zero."""
        layout, start = {}, 0
        for name, (dtype, shape) in arrays.items():
            spec = layout[name] = ArraySpec(start, np.dtype(dtype).str, tuple(shape))
            start = -(-spec.stop // _ALIGNED_TO) * _ALIGNED_TO
        fd = _anonymous_file()
        os.ftruncate(fd, max(1, start))
        return cls(fd, layout)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> SharedMemory:
        """Return a memory that holds a copy of these arrays."""
        memory = cls.create({name: (array.dtype, array.shape) for name, array in arrays.items()})
        for name, array in arrays.items():
            memory[name][...] = array
        return memory

    def __getitem__(self, name: str) -> NDArray[Any]:
        spec = self.layout[name]
        return np.frombuffer(self._memory, spec.dtype, prod(spec.shape), spec.start).reshape(spec.shape)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedrounds")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def give_back_memory() -> None:
    """Give the system back what the allocator keeps for later: after data was loaded, often more than the data takes.

    Does nothing where the allocator is not glibc's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep up to 128 MB of what is freed, where it can, for the rest of this process.

    Else arrays of some hundred kilobytes are given back and mapped anew each time, and every page of them costs a
    fault: 15,000 of them where 100 updates of 199,210 parameters are decoded and added up, or else 1,100.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)
