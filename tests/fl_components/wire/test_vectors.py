"""The frames in tests/reference/wire, made once for version 2: what reads it reads them, and writes the same bytes.

Each was put together without fedrounds: its header by `json`, its lengths by `struct`, its checksum by `hashlib`, the
bytes of its parts taken over from version 1, which codes them the same way, or packed by `struct`.

`read_plainly` is docs/wire-format.md once more, bit by bit: it holds that the fast decoder reads what is written there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from fedrounds.fl_components.arrays import Indices, Symbols
from fedrounds.fl_components.wire import (
    Update,
    decode_frame,
    decode_params,
    decode_update,
    encode_frame,
    encode_params,
    encode_update,
    max_update_bytes,
)
from tests.support import ROOT

from .samples import SAMPLES, cut, same, seal

FOLDER = ROOT / "tests" / "reference" / "wire"
FILES = sorted(FOLDER.glob("*.hex"))


def vector(path: Path) -> bytes:
    return b"".join(bytes.fromhex(line) for line in path.read_text().splitlines() if not line.startswith("#"))


class Bits:
    """A stream of bits, the lowest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self.bits = [byte >> place & 1 for byte in data for place in range(8)]

    def take(self, width: int) -> int:
        taken, self.bits = self.bits[:width], self.bits[width:]
        return sum(bit << place for place, bit in enumerate(taken))


def numbers(data: bytes, count: int, width: int) -> list[int]:
    found = [0] * count
    for place in range(width // 8):
        for i in range(count):
            found[i] += data[place * count + i] << 8 * place
    rest = Bits(data[width // 8 * count :])
    return [number + (rest.take(width % 8) << width // 8 * 8) for number in found]


def positions(gaps: list[int]) -> list[int]:
    return [sum(gaps[: i + 1]) + i for i in range(len(gaps))]


def read_plainly(frame: bytes) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """The words, and the numbers in each part: of an array all in a row."""
    header, data = cut(frame)
    words, entries = json.loads(header)
    parts: dict[str, list[Any]] = {}
    for name in sorted(entries):
        coding, *fields = entries[name]
        if coding == "raw":
            dtype, shape = fields
            size = math.prod(shape) * int(dtype[1])
            parts[name] = list(np.frombuffer(data[:size], "<" + dtype))
        elif coding == "bits":
            count, bits = fields
            size = math.ceil(count * bits / 8)
            parts[name] = numbers(data, count, bits)
        elif coding == "zstd":
            count, bits, size = fields
            width = bits // 8 * 8 + {0: 0, 1: 1, 2: 2, 3: 4, 4: 4}.get(bits % 8, 8)
            parts[name] = numbers(zstandard.decompress(data[:size]), count, width)
        elif coding == "gaps":
            count, _, bits = fields
            size = math.ceil(count * bits / 8)
            parts[name] = positions(numbers(data, count, bits))
        else:
            count, _, bits, unary_bytes = fields
            size = unary_bytes + math.ceil(count * bits / 8)
            unary, gaps = Bits(data), []
            for remainder in numbers(data[unary_bytes:], count, bits):
                gap = remainder
                while not unary.take(1):
                    gap += 1 << bits
                gaps.append(gap)
            parts[name] = positions(gaps)
        data = data[size:]
    assert not data
    return words, parts


def test_every_sample_has_its_vector() -> None:
    assert [path.stem for path in FILES] == sorted(SAMPLES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_vector_is_read(path: Path) -> None:
    words, parts = decode_frame(vector(path), max_bytes=4000)
    expected_words, expected = SAMPLES[path.stem]
    assert (words, parts.keys()) == (expected_words, expected.keys())
    assert all(same(parts[name], expected[name]) for name in parts)


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "zstd"], ids=lambda path: path.stem)
def test_a_vector_is_written(path: Path) -> None:
    assert encode_frame(*SAMPLES[path.stem]) == vector(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_comments_of_a_vector_are_true(path: Path) -> None:
    """A frame is sealed by hand from the version, the header and the parts that the comments name."""
    text = path.read_text()
    (header,) = re.findall(r"^# header: (.*)$", text, re.M)
    parts = re.findall(r"^# part (\w+)\n((?:[0-9a-f]+\n)*)", text, re.M)
    assert [name for name, _ in parts] == sorted(json.loads(header)[1])
    data = b"".join(bytes.fromhex(rows) for _, rows in parts)
    assert vector(path) == seal(json.loads(header), data, version=2)
    assert vector(path)[24:].startswith(header.encode("ascii"))


def test_vectors_that_are_updates() -> None:
    found = {path.stem: decode_update(vector(path), 4000) for path in FILES if "base" in SAMPLES[path.stem][0]}
    assert {name: update.channels for name, update in found.items()} == {
        "foreign_name": ("delta",),
        "top_k_sign": ("delta",),
        "two_channels": ("delta", "control"),
        "update": ("delta",),
    }
    assert all(encode_update(found[name]) == vector(FOLDER / f"{name}.hex") for name in found)


def test_the_vector_of_the_parameters() -> None:
    frame = vector(FOLDER / "params.hex")
    found = decode_params(frame, num_coordinates=4)
    assert (found.against, found.channels) == (None, ("params",))
    assert hashlib.sha256(cut(frame)[1]).hexdigest()[:16] == found.digest
    assert encode_params(found) == frame


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_vector_is_what_the_documentation_says(path: Path) -> None:
    words, parts = read_plainly(vector(path))
    expected_words, expected = SAMPLES[path.stem]
    assert words == expected_words
    for name, part in expected.items():
        array = part.values if isinstance(part, Symbols) else part.positions if isinstance(part, Indices) else part
        np.testing.assert_array_equal(np.array(parts[name], array.dtype), array.reshape(-1))


def test_the_example_of_the_documentation() -> None:
    page = (ROOT / "docs" / "wire-format.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (dump,) = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {
        "np": np,
        "Indices": Indices,
        "Symbols": Symbols,
        "Update": Update,
        "encode_update": encode_update,
    }
    exec(code, names)
    rows = re.findall(r"^ *(\d+)  ((?:[0-9a-f]{2} ?)+)", dump, re.M)
    assert b"".join(bytes.fromhex(row) for _, row in rows) == names["frame"]
    starts = [sum(len(bytes.fromhex(row)) for _, row in rows[:i]) for i in range(len(rows))]
    assert [int(start) for start, _ in rows] == starts
    assert f"{max_update_bytes(199_210):,}" in page
