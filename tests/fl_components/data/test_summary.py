from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.data.client_ids import NumberedIds
from fedrounds.fl_components.data.federated import FederatedData, RowRanges
from fedrounds.fl_components.data.summary import classes, summary


def table(labels: np.ndarray, rows: RowRanges, num_classes: int) -> FederatedData:
    x = np.zeros((len(labels), 1), np.float32)
    nothing = np.zeros_like(rows.starts)
    return FederatedData(
        client_ids=NumberedIds(len(rows.starts)),
        x_train=x,
        y_train=labels,
        train_rows=rows,
        x_test=x[:0],
        y_test=labels[:0],
        test_rows=RowRanges(nothing, nothing),
        num_classes=num_classes,
        public=True,
    )


def test_by_hand() -> None:
    made = summary(table(np.array([0, 2, 2, 0, 0, 0]), RowRanges.consecutive([1, 2, 3]), num_classes=3))
    assert made == {
        "num_clients": 3,
        "examples": {"min": 1, "median": 2.0, "mean": 2.0, "max": 3},
        "size_histogram": [[1, 1, 1], [2, 2, 1], [3, 3, 1]],
        "class_names": ["0", "1", "2"],
        "labels": [4, 0, 2],
        "client_labels": {"client-0000": [1, 0, 0], "client-0001": [0, 0, 2], "client-0002": [3, 0, 0]},
    }
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize("largest", [1, 11, 12, 13, 24, 25, 1000])
def test_bins_join_up_and_hold_every_client(largest: int) -> None:
    sizes = np.concatenate([np.arange(1, largest + 1), np.ones(5, int)])
    made = summary(table(np.zeros(sizes.sum(), np.int64), RowRanges.consecutive(sizes), num_classes=2))
    bins = made["size_histogram"]
    assert len(bins) <= 12
    assert (bins[0][0], bins[-1][1]) == (1, largest)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bins))
    assert [count for _, _, count in bins] == [int(((sizes >= low) & (sizes <= high)).sum()) for low, high, _ in bins]


def test_positions_that_do_not_count_are_not_counted() -> None:
    labels = np.array([[0, 1, IGNORED], [1, 1, IGNORED]])
    made = summary(table(labels, RowRanges.consecutive([1, 1]), num_classes=2))
    assert made["labels"] == [1, 3]
    assert made["client_labels"]["client-0001"] == [0, 2]


def test_a_million_clients_whose_rows_overlap() -> None:
    starts = np.arange(1_000_000) % 90
    made = summary(table(np.arange(100) % 10, RowRanges(starts, starts + 10), num_classes=10))
    assert made["num_clients"] == 1_000_000
    assert made["size_histogram"] == [[10, 10, 1_000_000]]
    assert made["labels"] == [10] * 10  # of the table
    assert len(made["client_labels"]) == 20
    assert made["client_labels"]["client-000007"] == [1] * 10


def test_classes_name_the_clients_that_have_them() -> None:
    made = classes(table(np.array([0, 2, 2, 0, 0, 2]), RowRanges.consecutive([1, 2, 3]), num_classes=3))
    assert [(each["class"], each["rows"], each["num_clients"], each["clients"], each["all_but"]) for each in made] == [
        ("0", 3, 2, ["client-0001"], True),
        ("1", 0, 0, [], False),
        ("2", 3, 2, ["client-0000"], True),
    ]
    assert json.loads(json.dumps(made)) == made


def test_classes_of_positions_and_of_overlapping_rows() -> None:
    labels = np.array([[0, 1], [1, 1], [IGNORED, 1]])
    made = classes(table(labels, RowRanges(np.array([0, 1, 0]), np.array([1, 3, 3])), num_classes=2))
    assert [each["num_clients"] for each in made] == [2, 3]
