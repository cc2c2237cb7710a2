"""A frame in pieces arrives whole, whatever is sent twice, lost, or cut off."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.wire import Assembly, Update, decode_update, encode_update, frame_digest
from fedrounds.fl_components.wire import assembly as assembly_module

FRAME = encode_update(Update("va", "0123456789abcdef", ("delta",), {"values": np.arange(40, dtype=np.float32)}))
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


def test_two_first_pieces_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shorter one has seen an empty file when the whole frame is acknowledged to the other; then it goes on."""
    first_waits, whole_is_there = threading.Event(), threading.Event()
    flock = assembly_module.fcntl.flock

    def slow(file: int, how: int) -> None:
        if threading.current_thread().name == "short":
            first_waits.set()
            assert whole_is_there.wait(10)
        flock(file, how)

    monkeypatch.setattr(assembly_module.fcntl, "flock", slow)
    acknowledged: list[int] = []
    short = threading.Thread(target=lambda: acknowledged.append(assembly(tmp_path).add(0, FRAME[:10])), name="short")
    short.start()
    assert first_waits.wait(10)
    assert assembly(tmp_path).add(0, FRAME) == len(FRAME)
    whole_is_there.set()
    short.join(10)
    assert acknowledged == [len(FRAME)]
    assert assembly(tmp_path).frame() == FRAME


def test_a_frame_that_is_thrown_away_while_a_piece_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The piece is taken in afterwards, in the file that others see."""
    found = assembly(tmp_path)
    found.add(0, FRAME[:-1] + b"\xff")
    flock = assembly_module.fcntl.flock

    def once(file: int, how: int) -> None:
        monkeypatch.setattr(assembly_module.fcntl, "flock", flock)
        with pytest.raises(WireError, match="not those of the frame"):
            assembly(tmp_path).frame()
        flock(file, how)

    monkeypatch.setattr(assembly_module.fcntl, "flock", once)
    assert found.add(0, FRAME[:20]) == 20
    assert found.received == 20


def send_pieces(folder: Path, frame: bytes, pieces: list[tuple[int, int]], barrier: Any) -> None:
    name = frame_digest(frame)
    barrier.wait()
    for offset, length in pieces:
        try:
            told = Assembly(folder, name, len(frame), 10**6).add(offset, frame[offset : offset + length])
        except WireError as error:
            assert "would leave a gap" in error.message
        else:
            assert Assembly(folder, name, len(frame), 10**6).received >= told


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_what_was_acknowledged_stays_whoever_else_sends(tmp_path: Path, kind: str) -> None:
    """Overlapping pieces of one frame from four senders at once: each sees at least what was acknowledged to it."""
    context: Any = multiprocessing.get_context("fork") if kind == "processes" else threading
    start = context.Process if kind == "processes" else threading.Thread
    for turn in range(5):
        folder, draw = tmp_path / str(turn), np.random.default_rng(turn)
        folder.mkdir()
        frame, barrier = draw.bytes(50_000), context.Barrier(4)
        senders = []
        for _ in range(4):
            offsets = sorted(draw.integers(0, 50_000, 20).tolist())
            pieces = [(0, int(draw.integers(1, 50_000))), *((offset, 20_000) for offset in offsets)]
            senders.append(start(target=send_pieces, args=(folder, frame, pieces, barrier)))
        for each in senders:
            each.start()
        for each in senders:
            each.join()
            assert getattr(each, "exitcode", 0) == 0
        found = Assembly(folder, frame_digest(frame), len(frame), 10**6)
        found.add(found.received, frame[found.received :])
        assert found.frame() == frame


def test_a_file_that_was_cut_off_is_sent_again_from_there(tmp_path: Path) -> None:
    found = assembly(tmp_path)
    found.add(0, FRAME)
    os.truncate(tmp_path / DIGEST, 30)
    assert found.received == 30
    assert found.add(10, FRAME[10:]) == len(FRAME)
    assert found.frame() == FRAME
