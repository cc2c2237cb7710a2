"""Shakespeare: lines of plays by speaker; the task is the next character."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.federated import ClientExamples, FederatedData
from fedrounds.fl_components.data.fingerprints import Fingerprints, of_texts
from fedrounds.fl_components.data.folders import find_file, find_folder
from fedrounds.fl_components.data.text import read_text
from fedrounds.fl_components.data.well_known import are_well_known
from fedrounds.fl_components.errors import DataError

_FILE: Final = "input.txt"
_MEND: Final = "each speech is a line with the speaker's name and a colon, then what is said, then an empty line"

Tokens = NDArray[np.int64]


class Shakespeare(DataRule):
    """Plays of Shakespeare by speaker, after McMahan et al. (2017); predict each next character.

    Read from `input.txt` (Karpathy, 2015, "The unreasonable effectiveness of recurrent neural networks": 1.1 million
    characters, 303 speakers), in `folder` or where `find_folder` looks. Names that differ only in upper and lower case
    are one speaker: a client. A client's text is the speaker's speeches as they stand in the file, in its order, each
    with its line of the name and the empty line after it; the last part of it is there to test on.

    A row is T = `sequence_length` characters, numbered by their place among the sorted characters of the file: int64
    [M, T]. Its labels [M, T] are the characters that follow. A speaker's training rows do not overlap; the last one is
    padded, with labels `IGNORED`. Of test rows, each character is predicted in exactly one, and the characters before
    it that the row begins with (up to T // 2, of the training text where need be) are context: labelled `IGNORED`.

    Args:
      sequence_length: T.
      test_fraction: the last part of each speaker's text is there to test on.
      min_characters: speakers whose text is shorter than this are left out.
      folder: where the file is.
      public: whether anyone may download the file. By default only if it is the published one, by its checksum: a file
        of your own in this form is private.
    """

    kind: Literal["shakespeare"] = "shakespeare"
    sequence_length: int = Field(default=80, ge=2)
    test_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    min_characters: int = Field(default=2, ge=2)
    folder: str | None = None
    public: bool | None = None

    @property
    def is_well_known(self) -> bool:
        return are_well_known("shakespeare", [_FILE], self.folder)

    def known_num_clients(self) -> None:
        return None

    def load(self, seed: int) -> FederatedData:
        """The seed draws nothing. Raises `DataError` when the file is missing, or is no text of speeches."""
        folder = find_folder("shakespeare", [_FILE], self.folder)
        file = find_file(folder, _FILE) or folder / _FILE
        text = read_text(file)
        vocabulary = sorted({*text, "\n"})  # each speech is given its line breaks, the last one too
        number_of = {character: number for number, character in enumerate(vocabulary)}
        clients = {}
        for speaker, said in _speakers(file, text).items():
            tokens = np.array([number_of[character] for character in said], np.int64)
            num_test = int(self.test_fraction * len(tokens))
            if len(tokens) >= self.min_characters and len(tokens) - num_test >= 2:
                clients[speaker] = _windows(tokens, len(tokens) - num_test, self.sequence_length)
        if not clients:
            raise DataError(f"{file}: no speaker has enough text", hint="set data.min_characters lower")
        return FederatedData.from_clients(
            clients,
            num_classes=len(vocabulary),
            class_names=tuple(vocabulary),
            public=self.is_public,
            as_read=partial(_as_read, file),
        )


def _as_read(file: Path, data: FederatedData, every_client: bool) -> Fingerprints:
    """Of each speaker's speeches, also of speakers that are left out."""
    speakers = _speakers(file, read_text(file))
    return Fingerprints.of_clients({name: of_texts(re.split(r"\n\n+", text)) for name, text in speakers.items()})


def _speakers(file: Path, text: str) -> dict[str, str]:
    """Each speaker's text; the name is the spelling that stands first."""
    spelling: dict[str, str] = {}
    speeches: dict[str, list[str]] = {}
    for speech in re.finditer(r".+(?:\n.+)*", text):
        name, colon, rest = speech.group().partition(":")
        speaker = re.sub(r"[^\w.\- ]", "", name).strip(" .-")
        if not colon or "\n" in name or not speaker or rest[:1] not in ("", "\n"):
            line = 1 + text.count("\n", 0, speech.start())
            raise DataError(
                f"{file}, line {line}: {speech.group().splitlines()[0][:40]!r} is not a speaker's name and a colon",
                hint=_MEND,
            )
        speaker = spelling.setdefault(speaker.casefold(), speaker)
        speeches.setdefault(speaker, []).append(speech.group() + "\n\n")
    return {speaker: "".join(each) for speaker, each in speeches.items()}


def _windows(tokens: Tokens, num_train: int, length: int) -> ClientExamples:
    """The first `num_train` characters to train on and the others to test on, cut into rows of `length`."""
    last, context = len(tokens) - 1, length // 2
    train = [(start, min(start + length, num_train - 1), 0) for start in range(0, num_train - 1, length)]
    test = [
        (max(first - context, 0), min(first + length - context, last), min(first, context))
        for first in range(num_train - 1, last, length - context)
    ]
    return ClientExamples(*_rows(tokens, train, length), *_rows(tokens, test, length))


def _rows(tokens: Tokens, windows: list[tuple[int, int, int]], length: int) -> tuple[Tokens, Tokens]:
    """Inputs and labels [M, length] of windows (start, stop, number of positions that are context)."""
    x, y = np.zeros((len(windows), length), np.int64), np.full((len(windows), length), IGNORED, np.int64)
    for row, (start, stop, context) in enumerate(windows):
        x[row, : stop - start] = tokens[start:stop]
        y[row, context : stop - start] = tokens[start + context + 1 : stop + 1]
    return x, y
