"""What a partition made of a data set: how many examples clients have, and of which labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.data.cells import is_number
from fedrounds.fl_components.data.federated import FederatedData

_MAX_BINS: Final = 12
_SHOWN_CLIENTS: Final = 20
_LISTED_CLIENTS: Final = 1000
_TRUTH: Final = {
    **dict.fromkeys(("no", "n", "false", "f", "nein", "non", "negative", "neg"), "0"),
    **dict.fromkeys(("yes", "y", "true", "t", "ja", "j", "oui", "positive", "pos"), "1"),
}


def summary(data: FederatedData) -> dict[str, Any]:
    """Plain numbers about the training rows, in O(clients + rows).

    Returns:
      num_clients: how many clients there are.
      examples: min, median, mean and max of the clients' training rows.
      size_histogram: at most 12 bins [low, high, clients]; a client with `low` to `high` training rows, both included,
        is counted in it.
      class_names: what the labels stand for, in the order of `labels`.
      labels: how often each label occurs in the table of training rows; where clients' rows overlap, once a row.
      client_labels: the same for each of the first 20 clients, by id. All three are empty where targets are numbers.

    >>> from fedrounds.fl_components.data.heart_disease import HeartDisease
    >>> made = summary(HeartDisease().load(seed=0))
    >>> made["num_clients"], made["examples"], made["labels"]
    (4, {'min': 30, 'median': 128.5, 'mean': 121.5, 'max': 199}, [234, 252])
    >>> made["client_labels"]["va"]
    [19, 66]
    """
    sizes_n, has_classes = data.train_rows.lengths, data.num_classes > 0
    return {
        "num_clients": data.num_clients,
        "examples": {
            "min": int(sizes_n.min()),
            "median": float(np.median(sizes_n)),
            "mean": float(sizes_n.mean()),
            "max": int(sizes_n.max()),
        },
        "size_histogram": _histogram(sizes_n),
        "class_names": list(data.shown_classes),
        "labels": _label_counts(data),
        "client_labels": {
            data.client_ids[client]: data.label_counts(client).tolist()
            for client in range(min(_SHOWN_CLIENTS, data.num_clients) if has_classes else 0)
        },
    }


def classes(data: FederatedData) -> list[dict[str, Any]]:
    """Return each class, in the order of the labels, with the clients that have training rows of it.

    Returns:
      class: its name or, where classes have none, its number.
      rows: how often its label occurs in the table of training rows.
      num_clients: how many clients have training rows of it.
      clients: the ids of these clients, or of those that have none where these are fewer, at most 1,000.
      all_but: whether `clients` are those that have none.

    >>> from fedrounds.fl_components.data.heart_disease import HeartDisease
    >>> classes(HeartDisease().load(seed=0))[1]
    {'class': 'disease', 'rows': 252, 'num_clients': 4, 'clients': [], 'all_but': True}
    """
    counts = _label_counts(data)
    found = []
    for label, name in enumerate(data.shown_classes):
        having = data.clients_with(label)
        all_but = 2 * len(having) > data.num_clients
        listed = np.delete(np.arange(data.num_clients), having) if all_but else having
        found.append(
            {
                "class": name,
                "rows": counts[label],
                "num_clients": len(having),
                "clients": [data.client_ids[client] for client in listed[:_LISTED_CLIENTS].tolist()],
                "all_but": all_but,
            }
        )
    return found


def _label_counts(data: FederatedData) -> list[int]:
    """How often each label occurs in the table of training rows."""
    counted: list[int] = []
    if data.num_classes:
        counted = np.bincount(data.y_train[data.y_train != IGNORED], minlength=data.num_classes).tolist()
    return counted


def look_alikes(class_names: Sequence[str]) -> list[list[str]]:
    """Return groups of classes whose names may be spellings of one.

    They differ in case, blanks or signs, in leading zeros, or in the word for yes and no.

    >>> look_alikes(["0", "1", "No", "no", "yes", "Yes ", "unknown"])
    [['0', 'No', 'no'], ['1', 'yes', 'Yes ']]
    >>> look_alikes(["mild", "severe", "-1", "1"]), look_alikes(["1", "01"])
    ([], [['1', '01']])
    """
    groups: dict[str, list[str]] = {}
    for name in class_names:
        groups.setdefault(_spelling(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _spelling(name: str) -> str:
    if is_number(name):
        return name
    words = re.sub(r"[\W_]+", "", name.casefold())
    if not words:
        return name
    if words.isdecimal():
        return words.lstrip("0") or "0"
    return _TRUTH.get(words, words)


def _histogram(sizes_n: NDArray[np.int64]) -> list[list[int]]:
    smallest, largest = int(sizes_n.min()), int(sizes_n.max())
    width = -(-(largest - smallest + 1) // _MAX_BINS)
    counts = np.bincount((sizes_n - smallest) // width).tolist()
    lows = range(smallest, largest + 1, width)
    return [[low, min(low + width - 1, largest), count] for low, count in zip(lows, counts, strict=True)]
