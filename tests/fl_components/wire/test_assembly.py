"""A frame in pieces arrives whole, whatever is sent twice, lost, or cut off."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_components.errors import WireError
from fl_components.wire import Assembly, Update, decode_update, encode_update, frame_digest

FRAME = encode_update(Update("va", "0123456789abcdef", {"delta": np.arange(40, dtype=np.float32)}))
DIGEST = frame_digest(FRAME)


def assembly(folder: Path, digest: str = DIGEST, size: int = len(FRAME)) -> Assembly:
    return Assembly(folder, digest, size, max_bytes=1000)


@given(pieces=st.lists(st.tuples(st.integers(0, len(FRAME)), st.integers(0, 100)), max_size=30))
def test_pieces_in_any_order_come_to_the_frame(pieces: list[tuple[int, int]]) -> None:
    """Each is taken in by a new process, as it were; then the sender asks how far it got and goes on there."""
    with tempfile.TemporaryDirectory() as name:
        folder, received = Path(name), 0
        for offset, length in pieces:
            piece = FRAME[offset : offset + length]
            if offset > received:
                with pytest.raises(WireError, match="would leave a gap"):
                    assembly(folder).add(offset, piece)
            else:
                received = max(received, offset + len(piece))
                assert assembly(folder).add(offset, piece) == received
            assert assembly(folder).received == received
            if received < len(FRAME):
                with pytest.raises(WireError, match=f"{received} of {len(FRAME)} bytes are there"):
                    assembly(folder).frame()
        while received < len(FRAME):
            received = assembly(folder).add(received, FRAME[received : received + 64])
        assert assembly(folder).frame() == FRAME
        assert decode_update(assembly(folder).frame(), 1000).client_id == "va"


def test_what_is_refused(tmp_path: Path) -> None:
    for digest, size in ((DIGEST.upper(), 10), ("../" + DIGEST[3:], 10), (DIGEST, 0), (DIGEST, 1001)):
        with pytest.raises(WireError):
            assembly(tmp_path, digest, size)
    found = assembly(tmp_path)
    found.add(0, FRAME[:100])
    for offset, piece, why in (
        (-1, b"x", "would leave a gap"),
        (101, b"x", "would leave a gap"),
        (100, FRAME[100:] + b"x", "goes beyond"),
        (50, b"x" * 10, "differs from what was sent before"),
    ):
        with pytest.raises(WireError, match=why):
            found.add(offset, piece)
    assert found.received == 100
    assert [path.name for path in tmp_path.iterdir()] == [DIGEST]


def test_another_frame_than_was_named_is_not_kept(tmp_path: Path) -> None:
    found = assembly(tmp_path)
    found.add(0, FRAME[:-1] + b"\xff")
    with pytest.raises(WireError, match="not those of the frame that was named"):
        found.frame()
    assert found.received == 0
    found.add(0, FRAME)
    assert found.frame() == FRAME
