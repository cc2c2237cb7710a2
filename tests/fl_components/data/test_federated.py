from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from fl_components.data.federated import ClientExamples, FederatedData
from fl_components.errors import DataError


def arrays(**changes: Any) -> dict[str, Any]:
    """Two clients with 3 and 2 training rows; only the second has a test row."""
    return {
        "client_ids": ("north", "south"),
        "x_train": np.arange(10, dtype=np.float32).reshape(5, 2),
        "y_train": np.array([0, 1, 1, 0, 0]),
        "train_offsets": np.array([0, 3, 5]),
        "x_test": np.zeros((1, 2), np.float32),
        "y_test": np.array([0]),
        "test_offsets": np.array([0, 0, 1]),
        "num_classes": 2,
        "public": False,
    } | changes


def test_access() -> None:
    data = FederatedData(**arrays())
    assert (data.num_clients, data.input_shape) == (2, (2,))
    assert [data.num_examples(i) for i in range(2)] == [3, 2]
    x, y = data.train(1)
    assert x.tolist() == [[6, 7], [8, 9]] and y.tolist() == [0, 0]
    assert [len(data.test(i)[1]) for i in range(2)] == [0, 1]
    with pytest.raises(FrozenInstanceError):
        data.public = True  # type: ignore[misc]


def test_baselines_by_hand() -> None:
    # Of five labels 0 is most frequent, at north 1, at south 0; a tie goes to the smaller label.
    data = FederatedData(
        **arrays(x_test=np.zeros((4, 2), np.float32), y_test=np.array([1, 1, 0, 1]), test_offsets=np.array([0, 3, 4]))
    )
    assert data.baselines() == {"pooled_majority": 1 / 4, "client_majority": 2 / 4}
    tie = FederatedData(**arrays(y_train=np.array([1, 0, 1, 1, 0])))
    assert tie.baselines() == {"pooled_majority": 0.0, "client_majority": 1.0}


def test_tokens_are_int64() -> None:
    data = FederatedData(**arrays(x_train=np.ones((5, 4), np.int64), x_test=np.ones((1, 4), np.int64)))
    assert data.input_shape == (4,)


def with_value(value: float, row: int, feature: int) -> np.ndarray:
    x = np.zeros((5, 2), np.float32)
    x[row, feature] = value
    return x


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": with_value(np.nan, 4, 1)}, r"client 'south', training row 1 \(from 0\), has nan as feature 1"),
        ({"x_train": with_value(-np.inf, 2, 0)}, r"client 'north', training row 2 \(from 0\), has -inf as feature 0"),
        ({"x_test": np.full((1, 2), np.nan, np.float32)}, r"client 'south', test row 0"),
        ({"train_offsets": np.array([0, 5, 5])}, "client 'south' has no training rows"),
        ({"y_train": np.array([0, 1, 2, 0, 0])}, "client 'north', training row 2 .* has the label 2"),
        ({"y_train": np.array([0, 1, 1, -1, 0])}, "client 'south', training row 0 .* has the label -1"),
        ({"y_test": np.array([2])}, "client 'south', test row 0 .* has the label 2"),
        ({"y_train": np.array([0.0, 1, 1, 0, 0])}, "labels are float64"),
        ({"y_train": np.zeros((5, 1), np.int64)}, r"int64 of shape \[5, 1\]"),
        ({"y_train": np.zeros(4, np.int64)}, "5 training rows of features and 4 labels"),
        ({"x_train": np.zeros((5, 2))}, "features are float64"),
        ({"x_train": np.zeros(5, np.float32)}, "no feature axis"),
        ({"x_train": np.zeros((5, 0), np.float32)}, "no feature axis"),
        ({"x_test": np.zeros((1, 3), np.float32)}, r"float32 \[2\] and test rows float32 \[3\]"),
        ({"x_test": np.zeros((1, 2), np.int64)}, r"float32 \[2\] and test rows int64 \[2\]"),
        ({"train_offsets": np.array([0, 5])}, "offsets do not cut 5 rows into 2 clients"),
        ({"train_offsets": np.array([0, 3, 4])}, "offsets do not cut"),
        ({"train_offsets": np.array([0, 6, 5])}, "offsets do not cut"),
        ({"train_offsets": np.array([1, 3, 5])}, "offsets do not cut"),
        ({"test_offsets": np.array([0.0, 0.0, 1.0])}, "test offsets do not cut"),
        ({"num_classes": 1}, r"1 class\(es\)"),
        ({"client_ids": ()}, "no clients"),
        ({"client_ids": ("north", "north")}, "two clients have the id 'north'"),
        ({"client_ids": ("north", "")}, "client id '' cannot be used"),
        ({"client_ids": ("north", "../south")}, "'../south' cannot"),
        ({"client_ids": ("north", "a/b")}, "'a/b' cannot"),
        ({"client_ids": ("north", "s" * 101)}, "cannot be used"),
        ({"client_ids": ("north", 7)}, "client id 7 cannot"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        FederatedData(**arrays(**changes))
    assert caught.value.hint


def test_a_bad_value_in_an_image_is_found() -> None:
    x = np.zeros((5, 3, 4), np.float32)
    x[3, 2, 1] = np.inf
    with pytest.raises(DataError, match=r"'south', training row 0 .* inf as feature \[2, 1\]"):
        FederatedData(**arrays(x_train=x, x_test=np.zeros((1, 3, 4), np.float32)))


def examples(rows: int, test_rows: int, features: int = 2, dtype: Any = np.float32) -> ClientExamples:
    return ClientExamples(
        np.ones((rows, features), dtype),
        np.ones(rows, np.int64),
        np.ones((test_rows, features), dtype),
        np.zeros(test_rows, np.int64),
    )


def test_joining_clients() -> None:
    data = FederatedData.from_clients({"a": examples(2, 0), "Zürich 2": examples(1, 3)}, num_classes=2, public=True)
    assert data.client_ids == ("a", "Zürich 2")
    assert data.train_offsets.tolist() == [0, 2, 3] and data.test_offsets.tolist() == [0, 0, 3]
    assert FederatedData.from_clients({"a": examples(1, 0)}, num_classes=2, public=True).x_test.shape == (0, 2)


@pytest.mark.parametrize(
    ("clients", "words"),
    [
        ({}, "no clients"),
        ({"a": examples(0, 1), "b": examples(1, 1)}, "client 'a' has no training rows"),
        ({"a": examples(1, 1), "b": examples(1, 1, features=3)}, r"'b' has rows of float32 \[3\], and client 'a' of"),
        ({"a": examples(1, 1), "b": examples(1, 1, dtype=np.int64)}, r"'b' has rows of int64 \[2\]"),
    ],
)
def test_clients_that_do_not_go_together(clients: dict[str, ClientExamples], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        FederatedData.from_clients(clients, num_classes=2, public=False)
    assert caught.value.hint
