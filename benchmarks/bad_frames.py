"""Frames that are to be refused, and how long and how much memory that takes: the hostile half of codecs.py."""

from __future__ import annotations

import hashlib
import json
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import zstandard

from benchmarks.peers.tables import aligned
from fedrounds.fl_components.admission import Admission, RoundAdmission
from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.layout import DELTA, Layout
from fedrounds.fl_components.server.encoding import Codec
from fedrounds.fl_components.values import ClientTask, RoundPlan
from fedrounds.fl_components.wire import decode_update, encode_update, max_update_bytes
from fedrounds.fl_components.wire.frames import (
    ALIGNMENT_BYTES,
    CHECKSUM_BYTES,
    MAGIC,
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    START,
    VERSION,
)

LIMIT_MS = 50.0
TRIES = 3  # of which the least counts: what else the machine does can only make one longer
HEADER = ("what is wrong", "frames", "refused", "largest ms", "peak MB", "longest frame MB", "under 50 ms")


@dataclass(frozen=True)
class Receiver:
    """A server that waits for one client's update, and the good frame that comes."""

    codec: Codec
    plan: RoundPlan
    task: ClientTask
    frame: bytes

    @classmethod
    def of(cls, codec: Codec, plan: RoundPlan, task: ClientTask, delta_D: Float32) -> Receiver:
        return cls(codec, plan, task, codec.encode(plan, [task], delta_D[None])[0][0])

    def refuses(self, frame: bytes) -> bool:
        return bool(self.codec.decode(self.plan, [self.task], [frame], RoundAdmission(Admission()))[1])

    @property
    def cap(self) -> int:
        return max_update_bytes(self.codec.layout.size)

    @property
    def header(self) -> tuple[dict[str, str], dict[str, list[Any]]]:
        words, entries = json.loads(cut(self.frame)[0])
        return words, entries


Bad = Iterator[tuple[Receiver, bytes]]


def bad_input(codecs: Mapping[str, Codec], plan: RoundPlan, task: ClientTask, delta_D: Float32, *, quick: bool) -> str:
    """A table: for each kind of bad frame how many were tried and refused, the longest that one took, and the most
    memory that was held for one beside the frame (of what Python and numpy allocate)."""
    large = [Receiver.of(codec, plan, task, delta_D) for codec in codecs.values()]
    rule = codecs["top_k 1 %, signs"].rule.model_copy(update={"fraction": 0.1})
    small = Receiver.of(
        replace(large[0].codec, rule=rule, layout=Layout((DELTA,), ((200,),))), plan, task, delta_D[:200]
    )
    places, few = (2, 5) if quick else (40, None)
    kinds: dict[str, Callable[[], Bad]] = {
        f"small frame ({len(small.frame)} bytes), any byte changed": lambda: _flips([small], few, sealed=False),
        "small frame, any byte changed, checksum right": lambda: _flips([small], few, sealed=True),
        "small frame, cut off anywhere": lambda: _cuts([small], few, sealed=False),
        "small frame, cut off anywhere, checksum right": lambda: _cuts([small], few, sealed=True),
        "whole frame, a byte changed": lambda: _flips(large, places, sealed=False),
        "whole frame, a byte changed, checksum right": lambda: _flips(large, places, sealed=True),
        "whole frame, cut off": lambda: _cuts(large, places, sealed=False),
        "whole frame, cut off, checksum right": lambda: _cuts(large, places, sealed=True),
        "declares more than is allowed": lambda: _declared(large[0]),
        "decodes to as much as is allowed": lambda: _most(large[0]),
        "zstandard that holds more than it should": lambda: _bombs(large[0]),
        "a deep or huge header": lambda: _headers(large[0]),
        "NaN and infinity": lambda: _not_finite(large),
        "indices out of range, or twice": lambda: _indices(large[list(codecs).index("top_k 1 %, signs")]),
    }
    for receiver in (*large, small):
        assert not receiver.refuses(receiver.frame)
    before_mb = _peak_rss_mb()
    rows = [_row(name, kind) for name, kind in kinds.items()]
    grown_mb = _peak_rss_mb() - before_mb
    rows.append(_row("100 updates long", lambda: _long(large[0])))  # these take memory to be made
    return (
        f"Bad frames: {small.cap / 1e6:.3f} (small) or {large[0].cap / 1e6:.3f} MB at most. The most memory that this "
        f"process ever held grew by {grown_mb:.1f} MB in all but the last line.\n\n{aligned([HEADER, *rows])}"
    )


def _row(name: str, kind: Callable[[], Bad]) -> list[str]:
    tried = refused = 0
    largest_s, peak, longest = 0.0, 0, 0
    for receiver, frame in kind():
        seconds = []
        for _ in range(TRIES):
            began = time.perf_counter()
            found = receiver.refuses(frame)
            seconds.append(time.perf_counter() - began)
        largest_s = max(largest_s, min(seconds))
        tracemalloc.start()
        receiver.refuses(frame)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        tried, refused, longest = tried + 1, refused + found, max(longest, len(frame))
    met = "yes" if 1000 * largest_s < LIMIT_MS else "NO"
    return [name, str(tried), str(refused), f"{1000 * largest_s:.2f}", f"{peak / 1e6:.2f}", f"{longest / 1e6:.2f}", met]


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seal(header: Any, data: bytes = b"") -> bytes:
    """A frame with the right lengths and checksum, whatever the header (JSON, or bytes as they are) and data are."""
    if not isinstance(header, bytes):
        header = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        header += b" " * (-(PREFIX_BYTES + len(header)) % ALIGNMENT_BYTES)
    start: bytes = START.pack(MAGIC, VERSION, len(header), len(data))
    checksum = hashlib.sha256(start + header + data).digest()[:CHECKSUM_BYTES]
    return b"".join([start, checksum, header, data])


def cut(frame: bytes) -> tuple[bytes, bytes]:
    """Header and data."""
    end = PREFIX_BYTES + START.unpack_from(frame)[2]
    return frame[PREFIX_BYTES:end], frame[end:]


def _places(frame: bytes, places: int | None) -> list[int]:
    """All, or so many of the prefix, of the header and of the data."""
    if places is None:
        return list(range(len(frame)))
    edges = 0, PREFIX_BYTES, len(frame) - len(cut(frame)[1]), len(frame)
    found = [np.linspace(start, stop - 1, places).astype(int).tolist() for start, stop in pairwise(edges)]
    return sorted({place for each in found for place in each})


def _flips(receivers: list[Receiver], places: int | None, *, sealed: bool) -> Bad:
    for receiver in receivers:
        for place in _places(receiver.frame, places):
            for change in (0xFF, 0x01):
                frame = bytearray(receiver.frame)
                frame[place] ^= change
                if not sealed:
                    yield receiver, bytes(frame)
                elif place >= PREFIX_BYTES:
                    header, _ = cut(receiver.frame)
                    end = PREFIX_BYTES + len(header)
                    yield receiver, seal(bytes(frame[PREFIX_BYTES:end]), bytes(frame[end:]))


def _cuts(receivers: list[Receiver], places: int | None, *, sealed: bool) -> Bad:
    for receiver in receivers:
        header, data = cut(receiver.frame)
        for length in _places(receiver.frame, places):
            if not sealed:
                yield receiver, receiver.frame[:length]
            elif length >= PREFIX_BYTES:
                left = (header + data)[: length - PREFIX_BYTES]
                yield receiver, seal(left[: len(header)], left[len(header) :])


def _declared(receiver: Receiver) -> Bad:
    header, data = cut(receiver.frame)
    for header_bytes, data_bytes in ((2**32 - 1, 0), (8, receiver.cap), (8, 2**64 - 1), (MAX_HEADER_BYTES, 2**40)):
        start = START.pack(MAGIC, VERSION, header_bytes, data_bytes)
        yield receiver, start + hashlib.sha256(start + header + data).digest()[:CHECKSUM_BYTES] + header + data
    words, _ = receiver.header
    entries: list[list[Any]] = [["gaps", 2**32, 2**32, 0], ["raw", "f4", [0, 2**40]], ["raw", "f4", [2**62]]]
    entries += [["zstd", 2**40, 8, len(data)], ["bits", 10**40, 1], ["rice", 2**30, 2**32, 0, 2**27]]
    for entry in entries:
        yield receiver, seal([words, {"delta": entry}], data)
    most = 3 * receiver.cap // 8
    yield receiver, seal([words, {f"{name}": ["gaps", most, 2**32, 0] for name in range(100)}])


def _most(receiver: Receiver) -> Bad:
    """Right in all but what the rule expects: refused only when everything is decoded."""
    words, cap = receiver.header[0], receiver.cap
    for bits in (1, 3, 8, 11, 16):
        count = 3 * cap // (1 if bits <= 8 else 2)
        width = {1: 1, 3: 4, 8: 8, 11: 12, 16: 16}[bits]
        data = zstandard.compress(bytes(-(-count * width // 8)))
        yield receiver, seal([words, {"delta": ["zstd", count, bits, len(data)]}], data)
    room = cap - MAX_HEADER_BYTES
    for count, bits in ((2 * room, 3), (room // 2, 16), (room, 7)):
        yield receiver, seal([words, {"delta": ["bits", count, bits]}], bytes(-(-count * bits // 8)))
    count = 3 * cap // 8
    for bits in (0, 16):
        yield receiver, seal([words, {"delta": ["gaps", count, 2**32, bits]}], bytes(-(-count * bits // 8)))
    unary = np.packbits(np.arange(8 * -(-count // 8)) >= -count % 8, bitorder="little").tobytes()
    entry = ["rice", count, 2**32, 16, len(unary)]
    yield receiver, seal([words, {"delta": entry}], unary + bytes(2 * count))


def _bombs(receiver: Receiver) -> Bad:
    words, size = receiver.header[0], receiver.codec.layout.size

    def forged(declared: int, *runs: int, window_log: int | None = None) -> bytes:
        """A frame of zstandard's that declares so many bytes, and holds runs of zeros of these lengths."""
        told = bytes([0b10_1_00000]) if window_log is None else bytes([0b10_0_00000, (window_log - 10) << 3])
        blocks = [run << 3 | 1 << 1 | (number == len(runs) - 1) for number, run in enumerate(runs)]
        start = b"\x28\xb5\x2f\xfd" + told + declared.to_bytes(4, "little")
        return start + b"".join(block.to_bytes(3, "little") + b"\0" for block in blocks)

    full = [131_072] * (size // 131_072), size % 131_072
    bombs = [
        zstandard.compress(bytes(10 * size)),
        forged(2**32 - 1, *[131_072] * 20_000),
        forged(size, *[131_072] * 20_000),
        forged(size, *full[0], full[1], 131_072),
        forged(size, *full[0], full[1], window_log=31),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10 * size)),
        b"\x50\x2a\x4d\x18" + (2**32 - 1).to_bytes(4, "little") + bytes(100),  # a part to be skipped
    ]
    for data in bombs:
        yield receiver, seal([words, {"delta": ["zstd", size, 8, len(data)]}], data)


def _headers(receiver: Receiver) -> Bad:
    most = MAX_HEADER_BYTES
    texts = [b"[" * most, b"[" * (most // 2) + b"]" * (most // 2), b'{"a":' * (most // 5), b"9" * most, b'"' * most]
    texts += [b'[{},{"a":["bits",' + b"9" * 4000 + b",1]}]", b"[" + b"{}," * 1700 + b"{}]", b"[{},NaN]", b"\xff" * most]
    texts += [b'[{"client":"' + b"\\u0000" * 860 + b'"},{}]', b"[1e999,{}]", b"[{}, {}]", b"[" * 900 + b"]" * 900]
    entries = {f"{name:03}": ["bits", 0, 1] for name in range(250)}
    others: list[Any] = [[{}, entries], [{}, {}], [{"a": {}}, {}], None]
    for header in (*texts, *others):
        yield receiver, seal(header)


def _not_finite(receivers: list[Receiver]) -> Bad:
    for receiver in receivers:
        update = decode_update(receiver.frame, receiver.cap)
        for name, part in update.parts.items():
            if isinstance(part, np.ndarray):
                for number in (np.nan, np.inf, -np.inf):
                    first, every = part.copy(), np.full_like(part, number)
                    first[:1] = number
                    for bad in (first, every):
                        changed = replace(update, parts={**update.parts, name: bad})
                        yield receiver, encode_update(changed)


def _indices(receiver: Receiver) -> Bad:
    words, entries = receiver.header
    _, data = cut(receiver.frame)
    name, count, bound, bits, unary_bytes = entries["indices"]
    assert name == "rice" and next(iter(entries)) == "indices"
    behind = data[unary_bytes + -(-count * bits // 8) :]
    for other in (count, bound - 1, bound + 1, 2**32):
        yield receiver, seal([words, entries | {"indices": [name, count, other, bits, unary_bytes]}], data)
    for width in (17, 32):
        ones = ((1 << count * width) - 1).to_bytes(-(-count * width // 8), "little") + behind
        yield receiver, seal([words, entries | {"indices": ["gaps", count, bound, width]}], ones)
        yield (
            receiver,
            seal([words, entries | {"indices": [name, count, bound, width, unary_bytes]}], data[:unary_bytes] + ones),
        )
    for places in (np.zeros(count, "<i8"), np.full(count, 2**62, "<i8"), np.arange(count)[::-1].astype("<i8")):
        yield receiver, seal([words, entries | {"indices": ["raw", "i8", [count]]}], places.tobytes() + behind)


def _long(receiver: Receiver) -> Bad:
    data = bytes(100 * receiver.cap)
    yield receiver, seal([receiver.header[0], {"delta": ["raw", "f4", [len(data) // 4]]}], data)
    yield receiver, receiver.frame * 100
