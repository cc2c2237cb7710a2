"""A frame that arrives in pieces, over as many connections, and by as many processes, as it takes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fl_components.errors import WireError
from fl_components.wire.frames import Buffer


def frame_digest(frame: Buffer) -> str:
    """The sha256 of a frame, in hex: the name under which it is sent in pieces."""
    return hashlib.sha256(frame).hexdigest()


class Assembly:
    """What has arrived of one frame, in a file that outlives the process. docs/wire-format.md has the rules.

    Sending a piece again changes nothing, so whoever does not know whether it arrived sends it again, or asks for
    `received` and goes on there.

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
        received, end = self.received, offset + len(piece)
        if not 0 <= offset <= received:
            raise WireError(f"a piece at {offset} would leave a gap: {received} bytes are there")
        if end > self._size:
            raise WireError(f"a piece up to {end} goes beyond the {self._size} bytes of its frame")
        with self._file.open("r+b" if received else "w+b") as file:
            file.seek(offset)
            there = file.read(min(received, end) - offset)
            if there != piece[: len(there)]:
                raise WireError(f"a piece at {offset} differs from what was sent before")
            file.write(piece[len(there) :])
        return max(received, end)

    def frame(self) -> bytes:
        """The whole frame, as it was sent. It may still be no good: `decode_update` looks at that.

        Raises:
          WireError: some of it is missing, or it is not the one that was named; then nothing of it is kept, and the
            sender begins anew.
        """
        if self.received < self._size:
            raise WireError(f"{self.received} of {self._size} bytes are there")
        frame = self._file.read_bytes()
        if frame_digest(frame) != self._digest:
            self._file.unlink()
            raise WireError("the bytes that arrived are not those of the frame that was named")
        return frame
