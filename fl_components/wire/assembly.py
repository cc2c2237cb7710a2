"""A frame that arrives in pieces, over as many connections, and by as many processes, as it takes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.wire.frames import Buffer


def frame_digest(frame: Buffer) -> str:
    """The sha256 of a frame, in hex: the name under which it is sent in pieces."""
    return hashlib.sha256(frame).hexdigest()


class Assembly:
    """What has arrived of one frame, in a file that outlives the process. docs/wire-format.md has the rules.

    Sending a piece again changes nothing, so whoever does not know whether it arrived sends it again, or asks for
    `received` and continues there. Connections and processes that add pieces of one frame at the same time take turns,
    by a lock of the file: what was acknowledged to one of them is never lost to another.

    Args:
      folder: where the file is; one sender's, since who may send what is not looked at here.
      digest: the frame's name (`frame_digest`).
      size: how many bytes it has.
      max_bytes: how many it may have.

    Raises:
      WireError: it may not be so long, or the name is none.

    >>> from tempfile import TemporaryDirectory
    >>> frame = bytes(range(10))
    >>> with TemporaryDirectory() as folder:
    ...     _ = Assembly(Path(folder), frame_digest(frame), size=10, max_bytes=100).add(0, frame[:6])
    ...     later = Assembly(Path(folder), frame_digest(frame), size=10, max_bytes=100)
    ...     later.received, later.add(6, frame[6:]), later.frame() == frame
    (6, 10, True)
    """

    def __init__(self, folder: Path, digest: str, size: int, max_bytes: int) -> None:
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise WireError("a frame in pieces is named by the 64 hex digits of its sha256")
        if not 0 < size <= max_bytes:
            raise WireError(f"the frame would have {size} bytes, at most {max_bytes} are allowed")
        self._file, self._digest, self._size = folder / digest, digest, size

    @property
    def received(self) -> int:
        """How many bytes are there, from the first on."""
        return self._file.stat().st_size if self._file.exists() else 0

    def add(self, offset: int, piece: Buffer) -> int:
        """Take in bytes that stand at `offset`; how many are there then.

        Raises:
          WireError: it would leave a gap, goes beyond the end, or differs from what is there already.
        """
        with self._locked(os.O_CREAT) as file:
            received, end = os.fstat(file).st_size, offset + len(piece)
            if not 0 <= offset <= received:
                raise WireError(f"a piece at {offset} would leave a gap: {received} bytes are there")
            if end > self._size:
                raise WireError(f"a piece up to {end} goes beyond the {self._size} bytes of its frame")
            there = _read(file, offset, min(received, end))
            if there != piece[: len(there)]:
                raise WireError(f"a piece at {offset} differs from what was sent before")
            place, rest = offset + len(there), memoryview(piece)[len(there) :]
            while rest:
                written = os.pwrite(file, rest, place)
                place, rest = place + written, rest[written:]
            return max(received, end)

    def frame(self) -> bytes:
        """The whole frame, as it was sent. It may still be no good: `decode_update` looks at that.

        Raises:
          WireError: some of it is missing, or it is not the one that was named; then nothing of it is kept, and the
            sender begins anew.
        """
        if self.received < self._size:
            raise WireError(f"{self.received} of {self._size} bytes are there")
        with self._locked() as file:
            frame = _read(file, 0, os.fstat(file).st_size)
            if frame_digest(frame) != self._digest:
                os.ftruncate(
                    file, 0
                )  # not removed: a sender that waits for the lock would write to a file without a name
                raise WireError("the bytes that arrived are not those of the frame that was named")
        return frame

    @contextmanager
    def _locked(self, flags: int = 0) -> Iterator[int]:
        """The open file, locked: no other connection or process reads or writes it."""
        file = os.open(self._file, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _read(file: int, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`, or up to the end of the file where that comes first."""
    parts = []
    while start < stop and (part := os.pread(file, stop - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)
