"""Frames: what is encoded is decoded bit for bit, and what is no frame is refused and never anything worse."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fl_components.errors import UpdateRejected
from fl_components.wire import (
    Update,
    decode_params,
    decode_update,
    encode_params,
    encode_update,
    max_update_bytes,
)

MAX_BYTES = 1_000_000
SMALL = Update("va", "ab" * 32, {"delta": np.array([0.5, -0.0, 1e-45], np.float32)})
FRAME = encode_update(SMALL)
HEADER_BYTES = 8 + int.from_bytes(FRAME[:8], "little")


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def hostile(inner: str = '{"client_id":"va","base_digest":"ab"}', **tensor: Any) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"fedrounds": inner}}
    if tensor:
        header["delta"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | tensor
    return raw(header, bytes(4) if tensor else b"")


def decoded_or_refused(frame: bytes) -> Update | None:
    try:
        update = decode_update(frame, MAX_BYTES)
    except UpdateRejected as refusal:
        assert refusal.message.partition(":")[0] in ("undecodable", "too_large")
        return None
    assert isinstance(update.client_id, str)
    assert isinstance(update.base_digest, str)
    return update


class TestUpdates:
    def test_there_and_back(self) -> None:
        found = decode_update(FRAME, MAX_BYTES)
        assert (found.client_id, found.base_digest, list(found.tensors)) == ("va", "ab" * 32, ["delta"])
        assert found.tensors["delta"].tobytes() == SMALL.tensors["delta"].tobytes()
        assert encode_update(found) == FRAME

    @given(client_id=st.text(max_size=100), base_digest=st.text(max_size=64))
    def test_any_text(self, client_id: str, base_digest: str) -> None:
        found = decode_update(encode_update(Update(client_id, base_digest, {})), MAX_BYTES)
        assert (found.client_id, found.base_digest) == (client_id, base_digest)

    def test_a_frame_that_is_too_long_is_not_even_read(self) -> None:
        assert decode_update(FRAME, len(FRAME)).client_id == "va"
        with pytest.raises(UpdateRejected, match=rf"too_large: {len(FRAME)} bytes, at most {len(FRAME) - 1}"):
            decode_update(FRAME, len(FRAME) - 1)
        assert max_update_bytes(1000) == 4000 + 4096

    def test_every_truncation(self) -> None:
        for length in range(len(FRAME)):
            with pytest.raises(UpdateRejected, match="undecodable"):
                decode_update(FRAME[:length], MAX_BYTES)

    @pytest.mark.parametrize("more", [b"\0", b" ", b"x" * 8, FRAME], ids=["null", "space", "eight", "frame"])
    def test_something_behind_the_frame(self, more: bytes) -> None:
        with pytest.raises(UpdateRejected, match="undecodable"):
            decode_update(FRAME + more, MAX_BYTES)

    def test_every_flip_of_a_bit(self) -> None:
        """A flip in the header is refused or shows; one in the numbers gives other numbers of the same shape."""
        for position in range(len(FRAME)):
            for bit in range(8):
                frame = bytearray(FRAME)
                frame[position] ^= 1 << bit
                found = decoded_or_refused(bytes(frame))
                if found is None:
                    continue
                if position >= HEADER_BYTES:
                    assert found.tensors["delta"].shape == (3,)
                    assert found.tensors["delta"].tobytes() != SMALL.tensors["delta"].tobytes()
                else:
                    tensor = found.tensors.get("delta", np.zeros(0))
                    assert (found.client_id, found.base_digest, tensor.dtype, tensor.shape) != (
                        *("va", "ab" * 32),
                        *(np.float32, (3,)),
                    )

    @settings(max_examples=1000, deadline=None)
    @given(
        edits=st.lists(
            st.tuples(st.integers(0, len(FRAME)), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4
        )
    )
    def test_any_other_damage(self, edits: list[tuple[int, int, bytes]]) -> None:
        frame = FRAME
        for start, length, replacement in edits:
            frame = frame[:start] + replacement + frame[start + length :]
        decoded_or_refused(frame)

    @settings(max_examples=1000, deadline=None)
    @given(text=st.binary(max_size=60), data=st.binary(max_size=8))
    @example(b"", b"")
    def test_any_bytes(self, text: bytes, data: bytes) -> None:
        decoded_or_refused(text + data)
        decoded_or_refused(raw(text, data))

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )

    @settings(max_examples=500, deadline=None)
    @given(
        inner=json_values.map(json.dumps) | st.text(max_size=20),
        dtype=st.sampled_from(["F32", "F64", "BF16", "F8_E4M3", "F4", "C64", "BOOL", "U64", "X"]) | st.integers(),
        shape=st.lists(st.integers(-1, 2**64), max_size=3) | json_values,
        offsets=st.lists(st.integers(-1, 16), min_size=2, max_size=2) | json_values,
        data=st.binary(max_size=16),
    )
    def test_any_header(self, inner: str, dtype: Any, shape: Any, offsets: Any, data: bytes) -> None:
        tensor = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        decoded_or_refused(raw({"__metadata__": {"fedrounds": inner}, "delta": tensor}, data))

    @pytest.mark.parametrize(
        "frame",
        [
            hostile("[" * 100_000),
            hostile('{"a":' * 100_000),
            hostile("9" * 5000),
            hostile("[]"),
            hostile("null"),
            hostile('"client_id"'),
            hostile("{}"),
            hostile('{"client_id":"va"}'),
            hostile('{"client_id":3,"base_digest":"ab"}'),
            hostile('{"client_id":"va","base_digest":["ab"]}'),
            hostile(dtype="BF16"),
            hostile(dtype="F8_E5M2"),
            hostile(dtype="F4"),
            hostile(shape=[2**63]),
            hostile(shape=[2**32, 2**32]),
            hostile(shape=[-1]),
            hostile(shape=[0, 2**64 - 1], data_offsets=[0, 0]),
            hostile(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
            hostile(shape=[1] * 100),
            hostile(data_offsets=[0, 2**63]),
            hostile(data_offsets=[2**64 - 4, 2**64]),
            hostile(data_offsets=[4, 0]),
            raw(b'{"a":' * 50_000),
            raw(b"[" * 500_000),
            raw(b'{"__metadata__":{"fedrounds":"\\ud800"}}'),
            raw(b'{"__metadata__":{"fedrounds":"\xff"}}'),
            raw({"__metadata__": None}),
            raw({"__metadata__": ["fedrounds"]}),
            raw({"__metadata__": {"fedrounds": 3}}),
            raw({}),
            raw({}, length=2**64 - 1),
            raw({}, length=2**63),
            raw({}, length=999_999),
            raw({}, length=0),
        ],
    )
    def test_a_hostile_header(self, frame: bytes) -> None:
        with pytest.raises(UpdateRejected, match="undecodable"):
            decode_update(frame, MAX_BYTES)

    def test_nothing_is_unpickled(self) -> None:
        import pickle

        with pytest.raises(UpdateRejected, match="undecodable"):
            decode_update(pickle.dumps(SMALL.client_id), MAX_BYTES)


class TestParams:
    def test_every_client_starts_from_the_same_bits(self) -> None:
        params_D = np.array([0.1, -0.0, 1e-45, 3e38], np.float32)
        frame = encode_params(params_D)
        assert decode_params(frame).dtype == np.float32
        assert decode_params(frame).tobytes() == params_D.tobytes()
        assert len(encode_params(np.zeros(4, np.float32))) == len(frame)
