from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedrounds.fl_components.data import FederatedData, Leaf
from fedrounds.fl_components.errors import DataError

User = tuple[list[Any], list[Any]]

TRAIN: dict[str, User] = {"ann": ([[0.5, 1], [2, 3]], [0, 1]), "bob": ([[4, 5.5]], [2])}
TEST: dict[str, User] = {"eve": ([[9, 9]], [0]), "bob": ([[7, 7], [8, 8]], [1, 2])}


def leaf(users: dict[str, User]) -> dict[str, Any]:
    return {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {name: {"x": x, "y": y} for name, (x, y) in users.items()},
    }


def write(folder: Path, **files: Any) -> Path:
    """Files train.json, test.json, train_2.json and so on, each into the folder of its part."""
    for name, content in files.items():
        place = folder / name.partition("_")[0]
        place.mkdir(exist_ok=True)
        (place / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def load(folder: Path, **fields: Any) -> FederatedData:
    return Leaf.model_validate({"folder": str(folder)} | fields).load(seed=0)


def test_users_are_clients_and_others_test_rows_are_nobodys(tmp_path: Path) -> None:
    second = leaf({"carol": ([[6, 6]], [0])}) | {"hierarchies": ["play"]}
    data = load(write(tmp_path, train=leaf(TRAIN), train_2=second, test=leaf(TEST)))
    assert data.client_ids == ("ann", "bob", "carol")
    assert data.train(0)[0].tolist() == [[0.5, 1], [2, 3]] and data.train(0)[1].tolist() == [0, 1]
    assert [len(data.test(i)[1]) for i in range(3)] == [0, 2, 0]
    assert data.test(1)[0].tolist() == [[7, 7], [8, 8]]
    assert data.unowned_test()[0].tolist() == [[9, 9]]
    assert (data.x_train.dtype, data.num_classes, data.public) == (np.float32, 3, False)


def test_rows_take_the_shape_that_is_given(tmp_path: Path) -> None:
    image = list(range(784))
    users: dict[str, User] = {"w": ([image, image], [0, 61])}
    data = load(write(tmp_path, train=leaf(users), test=leaf(users)), shape=[1, 28, 28], num_classes=62, public=True)
    assert data.input_shape == (1, 28, 28) and data.x_train[1, 0, 2, 3] == 2 * 28 + 3
    assert (data.num_classes, data.public) == (62, True)


def test_text_is_leafs_80_characters(tmp_path: Path) -> None:
    # The places of these characters were counted by hand in the order that the docstring gives.
    users: dict[str, User] = {"LEAR": (['\n !"&', "09:AZ"], ["a", "}"])}
    data = load(write(tmp_path, train=leaf(users), test=leaf({"LEAR": (["[]az."], ["?"])})))
    assert data.x_train.dtype == np.int64
    assert data.x_train.tolist() == [[0, 1, 2, 3, 4], [11, 20, 21, 25, 50]] and data.y_train.tolist() == [53, 79]
    assert data.x_test.tolist() == [[51, 52, 53, 78, 10]] and data.y_test.tolist() == [24]
    assert data.num_classes == 80


def test_text_of_another_vocabulary(tmp_path: Path) -> None:
    users: dict[str, User] = {"u": (["éàü"], ["é"])}
    data = load(write(tmp_path, train=leaf(users), test=leaf(users)), vocabulary="üàé")
    assert (data.x_train.tolist(), data.y_train.tolist(), data.num_classes) == ([[2, 1, 0]], [2], 3)


GOOD = leaf(TRAIN)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ('{"users": ["ann"],\n "num_samples": [2', "train.json, line 2, column 19: this is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "not in LEAF's form: users, num_samples or user_data is missing"),
        ({"users": [], "num_samples": []}, "users, num_samples or user_data is missing"),
        (GOOD | {"users": ["ann", "zoe"]}, "do not name the same users, for instance 'bob'"),
        (GOOD | {"users": ["ann", "bob", "bob"]}, "do not name the same users, for instance 'ann'"),
        (GOOD | {"users": ["ann", 3]}, "do not name the same users"),
        (GOOD | {"num_samples": [2]}, "2 users and 1 num_samples"),
        (GOOD | {"num_samples": [2, 7]}, "user 'bob': 1 rows of x, 1 of y, and num_samples says 7"),
        (GOOD | {"user_data": {"ann": {"x": [[1]]}, "bob": {}}}, "user 'ann': x or y is missing"),
        (leaf({"ann": ([[1, 2]], [0]), "bob": ([], [])}), "user 'bob' has no rows"),
        (leaf({}), "train has no rows"),
        (leaf({"ann": ([[1, 2]], [0]), "bob": ([[1]], [1])}), r"'bob' has rows of shape \[1\], and .*'ann' of \[2\]"),
        (leaf({"ann": ([[1, 2], [3]], [0, 1])}), r"user 'ann', row 1 \(from 0\): x is no list of numbers"),
        (leaf({"ann": ([[1, 2], [3, "x"]], [0, 1])}), r"user 'ann', row 1 \(from 0\): x is no list of numbers"),
        (leaf({"ann": ([1, 2], [0, 1])}), r"user 'ann', row 0 \(from 0\): x is no list of numbers"),
        (leaf({"ann": ([[1, 2], [3, 4]], [0, 1.5])}), r"user 'ann', row 1 \(from 0\): '1.5' cannot be a label"),
        (leaf({"ann": ([[1, 2], [3, 4]], [0, -1])}), r"row 1 \(from 0\): '-1' cannot be a label"),
        (leaf({"ann": ([[1, 2], [3, 4]], [0, "a"])}), r"row 1 \(from 0\): 'a' cannot be a label"),
        (leaf({"ann": ([[1, 2], [1, float("nan")]], [0, 1])}), "client 'ann', training row 1 .* has nan as feature 1"),
        (leaf({"ann": (["000001.jpg"], [1])}), r"user 'ann', row 0 \(from 0\): x is not text of 10 characters, or y"),
        (leaf({"ann": (["ab", "abc"], ["c", "d"])}), r"row 1 \(from 0\): x is not text of 2 characters"),
        (leaf({"ann": (["ab", "a#"], ["c", "d"])}), r"row 1 \(from 0\): the character '#' is not in the vocabulary"),
        (leaf({"ann": (["ab"], ["c"]), "bob": ([[1, 2]], [1])}), r"user 'bob', row 0 \(from 0\): x is not text"),
        (leaf({"ann": ([[1, 2]], [1]), "bob": (["ab"], ["c"])}), r"user 'bob', row 0 \(from 0\): x is no list"),
    ],
)
def test_a_wrong_file_is_refused_with_user_and_row(tmp_path: Path, train: Any, words: str) -> None:
    write(tmp_path, train=train, test=leaf({"ann": ([[1, 2]], [0])}))
    with pytest.raises(DataError, match=words) as refused:
        load(tmp_path)
    assert refused.value.hint


def test_a_label_that_nobody_trains_on_is_refused(tmp_path: Path) -> None:
    write(tmp_path, train=leaf(TRAIN), test=leaf({"eve": ([[9, 9], [9, 8]], [0, 5])}))
    with pytest.raises(DataError, match=r"test.json, user 'eve', row 1 \(from 0\): no training row .* the label 5"):
        load(tmp_path)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*train"):
        load(tmp_path)
    write(tmp_path, train=leaf(TRAIN), train_2=leaf({"bob": ([[1, 1]], [0])}))
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match=r"train_2.json, user 'bob': .*train.json, user 'bob' is there as well"):
        load(tmp_path)
    (tmp_path / "train" / "train_2.json").unlink()
    with pytest.raises(DataError, match=r"test has no .json files"):
        load(tmp_path)
    write(tmp_path, test=leaf({"ann": ([], [])}))
    with pytest.raises(DataError, match="test has no rows"):
        load(tmp_path)
    write(tmp_path, test=leaf(TEST))
    with pytest.raises(DataError, match=r"user 'ann': x has 2 numbers a row, and data.shape is \[3\]"):
        load(tmp_path, shape=[3])


@pytest.mark.parametrize("field", [{"shape": []}, {"shape": [0, 4]}, {"vocabulary": "a"}, {"vocabulary": "aa"}])
def test_what_makes_no_sense_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Leaf.model_validate({"folder": "f"} | field)
