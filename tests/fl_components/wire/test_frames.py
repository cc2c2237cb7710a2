"""Frames: what is encoded is decoded bit for bit, and what is no frame is refused and never anything worse."""

from __future__ import annotations

import io
import math
import pickle
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedrounds.fl_components.arrays import Payload
from fedrounds.fl_components.errors import UpdateRejected, WireError
from fedrounds.fl_components.wire import (
    Download,
    Update,
    decode_frame,
    decode_params,
    decode_update,
    encode_frame,
    encode_params,
    encode_update,
    max_update_bytes,
    raw_update_bytes,
    read_frame,
)
from tests.support import cases

from .samples import FRAMES, SAMPLES, VA, altered, cut, decoded_or_refused, indices, same, seal, symbols

MAX_BYTES = 100_000
BASE = "0123456789abcdef"
FRAME = FRAMES["top_k_sign"]
D = 199_210
CAP = max_update_bytes(D)
FOUR_ZEROS: Payload = {"values": np.zeros(4, np.float32)}

GOOD_CHANNELS = [("delta",), ("delta", "control"), ("_",), tuple("abcdefghij"), ("a" * 40,), ("z" * 40,) * 10]
BAD_CHANNELS = [
    "",
    ",",
    "delta,",
    ",delta",
    "delta,,control",
    "delta, control",
    "Delta",
    "DELTA",
    "delta2",
    "delta-control",
    "delta\n",
    "d\u00e9lta",
    "a" * 41,
    "delta," + "a" * 41,
    ",".join("abcdefghijk"),
]


def refused(frame: bytes, why: str, max_bytes: int = MAX_BYTES) -> None:
    with pytest.raises(WireError, match=why):
        decode_frame(frame, max_bytes)
    with pytest.raises(UpdateRejected, match=rf"undecodable: .*{why}"):
        decode_update(frame, max_bytes)


class TestFrames:
    @pytest.mark.parametrize("name", SAMPLES)
    def test_there_and_back(self, name: str) -> None:
        words, parts = decode_frame(FRAMES[name], MAX_BYTES)
        assert words == SAMPLES[name][0]
        assert list(parts) == sorted(SAMPLES[name][1])
        assert all(same(parts[each], SAMPLES[name][1][each]) for each in parts)
        assert encode_frame(words, parts) == FRAMES[name]

    @given(
        words=st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=3),
        names=st.lists(st.text(max_size=20), unique=True, max_size=5),
        seed=st.integers(0, 2**32),
    )
    def test_any_words_and_names(self, words: dict[str, str], names: list[str], seed: int) -> None:
        rng = np.random.default_rng(seed)
        parts = {name: rng.integers(0, 100, rng.integers(0, 9)).astype(np.int16) for name in names}
        frame = encode_frame(words, parts)
        found_words, found = decode_frame(frame, MAX_BYTES)
        assert (found_words, found.keys()) == (words, parts.keys())
        assert all(same(found[name], parts[name]) for name in names)
        backwards = {name: parts[name] for name in reversed(names)}
        assert encode_frame(dict(reversed(words.items())), backwards) == frame

    def test_what_it_adds_to_the_coded_bytes(self) -> None:
        """1 % of 199,210, a sign each and one scale."""
        rng = np.random.default_rng(0)
        coded = {
            "indices": indices(np.sort(rng.choice(D, 1992, replace=False)), D),
            "symbols": symbols(1, rng.integers(0, 2, 1992)),
            "scale": np.ones(1, np.float32),
        }
        frame = encode_update(Update("client-0042", "ab" * 32, ("delta",), coded))
        data_bytes = len(cut(frame)[1])
        assert 2000 + 249 + 4 <= data_bytes <= 2040 + 249 + 4
        assert len(frame) - data_bytes <= 200

    def test_arrays_are_views_of_the_frame(self) -> None:
        frame = bytearray(FRAMES["update"])
        found = decode_frame(frame, MAX_BYTES)[1]["values"]
        assert isinstance(found, np.ndarray)
        assert found[0] == 0.5
        frame[-12:-8] = np.float32(2.0).tobytes()
        assert found[0] == 2.0
        with pytest.raises(ValueError, match="read-only"):
            found[0] = 1

    def test_a_header_that_would_be_too_long_is_not_written(self) -> None:
        with pytest.raises(WireError, match="the header would have 5360 bytes, at most 5296"):
            encode_frame({"client": "a" * 5338}, {})

    def test_an_array_that_cannot_travel_is_not_written(self) -> None:
        with pytest.raises(WireError, match="arrays of 'b1' do not travel"):
            encode_frame({}, {"mask": np.zeros(3, bool)})


class TestWhatIsNoFrame:
    @pytest.mark.parametrize("name", FRAMES)
    def test_every_truncation(self, name: str) -> None:
        for length in range(len(FRAMES[name])):
            assert decoded_or_refused(FRAMES[name][:length], MAX_BYTES) is None

    @pytest.mark.parametrize("more", [b"\0", b" ", b"x" * 8, FRAME], ids=["null", "space", "eight", "frame"])
    def test_something_behind_it(self, more: bytes) -> None:
        refused(FRAME + more, f"the frame has {len(FRAME + more)} bytes and declares {len(FRAME)}")

    def test_every_flipped_bit(self) -> None:
        for position in range(8 * len(FRAME)):
            frame = bytearray(FRAME)
            frame[position // 8] ^= 1 << position % 8
            assert decoded_or_refused(bytes(frame), MAX_BYTES) is None

    @pytest.mark.ci
    def test_every_other_value_of_every_byte(self) -> None:
        for position in range(len(FRAME)):
            for value in range(256):
                if value != FRAME[position]:
                    frame = FRAME[:position] + bytes([value]) + FRAME[position + 1 :]
                    assert decoded_or_refused(frame, MAX_BYTES) is None

    @settings(max_examples=cases(1000), deadline=None)
    @given(
        edits=st.lists(
            st.tuples(st.integers(0, len(FRAME)), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4
        )
    )
    def test_any_other_damage(self, edits: list[tuple[int, int, bytes]]) -> None:
        frame = FRAME
        for start, length, replacement in edits:
            frame = frame[:start] + replacement + frame[start + length :]
        assert (decoded_or_refused(frame, MAX_BYTES) is None) == (frame != FRAME)

    @settings(max_examples=cases(1000), deadline=None)
    @given(data=st.binary(max_size=60))
    @example(b"")
    def test_any_bytes(self, data: bytes) -> None:
        assert decoded_or_refused(data, MAX_BYTES) is None
        assert decoded_or_refused(FRAME[:4] + data, MAX_BYTES) is None

    @pytest.mark.parametrize("data", [pickle.dumps("va" * 20), b"PK\x03\x04" * 50, b'{"client":"va"}' * 5])
    def test_other_formats(self, data: bytes) -> None:
        refused(data, "this does not begin as a frame")

    def test_other_versions(self) -> None:
        for version in (0, 1, 3, 255):
            why = f"the frame is of version {version} of the format; version 2 is read here"
            refused(seal([{}, {}], version=version), why)

    def test_declared_sizes(self) -> None:
        for header_bytes, data_bytes, why in [
            (5297, 0, "the header has 5297 bytes, at most 5296"),
            (2**32 - 1, 0, "the header has 4294967295 bytes"),
            (8, MAX_BYTES - 31, "the frame declares 100001 bytes, at most 100000 are allowed"),
            (8, 2**64 - 1, "the frame declares 18446744073709551647 bytes"),
            (8, 1, "the frame has 32 bytes and declares 33"),
        ]:
            frame = seal([{}, {}])
            frame = frame[:4] + header_bytes.to_bytes(4, "little") + data_bytes.to_bytes(8, "little") + frame[16:]
            refused(frame, why)


ZEROS = zstandard.compress(bytes(1000))
SKIPPED = b"\x50\x2a\x4d\x18"


def forged(size: int, *runs: int, window_log: int | None = None) -> bytes:
    """A frame of zstandard's that declares `size` bytes, and holds runs of zeros of these lengths."""
    descriptor = bytes([0b10_1_00000]) if window_log is None else bytes([0b10_0_00000, (window_log - 10) << 3])
    blocks = [run << 3 | 1 << 1 | (number == len(runs) - 1) for number, run in enumerate(runs)]
    return b"".join(
        [b"\x28\xb5\x2f\xfd", descriptor, size.to_bytes(4, "little")]
        + [block.to_bytes(3, "little") + b"\0" for block in blocks]
    )


@pytest.mark.timeout(60)
class TestMaliciousSenders:
    """The checksum is right: what is refused is refused for what it says."""

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"\xff" * 8,
            b"null",
            b"3",
            b'"text"',
            b"[{},{}",
            b"[" * 5000,
            b'{"a":' * 1000,
            b"9" * 5000,
            b"[{},NaN]",
            b'[{"client":"\xff"},{}]',
            '[{"client":"\u00fc"},{}]'.encode(),
            '[{"client":"va"},{}]'.encode("utf-16"),
        ],
        ids=lambda header: repr(header[:20]),
    )
    def test_a_header_that_is_no_json(self, header: bytes) -> None:
        refused(seal(header), "the header is (not JSON|not canonical JSON|not a list of words and parts)")

    @pytest.mark.parametrize(
        "header",
        [
            b"[{}, {}]",
            b" [{},{}]",
            b"[{},{}]",
            b"[{},{}]" + b" " * 9,
            b"[{},{}]\n",
            b'[{"b":"","a":""},{}]    ',
            b'[{"a":"","a":""},{}]    ',
            b'[{"a":"\\u0061"},{}]     ',
            b'[{"a":"\\u00FC"},{}]     ',
            b'[{},{"a":["bits",01,1]}]',
            b'[{},{"a":["bits",1e0,1]}] ',
        ],
    )
    def test_json_that_is_not_canonical(self, header: bytes) -> None:
        refused(seal(header), "the header is not (canonical )?JSON")

    @pytest.mark.parametrize(
        "header",
        [
            [],
            {},
            [{}],
            [{}, {}, {}],
            [[], {}],
            [{}, []],
            [{"a": 1}, {}],
            [{"a": None}, {}],
            [{"a": {}}, {}],
            [{}, None],
        ],
        ids=repr,
    )
    def test_json_that_is_no_header(self, header: Any) -> None:
        refused(seal(header), "the header is not a list of words and parts")

    @pytest.mark.parametrize(
        ("entry", "data", "why"),
        [
            (None, b"", "begins with the name of a coding"),
            ([], b"", "begins with the name of a coding"),
            ([3], b"", "begins with the name of a coding"),
            ("raw", b"", "begins with the name of a coding"),
            (["pickle", 1], b"", "there is no coding 'pickle'"),
            (["\x1b[31m" * 9], b"", "there is no coding '\\x1b"),
            (["raw", "f4"], b"", "an entry of raw has 3 items, not 2"),
            (["raw", "f4", [1], 4], bytes(4), "an entry of raw has 3 items, not 4"),
            (["raw", "b1", [1]], bytes(1), "arrays of 'b1' do not travel"),
            (["raw", "O8", [1]], bytes(8), "arrays of 'O8' do not travel"),
            (["raw", ">f4", [1]], bytes(4), "arrays of '>f4' do not travel"),
            (["raw", 4, [1]], bytes(4), "arrays of 4 do not travel"),
            (["raw", ["f4"], [1]], bytes(4), "do not travel"),
            (["raw", "f4", 1], bytes(4), "a shape is a list of up to 8 numbers"),
            (["raw", "f4", [1] * 9], bytes(4), "a shape is a list of up to 8 numbers"),
            (["raw", "f4", [-1]], b"", "a length in a shape cannot be -1"),
            (["raw", "f4", [True]], bytes(4), "a length in a shape must be a whole number"),
            (["raw", "f4", [1.0]], bytes(4), "a length in a shape must be a whole number"),
            (["raw", "f4", [2]], bytes(4), "the parts do not take the 4 bytes"),
            (["raw", "f4", [1]], bytes(5), "the parts do not take the 5 bytes"),
            (["raw", "f4", [2**63]], bytes(4), "the parts do not take the 4 bytes"),
            (["raw", "f4", [2**32, 2**32]], b"", "the parts do not take the 0 bytes"),
            (["raw", "f4", [0, 2**62]], b"", "the parts would take more than 300000 bytes of memory"),
            (["bits", -1, 1], b"", "a count cannot be -1"),
            (["bits", "9", 1], bytes(2), "a count must be a whole number"),
            (["bits", 9, 0], b"", "bits cannot be 0"),
            (["bits", 9, 17], bytes(20), "bits cannot be 17"),
            (["bits", 9, True], bytes(2), "bits must be a whole number"),
            (["bits", 2**62, 1], b"", "the parts do not take the 0 bytes"),
            (["bits", 10**40, 1], b"", "the parts do not take the 0 bytes"),
            (["bits", 9, 1], b"\0\x02", "bits that fill up the last byte are not zero"),
            (["bits", 3, 3], b"\0\x02", "bits that fill up the last byte are not zero"),
            (["bits", 1, 4], b"\x10", "bits that fill up the last byte are not zero"),
            (["bits", 1, 12], b"\0\x10", "bits that fill up the last byte are not zero"),
            (["gaps", 2, 10, 33], bytes(9), "bits cannot be 33"),
            (["gaps", 11, 10, 0], b"", "a count cannot be 11"),
            (["gaps", 1, 2**32 + 1, 0], b"", "a bound cannot be 4294967297"),
            (["gaps", 2, 10, 4], b"\x45", "a position is not below 10"),
            (["gaps", 3, 10, 2], b"\xc0", "bits that fill up the last byte are not zero"),
            (["gaps", 10**6, 2**32, 0], b"", "the parts would take more than 300000 bytes of memory"),
            (["gaps", 2**32, 2**32, 0], b"", "the parts would take more than 300000 bytes of memory"),
            (["rice", 0, 10, 0, 0], b"", "a count cannot be 0"),
            (["rice", 1, 10, 33, 1], bytes(6), "bits cannot be 33"),
            (["rice", 8, 100, 0, 4], bytes(4), "the unary bytes cannot be 4"),
            (["rice", 9, 100, 0, 1], bytes(1), "the unary bytes cannot be 1"),
            (["rice", 2, 100, 0, 1], b"\x01", "the unary part ends 1 gaps, not 2"),
            (["rice", 2, 100, 0, 1], b"\x07", "the unary part ends 3 gaps, not 2"),
            (["rice", 3, 100, 0, 2], b"\x07\0", "the unary part goes on behind its last gap"),
            (["rice", 2, 7, 1, 1], b"\x88\0", "a position is not below 7"),
            (["rice", 2, 9, 2, 1], b"\x05\x0e", "a position is not below 9"),
            (["rice", 2, 2**32, 32, 1], b"\x06" + bytes(8), "a position is not below 4294967296"),
            (["rice", 2, 9, 1, 1], b"\x05\xfc", "bits that fill up the last byte are not zero"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_an_entry_that_makes_no_sense(self, entry: Any, data: bytes, why: str) -> None:
        frame = seal([VA, {"part": entry}], data)
        with pytest.raises(WireError) as caught:
            decode_frame(frame, MAX_BYTES)
        assert why in caught.value.message
        assert caught.value.message.isprintable()
        with pytest.raises(UpdateRejected, match="undecodable: "):
            decode_update(frame, MAX_BYTES)

    @pytest.mark.parametrize(
        ("bits", "count", "data", "why"),
        [
            (8, 1000, b"\x28\xb5\x2f\xfd", "this is not what zstandard writes"),
            (8, 1000, b"not zstandard", "this is not what zstandard writes"),
            (8, 1000, ZEROS[:-1], "this is not what zstandard writes"),
            (8, 1000, ZEROS + b"x", "this is not what zstandard writes"),
            (8, 1000, ZEROS + ZEROS, "this is not what zstandard writes"),
            (8, 1000, zstandard.compress(bytes(500)) * 2, "zstandard would write 500 bytes, not 1000"),
            (8, 1000, zstandard.compress(bytes(999)), "zstandard would write 999 bytes, not 1000"),
            (8, 1000, forged(2**32 - 1, *[131072] * 200), "zstandard would write 4294967295 bytes, not 1000"),
            (8, 1000, forged(1000, 131072), "this is not what zstandard writes"),
            (8, 1000, forged(1000, 1000, 131072), "this is not what zstandard writes"),
            (8, 1000, forged(1000, 999), "this is not what zstandard writes"),
            (8, 1000, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)), "would write"),
            (8, 1000, SKIPPED + (50).to_bytes(4, "little") + bytes(50), "zstandard"),
            (8, 1000, SKIPPED + (1000).to_bytes(4, "little") + bytes(50), "zstandard"),
            (3, 1000, zstandard.compress(b"\x08" * 500), "there is a symbol of more than 3 bits"),
            (9, 1000, zstandard.compress(bytes(1000)), "zstandard would write 1000 bytes, not 1125"),
            (12, 1000, zstandard.compress(bytes(1499)), "zstandard would write 1499 bytes, not 1500"),
            (12, 999, zstandard.compress(bytes(1498) + b"\x10"), "bits that fill up the last byte are not zero"),
            (1, 999, zstandard.compress(bytes(124) + b"\x80"), "bits that fill up the last byte are not zero"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_something_else_than_zstandard_would_write(self, bits: int, count: int, data: bytes, why: str) -> None:
        refused(seal([VA, {"a": ["zstd", count, bits, len(data)]}], data), why)

    def test_zstandard_where_it_is_not_shorter(self) -> None:
        data = zstandard.compress(bytes(range(50)))
        refused(seal([VA, {"a": ["zstd", 50, 8, len(data)]}], data), "what zstandard wrote, in bytes cannot be")

    def test_a_window_larger_than_all_that_it_holds(self) -> None:
        data = forged(1000, 1000, window_log=27)
        assert zstandard.decompress(data) == bytes(1000)
        refused(seal([VA, {"a": ["zstd", 1000, 8, len(data)]}], data), "look back 134217728 bytes, at most 1024")

    @pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.ci)])
    def test_altered_frames(self, count: int) -> None:
        rng, names = random.Random(0), sorted(FRAMES)
        taken = 0
        for number in range(count):
            frame = altered(rng, FRAMES[names[number % len(names)]])
            taken += decoded_or_refused(frame, 4096) is not None
        assert count / 20 < taken < count / 2  # some changes make another good frame

    @pytest.mark.parametrize(
        "entry",
        [
            ["gaps", 3 * CAP // 8, 2**32, 0],
            ["gaps", 3 * CAP // 8, 2**32, 20],
            ["rice", 3 * CAP // 8, 2**32, 20, -(-3 * CAP // 64)],
            ["bits", 2 * CAP, 3],
            ["bits", CAP // 2 - 100, 16],
            ["zstd", 3 * CAP, 1, 0],
            ["zstd", 3 * CAP, 3, 0],
            ["zstd", 3 * CAP // 2, 11, 0],
            ["zstd", 3 * CAP // 2, 16, 0],
        ],
        ids=lambda entry: f"{entry[0]}-{entry[-2]}",
    )
    def test_memory(self, entry: list[Any]) -> None:
        """The most that fits: decoding takes at most ten times what a frame may be long."""
        coding, count, bits = entry[0], entry[1], entry[2]
        if coding == "zstd":
            width = bits // 8 * 8 + {0: 0, 1: 1, 3: 4}[bits % 8]
            data = zstandard.compress(bytes(-(-count * width // 8)))
            entry[-1] = len(data)
        elif coding == "rice":
            ends = np.zeros(8 * entry[-1], np.uint8)
            ends[-count:] = 1
            data = np.packbits(ends, bitorder="little").tobytes() + bytes(-(-count * entry[3] // 8))
        else:
            data = bytes(-(-count * entry[-1] // 8))
        frame = seal([{}, {"a": entry}], data)
        assert len(frame) <= CAP
        tracemalloc.start()
        try:
            decode_frame(frame, CAP)
            assert tracemalloc.get_traced_memory()[1] < 10 * CAP
        finally:
            tracemalloc.stop()

    def test_a_declared_size_that_is_refused_costs_nothing(self) -> None:
        frames = [
            seal([{}, {"a": ["gaps", 2**32, 2**32, 0]}]),
            seal([{}, {f"{name}": ["gaps", 2 * CAP // 8, 2**32, 0] for name in range(100)}]),
            seal([{}, {"a": ["raw", "f4", [0, 2**40]]}]),
            seal([{}, {"a": ["zstd", 2**40, 8, 20]}], bytes(20)),
        ]
        for frame in frames:
            tracemalloc.start()
            try:
                with pytest.raises(WireError):
                    decode_frame(frame, CAP)
                assert tracemalloc.get_traced_memory()[1] < 100_000
            finally:
                tracemalloc.stop()


class TestUpdates:
    def test_there_and_back(self) -> None:
        update = Update("va", "ab" * 32, ("delta", "control"), SAMPLES["top_k_sign"][1])
        found = decode_update(encode_update(update), MAX_BYTES)
        assert (found.client_id, found.base_digest, found.channels) == ("va", "ab" * 8, ("delta", "control"))
        assert all(same(found.parts[name], part) for name, part in update.parts.items())
        assert encode_update(found) == encode_update(update)

    @given(client_id=st.text(max_size=100))
    def test_any_name(self, client_id: str) -> None:
        assert decode_update(encode_update(Update(client_id, BASE, ("delta",), {})), MAX_BYTES).client_id == client_id

    @pytest.mark.parametrize("channels", GOOD_CHANNELS, ids=repr)
    def test_any_channels(self, channels: tuple[str, ...]) -> None:
        assert decode_update(encode_update(Update("va", BASE, channels, {})), MAX_BYTES).channels == channels

    @pytest.mark.parametrize("channels", BAD_CHANNELS, ids=repr)
    def test_text_that_names_no_channels(self, channels: str) -> None:
        with pytest.raises(UpdateRejected, match="undecodable: an update names its client, its channels and 16 hex"):
            decode_update(seal([VA | {"channels": channels}, {}]), MAX_BYTES)

    @settings(max_examples=cases(300), deadline=None)
    @given(
        client_id=st.text(max_size=100)
        | st.text(st.characters(max_codepoint=0x7F), max_size=100)
        | st.text(st.characters(min_codepoint=0x10000), max_size=100),
        channels=st.lists(st.from_regex(r"[a-z_]{1,40}", fullmatch=True), min_size=1, max_size=10),
        num_coordinates=st.integers(0, 20) | st.sampled_from([99, 100, 999, 1000, 99_999, 100_000]),
        base_digest=st.text("0123456789abcdef", min_size=64, max_size=64),
        value=st.floats(width=32),
    )
    @example("ward 7", ["delta"], D, "0" * 64, 0.0)
    @example('"\\\x00\x1f\x7f/\n', ["delta", "control"], 9, BASE * 4, math.nan)
    @example("a" * 100, ["delta"], 10, BASE * 4, 1.0)
    @example("\U0001d49c" * 100, ["_" * 40] * 10, 0, "f" * 64, -0.0)
    def test_the_length_of_a_raw_update_is_known_without_it(
        self, client_id: str, channels: list[str], num_coordinates: int, base_digest: str, value: float
    ) -> None:
        values_M = np.full(num_coordinates, value, np.float32)
        frame = encode_update(Update(client_id, base_digest, tuple(channels), {"values": values_M}))
        assert raw_update_bytes(client_id, channels, num_coordinates) == len(frame)
        assert len(frame) <= max_update_bytes(num_coordinates)
        assert decode_update(frame, len(frame)).channels == tuple(channels)

    def test_a_frame_that_is_too_long_is_not_even_read(self) -> None:
        assert decode_update(FRAME, len(FRAME)).client_id == "va"
        with pytest.raises(UpdateRejected, match=rf"too_large: {len(FRAME)} bytes, at most {len(FRAME) - 1}"):
            decode_update(FRAME, len(FRAME) - 1)

    def test_the_longest_frame_that_an_update_needs(self) -> None:
        assert max_update_bytes(1000) == 24 + 4096 + 1200 + 4000 + 125
        name = "\U0001d49c" * 100  # the longest: letters that JSON escapes twice each
        for positions in (range(1000), range(1, 1000), range(0, 1000, 2), [*range(500), 999], [999]):
            parts = {
                "indices": indices(positions, 1000),
                "values": np.ones(len(positions), np.float32),
            }
            frame = encode_update(Update(name, BASE, GOOD_CHANNELS[-1], parts))
            assert len(frame) <= max_update_bytes(1000)
            decode_update(frame, max_update_bytes(1000))

    @pytest.mark.parametrize(
        "words",
        [
            {},
            {"client": "va"},
            {"base": BASE},
            {"channels": "delta"},
            {"client": "va", "base": BASE},
            {"client": "va", "channels": "delta"},
            {"base": BASE, "channels": "delta"},
            VA | {"more": ""},
            VA | {"base": ""},
            VA | {"base": BASE[:-1]},
            VA | {"base": BASE + "0"},
            VA | {"base": BASE.upper()},
            VA | {"base": BASE[:-1] + "\n"},
            VA | {"base": BASE[:-1] + "\u0660"},
        ],
        ids=repr,
    )
    def test_words_that_are_not_those_of_an_update(self, words: dict[str, str]) -> None:
        with pytest.raises(UpdateRejected, match="undecodable: an update names its client, its channels and 16 hex"):
            decode_update(encode_frame(words, {}), MAX_BYTES)


class TestParams:
    @pytest.mark.parametrize("against", [None, "f" * 64])
    def test_every_client_starts_from_the_same_bits(self, against: str | None) -> None:
        params_D = np.array([0.1, -0.0, 1e-45, 3e38], np.float32)
        channels = ("params", "control")
        frame = encode_params(Download(BASE + "0" * 48, against, channels, {"values": params_D}))
        found = decode_params(frame, 4)
        assert (found.digest, found.against, found.channels) == (BASE, against and against[:16], channels)
        assert found.parts.keys() == {"values"} and found.parts["values"].tobytes() == params_D.tobytes()  # type: ignore[union-attr]
        assert len(encode_params(Download(BASE, against, channels, {"values": np.zeros(4, np.float32)}))) == len(frame)

    @pytest.mark.parametrize(
        "frame",
        [
            encode_params(Download(BASE, None, ("params",), FOUR_ZEROS))[:-1],
            encode_params(Download(BASE, None, ("params",), {"values": np.zeros(10_000, np.float32)})),
            b"",
        ],
        ids=["truncated", "too long", "empty"],
    )
    def test_other_frames_are_refused(self, frame: bytes) -> None:
        with pytest.raises(WireError):
            decode_params(frame, 4)

    @pytest.mark.parametrize(
        "words",
        [
            {},
            {"params": BASE},
            {"channels": "params"},
            {"channels": "params", "against": BASE},
            {"channels": "params", "params": BASE, "a": "b"},
            {"channels": "params", "params": BASE[:-1]},
            {"channels": "params", "params": BASE, "against": "x" * 16},
            *({"channels": channels, "params": BASE} for channels in BAD_CHANNELS),
        ],
        ids=repr,
    )
    def test_words_that_are_not_those_of_parameters(self, words: dict[str, str]) -> None:
        with pytest.raises(WireError, match="parameters name their channels and 16 hex digits of themselves"):
            decode_params(encode_frame(words, FOUR_ZEROS), 4)

    @pytest.mark.parametrize("channels", GOOD_CHANNELS, ids=repr)
    def test_any_channels(self, channels: tuple[str, ...]) -> None:
        assert decode_params(encode_params(Download(BASE, None, channels, FOUR_ZEROS)), 4).channels == channels


class Slowly(io.RawIOBase):
    """A stream that gives a few bytes at a time, and counts them."""

    def __init__(self, data: bytes, step: int) -> None:
        self.data, self.step, self.given = data, step, 0

    def readinto(self, buffer: Any) -> int:
        piece = self.data[self.given : self.given + min(self.step, len(buffer))]
        buffer[: len(piece)] = piece
        self.given += len(piece)
        return len(piece)


class TestStreams:
    @pytest.mark.parametrize("step", [1, 7, 10_000])
    def test_one_frame_after_the_other(self, step: int) -> None:
        stream = Slowly(b"".join(FRAMES.values()), step)
        for name, frame in FRAMES.items():
            assert read_frame(stream, MAX_BYTES) == frame, name
        with pytest.raises(WireError, match="the stream ends within a frame"):
            read_frame(stream, MAX_BYTES)

    def test_what_comes_too_short(self) -> None:
        for length in (0, 1, 23, 24, 100, len(FRAME) - 1):
            with pytest.raises(WireError, match="the stream ends within a frame"):
                read_frame(io.BytesIO(FRAME[:length]), MAX_BYTES)

    @pytest.mark.parametrize(
        ("prefix", "why"),
        [
            (b"PK\x03\x04" * 6, "this does not begin as a frame"),
            (FRAME[:3] + b"\x01" + FRAME[4:24], "version 1"),
            (FRAME[:4] + b"\xff" * 4 + FRAME[8:24], "the header has 4294967295 bytes"),
            (FRAME[:8] + b"\xff" * 8 + FRAME[16:24], "bytes, at most 100000 are allowed"),
        ],
        ids=["magic", "version", "header", "data"],
    )
    def test_nothing_is_read_of_what_is_refused(self, prefix: bytes, why: str) -> None:
        stream = Slowly(prefix + bytes(1000), 10_000)
        tracemalloc.start()
        try:
            with pytest.raises(WireError, match=why):
                read_frame(stream, MAX_BYTES)
            assert tracemalloc.get_traced_memory()[1] < 50_000
        finally:
            tracemalloc.stop()
        assert stream.given == 24
