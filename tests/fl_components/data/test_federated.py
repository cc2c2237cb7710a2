from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.data.federated import ClientExamples, FederatedData, RowRanges
from fedrounds.fl_components.errors import DataError


def rows(starts: list[int], stops: list[int]) -> RowRanges:
    return RowRanges(np.array(starts), np.array(stops))


def arrays(**changes: Any) -> dict[str, Any]:
    """Two clients with 3 and 2 training rows; only the second has a test row."""
    return {
        "client_ids": ("north", "south"),
        "x_train": np.arange(10, dtype=np.float32).reshape(5, 2),
        "y_train": np.array([0, 1, 1, 0, 0]),
        "train_rows": rows([0, 3], [3, 5]),
        "x_test": np.zeros((1, 2), np.float32),
        "y_test": np.array([0]),
        "test_rows": rows([0, 0], [0, 1]),
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
        **arrays(x_test=np.zeros((4, 2), np.float32), y_test=np.array([1, 1, 0, 1]), test_rows=rows([0, 3], [3, 4]))
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
        ({"train_rows": rows([0, 5], [5, 5])}, "client 'south' has no training rows"),
        ({"y_train": np.array([0, 1, 2, 0, 0])}, "client 'north', training row 2 .* has the label 2"),
        ({"y_train": np.array([0, 1, 1, -1, 0])}, "client 'south', training row 0 .* has the label -1"),
        ({"y_test": np.array([2])}, "client 'south', test row 0 .* has the label 2"),
        ({"y_train": np.array([0.0, 1, 1, 0, 0])}, "labels are float64"),
        ({"y_train": np.zeros((5, 1, 1), np.int64)}, r"int64 of shape \[5, 1, 1\]"),
        ({"y_train": np.zeros((5, 1), np.int64)}, r"training rows have labels of shape \[1\] and test rows of \[\]"),
        ({"y_train": np.zeros(4, np.int64)}, "5 training rows of features and 4 labels"),
        ({"x_train": np.zeros((5, 2))}, "features are float64"),
        ({"x_train": np.zeros(5, np.float32)}, "no feature axis"),
        ({"x_train": np.zeros((5, 0), np.float32)}, "no feature axis"),
        ({"x_test": np.zeros((1, 3), np.float32)}, r"float32 \[2\] and test rows float32 \[3\]"),
        ({"x_test": np.zeros((1, 2), np.int64)}, r"float32 \[2\] and test rows int64 \[2\]"),
        ({"train_rows": rows([0], [5])}, "given to 1 clients and there are 2"),
        ({"train_rows": rows([0, 3], [3, 6])}, "outside the 5"),
        ({"train_rows": rows([0, 6], [6, 5])}, "outside the 5"),
        ({"train_rows": rows([-1, 3], [3, 5])}, "outside the 5"),
        ({"test_rows": rows([0, 0], [1, 1])}, "do not lie in the order of the clients"),
        (
            {"x_test": np.zeros((2, 2), np.float32), "y_test": np.array([0, 1]), "test_rows": rows([1, 1], [1, 2])},
            "do not lie in the order of the clients",
        ),
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
    assert data.train_rows.stops.tolist() == [2, 3] and data.test_rows.starts.tolist() == [0, 0]
    assert data.test_rows.stops.tolist() == [0, 3]
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


def sequences(**changes: Any) -> FederatedData:
    """One client with two rows of three positions; its test row has one position that counts."""
    fields = {
        "client_ids": ("a",),
        "x_train": np.array([[0, 1, 0], [1, 2, 0]]),
        "y_train": np.array([[1, 0, 1], [2, 1, IGNORED]]),
        "train_rows": rows([0], [2]),
        "x_test": np.array([[1, 0, 1]]),
        "y_test": np.array([[IGNORED, 1, 2]]),
        "test_rows": rows([0], [1]),
        "num_classes": 3,
        "public": True,
    }
    return FederatedData(**fields | changes)


def test_labels_of_positions() -> None:
    data = sequences()
    assert (data.y_train.shape[1:], data.num_classes) == ((3,), 3)
    assert data.label_counts(0).tolist() == [1, 3, 1]
    # The most frequent token is 1; after 0 comes 1 and after 1 come 0 and 2, of which the smaller is guessed.
    assert data.baselines() == {"unigram": 0.5, "bigram": 0.5}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1, 0, 1], [IGNORED] * 3], "row 1 .* has no label that counts"),
        ([[1, 0, 3], [0, 0, 0]], "row 0 .* has the label 3"),
        ([[1, 0, -2], [0, 0, 0]], "has the label -2"),
    ],
)
def test_labels_of_positions_that_make_no_sense(labels: list[list[int]], words: str) -> None:
    with pytest.raises(DataError, match=words):
        sequences(y_train=np.array(labels))


def test_one_label_a_row_cannot_be_ignored() -> None:
    with pytest.raises(DataError, match="has the label -1"):
        FederatedData(**arrays(y_train=np.array([0, 1, IGNORED, 0, 0])))


def test_test_rows_of_nobody_stand_at_the_end() -> None:
    both = arrays(x_test=np.arange(6, dtype=np.float32).reshape(3, 2), y_test=np.array([0, 1, 1]))
    data = FederatedData(**both)
    assert data.unowned_test()[1].tolist() == [1, 1]
    assert data.baselines() == {"pooled_majority": pytest.approx(1 / 3), "client_majority": 1.0}
    nobodys = FederatedData(**both | {"test_rows": rows([0, 0], [0, 0])})
    assert len(nobodys.unowned_test()[0]) == 3
    assert nobodys.baselines() == {"pooled_majority": pytest.approx(1 / 3)}


def test_overlapping_clients_and_numbered_ids() -> None:
    data = FederatedData(
        **arrays(
            client_ids=NumberedIds(3),
            train_rows=rows([0, 1, 2], [3, 4, 5]),
            test_rows=rows([0, 0, 0], [0, 0, 0]),
        )
    )
    assert data.client_ids[2] == "client-0002" and list(data.client_ids) == data.client_ids[:3]
    assert data.train(1)[1].tolist() == [1, 1, 0]
    assert data.attribute("majority_label").tolist() == [1, 1, 0]
    with pytest.raises(IndexError):
        data.client_ids[3]


def test_of_equally_frequent_labels_the_smallest_is_the_majority() -> None:
    data = FederatedData(**arrays(y_train=np.array([1, 0, 1, 1, 0]), train_rows=rows([0, 3], [3, 5])))
    assert data.attribute("majority_label").tolist() == [1, 0]
    assert data.label_counts(1).tolist() == [1, 1]


def test_attributes() -> None:
    data = FederatedData(**arrays(attributes={"region": np.array(["north", "south"])}))
    assert data.attribute("region").tolist() == [0, 1]
    with pytest.raises(DataError, match="no attribute 'city'") as caught:
        data.attribute("city")
    assert caught.value.hint == "known are region, majority_label"
    with pytest.raises(DataError, match=r"'region' has the shape \[1\] for 2 clients"):
        FederatedData(**arrays(attributes={"region": np.array(["north"])}))
