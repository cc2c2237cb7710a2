"""What the tests of the wire format share: frames of every coding, and how a hostile sender would alter them."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from contextlib import suppress
from typing import Any

import numpy as np

from fedrounds.fl_components.arrays import Indices, Part, Payload, Symbols
from fedrounds.fl_components.errors import UpdateRejected, WireError
from fedrounds.fl_components.wire import decode_frame, decode_update, encode_frame, encode_update

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
PREFIX_BYTES = 24
MAX_EXPANSION = 3


def symbols(bits: int, values: Any) -> Symbols:
    return Symbols(np.asarray(values, np.uint8 if bits <= 8 else np.uint16), bits)


def indices(positions: Any, bound: int) -> Indices:
    return Indices(np.asarray(positions, np.int64), bound)


def skewed(bits: int, count: int) -> Symbols:
    """Symbols that zstandard shortens: three of four are zero."""
    numbers = np.arange(count) * 2654435761 % 2**32
    return symbols(bits, np.where(numbers % 4, 0, numbers >> 8 & (1 << bits) - 1))


VA = {"base": "0123456789abcdef", "channels": "delta", "client": "va"}
SAMPLES: dict[str, tuple[dict[str, str], Payload]] = {
    "empty": ({}, {}),
    "params": (
        {"channels": "params", "params": "e94cbc2ae6824290"},
        {"values": np.array([0.1, -0.0, 1e-45, 3e38], np.float32)},
    ),
    "update": (VA, {"values": np.array([0.5, np.nan, -np.inf], np.float32)}),
    "two_channels": (
        VA | {"channels": "delta,control"},
        {"values": np.array([0.5, -0.25, 2.0, 0.125, -0.0, -1.0], np.float32)},
    ),
    "foreign_name": (VA | {"base": "f" * 16, "client": "Krankenhaus Sankt Jürgen 医院 \U0001d49c"}, {}),
    "top_k_sign": (
        VA,
        {
            "indices": indices([3, 4, 21, 29, 30, 55, 70, 71, 140, 162, 199], 200),
            "scale": np.array([0.25], np.float32),
            "symbols": symbols(1, [1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1]),
        },
    ),
    "even_gaps": ({}, {"indices": indices(range(4, 100, 5), 100), "run": indices(range(50, 60), 60)}),
    "few_indices": ({}, {"none": indices([], 0), "one": indices([2**32 - 1], 2**32), "first": indices([0], 1)}),
    "every_type": (
        {},
        {
            **{dtype: (np.arange(6) - 3 * (dtype[0] != "u")).astype(dtype).reshape(2, 3) for dtype in DTYPES},
            "one_number": np.array(7.5),
            "nothing": np.zeros((0, 4), np.float16),
        },
    ),
    "every_width": (
        {},
        {f"{bits:02}": symbols(bits, [2**bits - 1, 0, 1, 2**bits // 3, 2**bits - 2]) for bits in range(1, 17)},
    ),
    "zstd": ({}, {f"{bits:02}": skewed(bits, 300) for bits in (1, 2, 3, 4, 6, 8, 12, 16)}),
}
FRAMES = {name: encode_frame(*sample) for name, sample in SAMPLES.items()}


def same(found: Part, expected: Part) -> bool:
    """Whether two parts are equal, bit for bit."""
    if isinstance(expected, Symbols):
        return isinstance(found, Symbols) and found.bits == expected.bits and same(found.values, expected.values)
    if isinstance(expected, Indices):
        return isinstance(found, Indices) and (found.bound, found.positions.tolist()) == (
            expected.bound,
            expected.positions.tolist(),
        )
    assert isinstance(found, np.ndarray)
    return (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def seal(header: Any, data: bytes = b"", version: int = 2) -> bytes:
    """A frame with these lengths and checksum, whatever the header (JSON, or bytes as they are) and the data are."""
    if not isinstance(header, bytes):
        header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
    start = struct.pack("<3sBIQ", b"FRW", version, len(header), len(data))
    return start + hashlib.sha256(start + header + data).digest()[:8] + header + data


def cut(frame: bytes) -> tuple[bytes, bytes]:
    """Header and data of a frame; where it tells none, a guess."""
    length = int.from_bytes(frame[4:8], "little")
    return frame[PREFIX_BYTES : PREFIX_BYTES + length], frame[PREFIX_BYTES + length :]


def decoded_or_refused(frame: bytes, max_bytes: int) -> dict[str, Part] | None:
    """The parts in a frame, each held to what is promised of it; None where the frame is refused as it should be."""
    try:
        words, parts = decode_frame(frame, max_bytes)
    except WireError as refusal:
        assert refusal.message.isprintable()
        assert len(refusal.message) < 200
        return None
    arrays = []
    for part in parts.values():
        if isinstance(part, Symbols):
            assert part.values.dtype == (np.uint8 if part.bits <= 8 else np.uint16)
            assert int(part.values.max(initial=0)) < 2**part.bits
            arrays.append(part.values)
        elif isinstance(part, Indices):
            assert part.positions.dtype == np.int64
            assert (np.diff(part.positions, prepend=-1, append=part.bound) > 0).all()
            arrays.append(part.positions)
        else:
            assert f"{part.dtype.kind}{part.dtype.itemsize}" in DTYPES
            arrays.append(part)
    assert all(isinstance(word, str) for word in words.values())
    assert sum(array.nbytes for array in arrays) <= MAX_EXPANSION * max_bytes
    again = decode_frame(encode_frame(words, parts), 2 * max_bytes)
    assert again[0] == words
    assert all(same(again[1][name], part) for name, part in parts.items())
    with suppress(UpdateRejected):
        update = decode_update(frame, max_bytes)
        assert re.fullmatch("[0-9a-f]{16}", update.base_digest)
        assert 1 <= len(update.channels) <= 10
        assert all(re.fullmatch("[a-z_]{1,40}", channel) for channel in update.channels)
        assert encode_update(update) == encode_frame(words, parts)
    return parts


NUMBERS = [
    -1,
    0,
    1,
    2,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    255,
    1000,
    2**31,
    2**32,
    2**32 + 1,
    2**53,
    2**63,
    2**64,
]
VALUES: list[Any] = [10**30, True, None, 0.5, "", "raw", "bits", "zstd", "gaps", "rice", "f4", "u8", "b1", [], [0], {}]
VALUES += [[1] * 9, [2**32, 2**32], [0, 2**60], [[[]]], {"a": 1}, "\ud800", "\x1b[31m"]


def altered(rng: random.Random, frame: bytes) -> bytes:
    """The frame after one to three changes to its header or data, sealed again."""
    header, data = cut(frame)
    for _ in range(rng.randint(1, 3)):
        kind = rng.random()
        if kind < 0.5:
            try:
                tree = json.loads(header)
                _alter_tree(rng, tree)
                header = cut(seal(tree))[0]
            except (ValueError, RecursionError):
                header = _alter_bytes(rng, header)
        elif kind < 0.9:
            data = _alter_bytes(rng, data)
        else:
            header = _alter_bytes(rng, header)
    return seal(header, data)


def _alter_bytes(rng: random.Random, data: bytes) -> bytes:
    at, length = rng.randint(0, len(data)), rng.choice([0, 0, 1, 1, 2, 8])
    return data[:at] + rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length]) + data[at + length :]


def _alter_tree(rng: random.Random, tree: Any) -> None:
    """One change somewhere in a JSON value."""
    places: list[tuple[Any, Any]] = []
    todo = [tree] if isinstance(tree, dict | list) else []
    while todo:
        node = todo.pop()
        inner = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        places += [(node, key) for key, _ in inner]
        todo += [value for _, value in inner if isinstance(value, dict | list)]
    if not places:
        return
    node, key = rng.choice(places)
    value, change = node[key], rng.random()
    if change < 0.4 and type(value) is int:
        node[key] = value + rng.choice([-1, 1])
    elif change < 0.8:
        node[key] = rng.choice(NUMBERS if rng.random() < 0.5 else VALUES)
    elif change < 0.9:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(["a", "params", key + "x"])] = value
    else:
        node.insert(key, value)
