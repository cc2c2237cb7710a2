"""Frames: how updates and parameters travel. docs/wire-format.md has them byte by byte.

A frame is a prefix of 24 bytes, a header in canonical JSON and the bytes of the parts, one after the other, as in
safetensors. Decoding runs no code, believes nothing that is declared before it has checked it, and makes no room for
anything before it knows how much it will take.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase, RawIOBase
from typing import Any

from fedrounds.fl_components.arrays import Part, Payload
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.errors import UpdateRejected, WireError
from fedrounds.fl_components.layout import CHANNELS
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.wire.codings import Coding, Raw, coding_of, encode, entry

Buffer = bytes | bytearray | memoryview

MAGIC, VERSION = b"FRW", 2
START = struct.Struct("<3sBIQ")  # magic, version, bytes of the header, bytes of the parts; then comes the checksum
CHECKSUM_BYTES = 8
PREFIX_BYTES = START.size + CHECKSUM_BYTES
ALIGNMENT_BYTES = 8

MAX_HEADER_BYTES = 4096 + 12 * 100
"""The longest header: 4 KiB, and a client's id, 100 characters of which JSON may escape each in 12 bytes."""

MAX_EXPANSION = 3
"""Decoded, a frame may take this many times what it may be long: four bytes for each value and eight for its index come
to just under that."""

BASE_DIGITS = 16
DIGEST = re.compile(rf"[0-9a-f]{{{BASE_DIGITS}}}")

VALUES = "values"
"""The part that holds numbers as they are, where nothing is compressed."""


def max_update_bytes(num_coordinates: int) -> int:
    """The longest frame of an update: each coordinate as float32, one bit for each index, and a header.

    >>> max_update_bytes(1000)
    9445
    """
    return PREFIX_BYTES + MAX_HEADER_BYTES + 4 * num_coordinates + -(-num_coordinates // 8)


@dataclass(frozen=True, slots=True)
class Update:
    """What a client sends.

    Args:
      client_id: who sends it.
      base_digest: the digest of the parameters that it started from, in hex. Its first 16 digits travel, and are all
        that a decoded update has: they tell a stale base, and are no proof against a client that lies.
      channels: how the update is laid out: the names of its channels, in order.
      parts: the compressed update, all channels together.
    """

    client_id: str
    base_digest: str
    channels: tuple[str, ...]
    parts: Payload


def encode_update(update: Update) -> bytes:
    """The frame of one update. Its length is what `communication/upload_bytes` counts.

    Raises:
      WireError: as `encode_frame`.
    """
    return encode_frame(_update_words(update.client_id, update.base_digest, update.channels), update.parts)


def raw_update_bytes(client_id: str, channels: Sequence[str], num_coordinates: int) -> int:
    """Return the length of the frame of an update whose numbers travel as they are: it depends on nothing else.

    Args:
      num_coordinates: M, float32 each.

    >>> import numpy as np
    >>> update = Update("va", "0" * 16, ("delta",), {"values": np.zeros(5, np.float32)})
    >>> raw_update_bytes("va", ["delta"], 5) == len(encode_update(update))
    True
    """
    words = _update_words(client_id, "0" * BASE_DIGITS, channels)
    header = _header_bytes([words, {VALUES: entry(Raw("f4", [num_coordinates]))}])
    return PREFIX_BYTES + len(header) + 4 * num_coordinates


def _update_words(client_id: str, base_digest: str, channels: Sequence[str]) -> dict[str, str]:
    return {"base": base_digest[:BASE_DIGITS], "channels": ",".join(channels), "client": client_id}


def decode_update(frame: Buffer, max_bytes: int) -> Update:
    """The update in a frame.

    Args:
      frame: what a client sent.
      max_bytes: how long it may be (`max_update_bytes`). What is decoded takes at most 3 times as much; arrays that
        travel as they are take nothing more, since they are read-only views of the frame.

    Raises:
      UpdateRejected: too_large or undecodable, and why.

    >>> import numpy as np
    >>> frame = encode_update(Update("va", "0123456789abcdef", ("delta",), {"values": np.zeros(2, np.float32)}))
    >>> decode_update(frame, max_bytes=1000).client_id
    'va'
    >>> decode_update(frame[:-1], max_bytes=1000)
    Traceback (most recent call last):
    fedrounds.fl_components.errors.UpdateRejected: undecodable: the frame has 127 bytes and declares 128
    """
    if len(frame) > max_bytes:
        raise UpdateRejected(Rejection(RejectionCode.TOO_LARGE, f"{len(frame)} bytes, at most {max_bytes}"))
    try:
        words, parts = decode_frame(frame, max_bytes)
    except WireError as error:
        raise UpdateRejected(Rejection(RejectionCode.UNDECODABLE, error.message)) from error
    if (
        words.keys() != {"base", "channels", "client"}
        or not DIGEST.fullmatch(words["base"])
        or not CHANNELS.fullmatch(words["channels"])
    ):
        detail = "an update names its client, its channels and 16 hex digits of its base"
        raise UpdateRejected(Rejection(RejectionCode.UNDECODABLE, detail))
    return Update(words["client"], words["base"], tuple(words["channels"].split(",")), parts)


@dataclass(frozen=True, slots=True)
class Download:
    """What the server sends.

    Args:
      digest: of the parameters that this decompresses to, in hex. Its first 16 digits travel: the name of what is
        fetched (an HTTP ETag), what a client checks its result by, and the base that its update names.
      against: of the parameters that a difference is from, in the same form; None where they travel whole.
      channels: how the broadcast is laid out: the names of its channels, in order.
      parts: the compressed parameters and other channels, or their difference.
    """

    digest: str
    against: str | None
    channels: tuple[str, ...]
    parts: Payload


def encode_params(download: Download) -> bytes:
    """The frame in which the server sends its parameters; its length is what `communication/download_bytes` counts.

    Raises:
      WireError: as `encode_frame`.
    """
    digests = {"params": download.digest, **({} if download.against is None else {"against": download.against})}
    words = {name: digest[:BASE_DIGITS] for name, digest in digests.items()}
    return encode_frame({**words, "channels": ",".join(download.channels)}, download.parts)


def decode_params(frame: Buffer, num_coordinates: int) -> Download:
    """The parameters in a frame of `encode_params`, before they are decompressed.

    Args:
      frame: what the server sent.
      num_coordinates: M, those of all channels.

    Raises:
      WireError: it is no such frame.

    >>> import numpy as np
    >>> numbers = np.array([1.5, -2.0], np.float32)
    >>> frame = encode_params(Download("0123456789abcdef", None, ("params",), {"values": numbers}))
    >>> decode_params(frame, num_coordinates=2).parts
    {'values': array([ 1.5, -2. ], dtype=float32)}
    """
    words, parts = decode_frame(frame, max_update_bytes(num_coordinates))
    digests = {name: word for name, word in words.items() if name != "channels"}
    if (
        not {"params"} <= digests.keys() <= {"params", "against"}
        or not all(map(DIGEST.fullmatch, digests.values()))
        or not CHANNELS.fullmatch(words.get("channels", ""))
    ):
        expected = "parameters name their channels and 16 hex digits of themselves, and of what they differ from"
        raise WireError(f"{expected}; got {words}"[:240])
    return Download(words["params"], words.get("against"), tuple(words["channels"].split(",")), parts)


def encode_frame(words: Mapping[str, str], parts: Payload) -> bytes:
    """Words and parts as one frame. Equal ones give equal bytes, for one release of zstandard.

    Raises:
      WireError: a part of a type that does not travel, or a header that would be too long.

    >>> import numpy as np
    >>> decode_frame(encode_frame({"to": "va"}, {"x": np.array([1, 2], np.int8)}), max_bytes=100)
    ({'to': 'va'}, {'x': array([1, 2], dtype=int8)})
    """
    encoded = {name: encode(parts[name]) for name in sorted(parts)}
    header = _header_bytes([dict(words), {name: entry(coding) for name, (coding, _) in encoded.items()}])
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"the header would have {len(header)} bytes, at most {MAX_HEADER_BYTES}")
    parts_bytes = [data for _, data in encoded.values()]
    start = START.pack(MAGIC, VERSION, len(header), sum(map(len, parts_bytes)))
    return b"".join([start, _checksum(start, header, *parts_bytes), header, *parts_bytes])


def decode_frame(frame: Buffer, max_bytes: int) -> tuple[dict[str, str], dict[str, Part]]:
    """The words and the parts in a frame of `encode_frame`.

    Args:
      frame: whatever arrived.
      max_bytes: how long it may be. All parts together take at most 3 times as much.

    Raises:
      WireError: it is no such frame, and why.
    """
    view = memoryview(frame).toreadonly()
    header_bytes, data_bytes = _read_prefix(view, max_bytes)
    begin = PREFIX_BYTES + header_bytes
    if len(view) != begin + data_bytes:
        raise WireError(f"the frame has {len(view)} bytes and declares {begin + data_bytes}")
    if _checksum(view[: START.size], view[PREFIX_BYTES:]) != view[START.size : PREFIX_BYTES]:
        raise WireError("the checksum is not that of the content")
    words, codings = _read_header(bytes(view[PREFIX_BYTES:begin]))
    if sum(coding.coded_bytes for coding in codings.values()) != data_bytes:
        raise WireError(f"the parts do not take the {data_bytes} bytes that the frame declares")
    if sum(coding.decoded_bytes for coding in codings.values()) > MAX_EXPANSION * max_bytes:
        raise WireError(f"the parts would take more than {MAX_EXPANSION * max_bytes} bytes of memory")
    parts = {}
    for name, coding in codings.items():
        end = begin + coding.coded_bytes
        parts[name] = coding.decode(view[begin:end])
        begin = end
    return words, parts


def read_frame(stream: RawIOBase | BufferedIOBase, max_bytes: int) -> bytearray:
    """The next frame of a stream, not decoded yet. Nothing behind it is read.

    Args:
      stream: blocks until there is something to read, or its end.
      max_bytes: a frame that declares to be longer is refused before any of it is read or room is made for it.

    Raises:
      WireError: it is too long or no frame, or the stream ends within it.

    >>> import numpy as np
    >>> import io
    >>> frame = encode_frame({}, {"delta": np.zeros(2, np.float32)})
    >>> bytes(read_frame(io.BytesIO(frame + b"more"), max_bytes=100)) == frame
    True
    >>> read_frame(io.BytesIO(frame), max_bytes=50)
    Traceback (most recent call last):
    fedrounds.fl_components.errors.WireError: the frame declares 64 bytes, at most 50 are allowed
    """
    prefix = bytearray(PREFIX_BYTES)
    _read_into(stream, memoryview(prefix))
    frame = bytearray(PREFIX_BYTES + sum(_read_prefix(prefix, max_bytes)))
    frame[:PREFIX_BYTES] = prefix
    _read_into(stream, memoryview(frame)[PREFIX_BYTES:])
    return frame


def _read_into(stream: RawIOBase | BufferedIOBase, buffer: memoryview) -> None:
    while buffer:
        got = stream.readinto(buffer)
        if not got:
            raise WireError("the stream ends within a frame")
        buffer = buffer[got:]


def _read_prefix(frame: Buffer, max_bytes: int) -> tuple[int, int]:
    """How many bytes the header has, and the parts."""
    if len(frame) < PREFIX_BYTES:
        raise WireError(f"these are {len(frame)} bytes, a frame has at least {PREFIX_BYTES}")
    magic, version, header_bytes, data_bytes = START.unpack_from(frame)
    if magic != MAGIC:
        raise WireError("this does not begin as a frame")
    if version != VERSION:
        raise WireError(f"the frame is of version {version} of the format; version {VERSION} is read here")
    if header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"the header has {header_bytes} bytes, at most {MAX_HEADER_BYTES}")
    if PREFIX_BYTES + header_bytes + data_bytes > max_bytes:
        raise WireError(
            f"the frame declares {PREFIX_BYTES + header_bytes + data_bytes} bytes, at most {max_bytes} are allowed"
        )
    return header_bytes, data_bytes


def _checksum(*chunks: Buffer) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()[:CHECKSUM_BYTES]


def _header_bytes(header: Any) -> bytes:
    """Canonical JSON, with spaces behind it so that the parts begin at a multiple of 8 bytes."""
    text = canonical_json(header).encode("ascii")
    return text + b" " * (-(PREFIX_BYTES + len(text)) % ALIGNMENT_BYTES)


def _read_header(text: bytes) -> tuple[dict[str, str], dict[str, Coding]]:
    try:
        header = json.loads(text.decode("ascii"))
        canonical = _header_bytes(header)
    except (ValueError, RecursionError) as error:  # RecursionError: it is deeply nested
        raise WireError("the header is not JSON") from error
    if canonical != text:
        raise WireError("the header is not canonical JSON")
    match header:
        case [dict() as words, dict() as entries] if all(isinstance(word, str) for word in words.values()):
            return words, {name: coding_of(entries[name]) for name in entries}
    raise WireError("the header is not a list of words and parts")
