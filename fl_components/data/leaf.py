"""LEAF: the JSON files of the LEAF benchmark, one group of rows per user."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, field_validator

from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.federated import Features, FederatedData, Labels, RowRanges
from fedrounds.fl_components.data.files import expanded, is_folder
from fedrounds.fl_components.data.fingerprints import Fingerprints, of_arrays, of_data
from fedrounds.fl_components.data.text import read_text
from fedrounds.fl_components.errors import DataError

VOCABULARY: Final = f"\n !\"&'(),-.{string.digits}:;>?{string.ascii_uppercase}[]{string.ascii_lowercase}}}"
"""The 80 characters of LEAF's Shakespeare: a character's token is its place here."""

_FORM: Final = (
    "LEAF's form is {users: [name, ...], num_samples: [rows, ...], user_data: {name: {x: [row, ...], y: [label, ...]}}}"
)


@dataclass(frozen=True, slots=True)
class _User:
    """One user's rows as JSON has them, and where they stand."""

    where: str
    x: list[Any]
    y: list[Any]


class Leaf(DataRule):
    """Data in the JSON form of LEAF (Caldas et al., 2018, "LEAF: a benchmark for federated settings").

    All files `train/*.json` and `test/*.json` of the folder are read, each ``{"users": [...], "num_samples": [...],
    "user_data": {user: {"x": [...], "y": [...]}}}``; other keys are left alone. A user with training rows is a client.
    The test rows of users without training rows are nobody's, but count in the evaluation of all.

    Numbers as x become float32 [M, ...], with whole numbers y from 0 as labels. Text as x, all of one length T, becomes
    int64 tokens [M, T]; y is then one character, the next, and also a token.

    Args:
      folder: where `train` and `test` are.
      shape: the shape that each row of numbers is given, for instance [1, 28, 28] for FEMNIST's 784.
      vocabulary: the characters of text, in the order of their tokens. By default LEAF's 80: line break, space,
        ``!"&'(),-.``, the digits, ``:;>?``, A to Z, ``[]``, a to z and ``}``.
      num_classes: how many labels there are. By default the characters of the vocabulary, or one more than the largest
        label found: with private data give it, so that the model's size does not tell which labels occur.
      public: True only for data that anyone may download.
    """

    kind: Literal["leaf"] = "leaf"
    folder: str
    shape: tuple[int, ...] | None = None
    vocabulary: str | None = None
    num_classes: int | None = Field(default=None, ge=2)
    public: bool = False

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 1):
            raise ValueError("give the length of each axis, at least 1, for instance [1, 28, 28]")
        return value

    @field_validator("vocabulary")
    @classmethod
    def _check_vocabulary(cls, value: str | None) -> str | None:
        if value is not None and (len(value) < 2 or len(set(value)) < len(value)):
            raise ValueError("give two or more characters, none of them twice")
        return value

    def known_num_clients(self) -> None:
        return None

    def load(self, seed: int) -> FederatedData:
        """The seed draws nothing. Raises `DataError`, with file, user and row, for files that cannot be used."""
        folder = expanded(self.folder, "data.folder")
        train, test = _read_part(folder, "train"), _read_part(folder, "test")
        is_text = _is_text(train)
        read = self._text if is_text else self._numbers
        test = {name: test[name] for name in [*train, *test] if name in test and test[name].y}  # nobody's are last
        trained, tested = [read(user) for user in train.values()], [read(user) for user in test.values()]
        _check_same_shape([*train.values(), *test.values()], [x for x, _ in [*trained, *tested]])
        x_train, y_train = (np.concatenate(part) for part in zip(*trained, strict=True))
        x_test, y_test = (np.concatenate(part) for part in zip(*tested, strict=True))
        if not is_text:
            _check_trained(list(test.values()), [y for _, y in tested], y_train)
        found = len(self._characters) if is_text else 1 + int(max(y_train.max(initial=0), y_test.max(initial=0)))
        return FederatedData(
            client_ids=tuple(train),
            x_train=x_train,
            y_train=y_train,
            train_rows=RowRanges.consecutive([len(user.y) for user in train.values()]),
            x_test=x_test,
            y_test=y_test,
            test_rows=RowRanges.consecutive([len(test[name].y) if name in test else 0 for name in train]),
            num_classes=self.num_classes or found,
            class_names=tuple(self._characters) if is_text and self.num_classes in (None, found) else (),
            public=self.public,
            as_read=self._as_read if is_text else of_data,
        )

    @property
    def _characters(self) -> str:
        return self.vocabulary or VOCABULARY

    def _as_read(self, data: FederatedData, every_client: bool) -> Fingerprints:
        """Of text: its characters, whatever their places in the vocabulary are."""
        code_points = np.array([ord(character) for character in self._characters])
        return of_arrays(data, every_client, code_points.take, code_points.take)

    def _numbers(self, user: _User) -> tuple[Features, Labels]:
        """x float32 [rows, ...] and y [rows]."""
        try:
            x = np.asarray(user.x)
        except ValueError:
            x = np.empty(0, object)
        if x.dtype.kind not in "fiu" or x.ndim < 2:
            row = _first_unlike(user.x)
            raise DataError(
                f"{user.where}, row {row} (from 0): x is no list of numbers like that of row 0",
                hint="give all rows equally many numbers, or text to all rows of all users",
            )
        if self.shape is not None:
            if math.prod(x.shape[1:]) != math.prod(self.shape):
                raise DataError(
                    f"{user.where}: x has {math.prod(x.shape[1:])} numbers a row, and data.shape is {list(self.shape)}",
                    hint="give a data.shape whose lengths multiply to the numbers of a row, or leave it out",
                )
            x = x.reshape(len(x), *self.shape)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, which is refused by name
            return x.astype(np.float32), np.array([_label(user, row) for row in range(len(user.y))], np.int64)

    def _text(self, user: _User) -> tuple[Features, Labels]:
        """x tokens int64 [rows, T] and y the token that follows [rows]."""
        number_of = {character: number for number, character in enumerate(self._characters)}
        length = len(user.x[0]) if isinstance(user.x[0], str) else 0
        for row, (x, y) in enumerate(zip(user.x, user.y, strict=True)):
            where = f"{user.where}, row {row} (from 0)"
            if not isinstance(x, str) or len(x) != length or not x or not isinstance(y, str) or len(y) != 1:
                raise DataError(
                    f"{where}: x is not text of {length} characters, or y not the one character that follows",
                    hint="give text of one length for every x, and one character for every y",
                )
            unknown = next((character for character in x + y if character not in number_of), None)
            if unknown is not None:
                raise DataError(
                    f"{where}: the character {unknown!r} is not in the vocabulary",
                    hint="give all characters of the text as data.vocabulary",
                )
        x_tokens = [[number_of[character] for character in x] for x in user.x]
        return np.array(x_tokens, np.int64), np.array([number_of[y] for y in user.y], np.int64)


def _is_text(users: Mapping[str, _User]) -> bool:
    return isinstance(next(iter(users.values())).x[0], str)


def _label(user: _User, row: int) -> int:
    label = user.y[row]
    if isinstance(label, bool) or not isinstance(label, int | float) or label != label // 1 or not 0 <= label < 2**31:
        raise DataError(
            f"{user.where}, row {row} (from 0): {str(label)[:40]!r} cannot be a label",
            hint="labels are whole numbers from 0",
        )
    return int(label)


def _first_unlike(rows: list[Any]) -> int:
    """The first row that is no array of numbers, or not of the shape of row 0."""
    shapes = []
    for number, row in enumerate(rows):
        try:
            array = np.asarray(row)
        except ValueError:
            return number
        shapes.append(array.shape)
        if array.dtype.kind not in "fiu" or not array.ndim or array.shape != shapes[0]:
            return number
    return 0


def _check_same_shape(users: list[_User], features: list[Features]) -> None:
    for user, x in zip(users, features, strict=True):
        if x.shape[1:] != features[0].shape[1:]:
            raise DataError(
                f"{user.where} has rows of shape {list(x.shape[1:])}, and {users[0].where} of "
                f"{list(features[0].shape[1:])}",
                hint="give all users rows of one shape",
            )


def _check_trained(users: list[_User], labels: list[Labels], y_train: Labels) -> None:
    """Raises `DataError` for a label that no training row has: what is never shown cannot be learnt."""
    for user, y in zip(users, labels, strict=True):
        untrained = np.flatnonzero(~np.isin(y, y_train))
        if untrained.size:
            raise DataError(
                f"{user.where}, row {untrained[0]} (from 0): no training row of any user has the label "
                f"{y[untrained[0]]}",
                hint="leave out test rows of this label, or move some of them to the training rows",
            )


def _read_part(folder: Path, part: str) -> dict[str, _User]:
    """The users of all files of `train` or `test`, by name, in the order of the files."""
    files = sorted((folder / part).glob("*.json")) if is_folder(folder / part) else []
    if not files:
        raise DataError(
            f"{folder / part} has no .json files"
            if is_folder(folder / part)
            else f"there is no folder {folder / part}",
            hint="data.folder is the one that has the folders train and test, with LEAF's .json files in them",
        )
    users: dict[str, _User] = {}
    for file in files:
        for name, user in _read(file):
            if name in users:
                raise DataError(
                    f"{user.where}: {users[name].where} is there as well", hint="give each user's rows in one file only"
                )
            if not user.y and part == "train":
                raise DataError(f"{user.where} has no rows", hint="leave out users without training rows")
            users[name] = user
    if not any(user.y for user in users.values()):
        raise DataError(f"{folder / part} has no rows", hint="at least one user has rows there")
    return users


def _read(file: Path) -> Iterator[tuple[str, _User]]:
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno}, column {error.colno}: this is not JSON: {error.msg}",
            hint="get the file anew: it is damaged, or was cut short",
        ) from error
    except RecursionError as error:
        raise DataError(f"{file}: its brackets are nested too deeply", hint=_FORM) from error
    groups = content if isinstance(content, dict) else {}
    names, counts, user_data = (groups.get(key) for key in ("users", "num_samples", "user_data"))
    if not isinstance(names, list) or not isinstance(counts, list) or not isinstance(user_data, dict):
        raise DataError(f"{file} is not in LEAF's form: users, num_samples or user_data is missing", hint=_FORM)
    if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(user_data):
        odd = sorted({str(name) for name in names} ^ set(user_data)) or sorted(map(str, names))
        raise DataError(f"{file}: users and user_data do not name the same users, for instance {odd[0]!r}", hint=_FORM)
    if len(counts) != len(names):
        raise DataError(f"{file} has {len(names)} users and {len(counts)} num_samples", hint=_FORM)
    for name, count in zip(names, counts, strict=True):
        where = f"{file}, user {name!r}"
        rows = user_data[name] if isinstance(user_data[name], dict) else {}
        x, y = rows.get("x"), rows.get("y")
        if not isinstance(x, list) or not isinstance(y, list):
            raise DataError(f"{where}: x or y is missing, or not a list", hint=_FORM)
        if not len(x) == len(y) == count:
            raise DataError(
                f"{where}: {len(x)} rows of x, {len(y)} of y, and num_samples says {count}",
                hint="get the file anew, or make the three agree",
            )
        yield name, _User(where, x, y)
