"""Codings: how one part of a frame becomes bytes, and back.

A coding is a small frozen value. Its name and its fields, in order, are the part's entry in the frame's header; from
them alone follow how many bytes the part takes there and how many once it is decoded, so both are known, and refused
if need be, before anything is allocated. `encode` chooses the shortest; equal parts give equal bytes (`Zstd`: for one
release of zstandard).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import MAX_BOUND, Indices, Int64, Part, Symbols
from fedrounds.fl_components.errors import WireError

DTYPES = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
"""What a raw array may be made of: f(loat), i(nteger) or u(nsigned), and how many bytes; always little-endian."""

MAX_DIMENSIONS = 8
MAX_GAP_BITS = 32  # gaps are below MAX_BOUND
SMALLEST_WINDOW_BYTES = 1024  # zstandard knows no smaller one

# Level 1, but it forgets most of what it saw and passes over short matches: in noise these cost more than they save.
COMPRESSION = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)


@dataclass(frozen=True, slots=True)
class Raw:
    """An array as it is: its elements, little-endian, in C order.

    Args:
      dtype: one of `DTYPES`.
      shape: up to 8 dimensions.
    """

    name: ClassVar[str] = "raw"
    dtype: str
    shape: list[int]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise WireError(f"arrays of {self.dtype!a:.20} do not travel")
        if not isinstance(self.shape, list) or len(self.shape) > MAX_DIMENSIONS:
            raise WireError(f"a shape is a list of up to {MAX_DIMENSIONS} numbers")
        for length in self.shape:
            _check(length, "a length in a shape")

    @property
    def coded_bytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype[1])

    @property
    def decoded_bytes(self) -> int:
        return math.prod(max(length, 1) for length in self.shape) * int(self.dtype[1])  # [0, 2**60] is not small

    def decode(self, data: memoryview) -> NDArray[Any]:
        """A read-only view of `data`; a copy where the elements do not lie as the processor wants them."""
        array: NDArray[Any] = np.ndarray(self.shape, f"<{self.dtype}", data)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array


@dataclass(frozen=True, slots=True)
class Packed:
    """Symbols of exactly `bits` bits each (`_pack`)."""

    name: ClassVar[str] = "bits"
    count: int
    bits: int

    def __post_init__(self) -> None:
        _check(self.count, "a count")
        _check(self.bits, "bits", 1, 16)

    @property
    def coded_bytes(self) -> int:
        return _packed_bytes(self.count, self.bits)

    @property
    def decoded_bytes(self) -> int:
        return self.count * _symbol_dtype(self.bits).itemsize

    def decode(self, data: memoryview) -> Symbols:
        return Symbols(_unpack(data, self.count, self.bits, _symbol_dtype(self.bits)), self.bits)


@dataclass(frozen=True, slots=True)
class Zstd:
    """Symbols as one zstandard frame.

    Inside, 3 bits are packed as 4, and 5 to 7 as 8: a byte then holds whole symbols, whose frequencies zstandard can
    see, and the bits that are always zero cost nothing.
    """

    name: ClassVar[str] = "zstd"
    count: int
    bits: int
    coded_bytes: int

    def __post_init__(self) -> None:
        _check(self.count, "a count")
        _check(self.bits, "bits", 1, 16)
        _check(self.coded_bytes, "what zstandard wrote, in bytes", 1, _packed_bytes(self.count, self.bits) - 1)

    @property
    def decoded_bytes(self) -> int:
        return self.count * _symbol_dtype(self.bits).itemsize

    def decode(self, data: memoryview) -> Symbols:
        size = _packed_bytes(self.count, _whole(self.bits))
        window = max(size, SMALLEST_WINDOW_BYTES)
        try:
            found = zstandard.get_frame_parameters(data)
            if found.content_size != size:
                raise WireError(f"zstandard would write {found.content_size} bytes, not {size}")
            if found.window_size > window:
                raise WireError(f"zstandard would look back {found.window_size} bytes, at most {window}")
            packed = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise WireError("this is not what zstandard writes") from error
        if len(packed) != size:
            raise WireError(f"zstandard wrote {len(packed)} bytes, not {size}")
        values = _unpack(memoryview(packed), self.count, _whole(self.bits), _symbol_dtype(self.bits))
        if int(values.max(initial=0)) >> self.bits:
            raise WireError(f"there is a symbol of more than {self.bits} bits")
        return Symbols(values, self.bits)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Indices as the gaps between them (how many positions are passed over), of exactly `bits` bits each."""

    name: ClassVar[str] = "gaps"
    count: int
    bound: int
    bits: int

    def __post_init__(self) -> None:
        _check(self.bound, "a bound", 0, MAX_BOUND)
        _check(self.count, "a count", 0, self.bound)
        _check(self.bits, "bits", 0, MAX_GAP_BITS)

    @property
    def coded_bytes(self) -> int:
        return _packed_bytes(self.count, self.bits)

    @property
    def decoded_bytes(self) -> int:
        return self.count * 8

    def decode(self, data: memoryview) -> Indices:
        return _positions(_unpack(data, self.count, self.bits, np.dtype(np.int64)), self.bound)


@dataclass(frozen=True, slots=True)
class Rice:
    """Indices as Golomb-Rice coded gaps: R. F. Rice 1979, "Some practical universal noiseless coding techniques".

    A gap's last `bits` bits are packed as they are. The rest, its quotient, is as many zero bits and a one, in a stream
    of its own that comes first; with the best `bits` this stream has at most 3 bits a gap.
    """

    name: ClassVar[str] = "rice"
    count: int
    bound: int
    bits: int
    unary_bytes: int

    def __post_init__(self) -> None:
        _check(self.bound, "a bound", 0, MAX_BOUND)
        _check(self.count, "a count", 1, self.bound)
        _check(self.bits, "bits", 0, MAX_GAP_BITS)
        _check(self.unary_bytes, "the unary bytes", -(-self.count // 8), -(-3 * self.count // 8))

    @property
    def coded_bytes(self) -> int:
        return self.unary_bytes + _packed_bytes(self.count, self.bits)

    @property
    def decoded_bytes(self) -> int:
        return self.count * 8

    def decode(self, data: memoryview) -> Indices:
        unary = np.unpackbits(np.frombuffer(data[: self.unary_bytes], np.uint8), bitorder="little")
        found = np.count_nonzero(unary)
        if found != self.count:
            raise WireError(f"the unary part ends {found} gaps, not {self.count}")
        ends = np.flatnonzero(unary)
        if ends[-1] // 8 != self.unary_bytes - 1:
            raise WireError("the unary part goes on behind its last gap")
        if (int(ends[-1]) + 1 - self.count) << self.bits > self.bound:  # the sum of all quotients
            raise WireError(f"a position is not below {self.bound}")
        gaps = ends  # in place: this may be large
        gaps[1:] -= ends[:-1] + 1
        gaps <<= self.bits
        gaps |= _unpack(data[self.unary_bytes :], self.count, self.bits, gaps.dtype)
        return _positions(gaps, self.bound)


Coding = Raw | Packed | Zstd | Gaps | Rice
CODINGS: dict[str, type[Coding]] = {coding.name: coding for coding in (Raw, Packed, Zstd, Gaps, Rice)}


def entry(coding: Coding) -> list[Any]:
    """What the header says of a part.

    >>> entry(Packed(count=1992, bits=1))
    ['bits', 1992, 1]
    """
    return [coding.name, *(getattr(coding, field.name) for field in fields(coding))]


def coding_of(entry: Any) -> Coding:
    """The coding that an entry names.

    Raises:
      WireError: there is none such, or its numbers make no sense.

    >>> coding_of(["bits", 1992, 1]).coded_bytes
    249
    """
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        raise WireError("an entry is a list that begins with the name of a coding")
    coding = CODINGS.get(entry[0])
    if coding is None:
        raise WireError(f"there is no coding {entry[0][:20]!a}")
    if len(entry) != 1 + len(fields(coding)):
        raise WireError(f"an entry of {coding.name} has {1 + len(fields(coding))} items, not {len(entry)}")
    return coding(*entry[1:])


def encode(part: Part) -> tuple[Coding, memoryview]:
    """The shortest coding of a part, and its bytes.

    Raises:
      WireError: an array of another type than `DTYPES`, or of more than 8 dimensions.

    >>> coding, data = encode(Indices(np.array([3, 9, 11]), bound=16))
    >>> coding, bytes(data)
    (Gaps(count=3, bound=16, bits=3), b'k\\x00')
    """
    if isinstance(part, Symbols):
        return _encode_symbols(part)
    if isinstance(part, Indices):
        return _encode_indices(part)
    coding = Raw(f"{part.dtype.kind}{part.dtype.itemsize}", list(part.shape))
    return coding, np.asarray(part, f"<{coding.dtype}", order="C").reshape(-1).view(np.uint8).data


def _encode_symbols(symbols: Symbols) -> tuple[Coding, memoryview]:
    count, whole = len(symbols.values), _whole(symbols.bits)
    packed = _pack(symbols.values, whole)
    data = zstandard.ZstdCompressor(compression_params=COMPRESSION).compress(packed.data)
    if len(data) < _packed_bytes(count, symbols.bits):
        return Zstd(count, symbols.bits, len(data)), memoryview(data)
    if whole != symbols.bits:
        packed = _pack(symbols.values, symbols.bits)
    return Packed(count, symbols.bits), packed.data


def _encode_indices(indices: Indices) -> tuple[Coding, memoryview]:
    count = len(indices.positions)
    gaps = np.diff(indices.positions, prepend=-1)
    gaps -= 1
    fixed_bits = int(gaps.max(initial=0)).bit_length()
    # One bit more for each remainder saves half of each quotient, rounded up. That is more than it costs while the mean
    # quotient is above 3, and less with every bit, so the first number of bits that pays no longer is the best.
    bits = max(-(-int(gaps.sum()) // max(3 * count, 1)) - 1, 0).bit_length()
    quotients = gaps >> bits
    while int((quotients + 1 >> 1).sum()) > count:
        bits, quotients = bits + 1, quotients >> 1
    unary_bytes = -(-(count + int(quotients.sum())) // 8)
    if _packed_bytes(count, fixed_bits) <= unary_bytes + _packed_bytes(count, bits):
        return Gaps(count, indices.bound, fixed_bits), _pack(gaps, fixed_bits).data
    unary = np.zeros(8 * unary_bytes, np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    remainders = _pack(gaps & ((1 << bits) - 1), bits)
    data = np.concatenate([np.packbits(unary, bitorder="little"), remainders])
    return Rice(count, indices.bound, bits, unary_bytes), data.data


def _positions(gaps: Int64, bound: int) -> Indices:
    """The indices with these gaps, each of which is below 2**33. Overwrites them."""
    if int(gaps.sum()) + len(gaps) > bound:
        raise WireError(f"a position is not below {bound}")
    gaps += 1
    positions = np.cumsum(gaps, out=gaps)
    positions -= 1
    return Indices(positions, bound)


def _check(number: Any, what: str, least: int = 0, most: int | None = None) -> None:
    """Raise `WireError` unless `number`, which somebody else may have written, is a whole one in these limits."""
    if type(number) is not int:  # True is none
        raise WireError(f"{what} must be a whole number")
    if number < least or (most is not None and number > most):
        raise WireError(f"{what} cannot be {_short(number)}")


def _short(number: int) -> str:
    return str(number) if abs(number) < 2**64 else f"a number of {number.bit_length()} bits"


def _symbol_dtype(bits: int) -> np.dtype[Any]:
    return np.dtype(np.uint8 if bits <= 8 else np.uint16)


def _whole(bits: int) -> int:
    """The width in which symbols of `bits` bits lie whole in bytes: their last 8 bits, and 1, 2, 4 or 8 for the rest.

    >>> [_whole(bits) for bits in (1, 2, 3, 4, 5, 8, 9, 11, 16)]
    [1, 2, 4, 4, 8, 8, 9, 12, 16]
    """
    bytes_, rest = divmod(bits, 8)
    return 8 * bytes_ + (1 << (rest - 1).bit_length() if rest else 0)


def _packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Numbers (each below 2**bits) in `_packed_bytes` bytes.

    First comes the last byte of each, then the byte before of each, and so on for all whole bytes in `bits`. Of what is
    left, b < 8 bits each, number i has the bits [i b, (i + 1) b) of a little-endian stream; the last byte is filled up
    with zeros.

    >>> _pack(np.array([1, 0, 3, 2]), bits=2)
    array([177], dtype=uint8)
    """
    whole_bytes, rest = divmod(bits, 8)
    planes = [(values >> 8 * place).astype(np.uint8) for place in range(whole_bytes)]
    if rest:
        planes.append(_squeeze(values >> 8 * whole_bytes if whole_bytes else values, rest))
    return planes[0] if len(planes) == 1 else np.concatenate([np.empty(0, np.uint8), *planes])


def _unpack(data: memoryview, count: int, bits: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The inverse of `_pack`: `count` numbers of type `dtype`. Raises `WireError` where bits that fill up are not 0."""
    packed = np.frombuffer(data, np.uint8)
    whole_bytes, rest = divmod(bits, 8)
    if rest and dtype == np.uint8:
        return _spread(packed, count, rest)
    values = np.zeros(count, dtype)
    places = values.view(np.uint8).reshape(count, dtype.itemsize)
    for place in range(whole_bytes):
        places[:, place] = packed[place * count : (place + 1) * count]
    if rest:
        places[:, whole_bytes] = _spread(packed[whole_bytes * count :], count, rest)
    return values


# Eight numbers, one in each byte of a 64-bit word, are moved together in three steps: joined by twos, by fours, all
# eight. A step joins each two fields of `joined` bits that begin `width` bits apart.
@cache
def _steps(bits: int) -> list[tuple[int, int, int]]:
    """For each step: by how much the second field of each two moves, and the bits of the first and the second after."""
    steps = []
    for width, joined in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        first = sum(((1 << joined) - 1) << at for at in range(0, 64, 2 * width))
        steps.append((width - joined, first, first << joined))
    return steps


def _squeeze(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Numbers of 1 to 7 bits, bit-packed."""
    if bits == 1:
        return np.packbits(values.astype(np.uint8, copy=False), bitorder="little")
    words = np.zeros(-(-len(values) // 8), "<u8")
    words.view(np.uint8)[: len(values)] = values
    moved = np.empty_like(words)
    for shift, first, second in _steps(bits):
        np.right_shift(words, shift, out=moved)
        moved &= second
        words &= first
        words |= moved
    if bits in (2, 4):  # the same by a conversion that is three times as fast
        squeezed = words.astype(f"<u{bits}").view(np.uint8)
    else:
        squeezed = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)
    return squeezed[: _packed_bytes(len(values), bits)]


def _spread(packed: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """The inverse of `_squeeze`."""
    if bits == 1:
        values = np.unpackbits(packed, bitorder="little")
    else:
        padded = np.zeros(-(-count // 8) * bits, np.uint8)
        padded[: len(packed)] = packed
        if bits in (2, 4):
            words = padded.view(f"<u{bits}").astype("<u8")
        else:
            words = np.zeros(-(-count // 8), "<u8")
            words.view(np.uint8).reshape(-1, 8)[:, :bits] = padded.reshape(-1, bits)
        moved = np.empty_like(words)
        for shift, first, second in reversed(_steps(bits)):
            np.bitwise_and(words, second, out=moved)
            words &= first
            moved <<= shift
            words |= moved
        values = words.view(np.uint8)
    if values[count:].any():
        raise WireError("the bits that fill up the last byte are not zero")
    return values[:count]
