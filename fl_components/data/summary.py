"""What a partition made of a data set: how many examples clients have, and of which labels."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fl_components.data.federated import FederatedData
from fl_components.values import IGNORED

_MAX_BINS: Final = 12
_SHOWN_CLIENTS: Final = 20


def summary(data: FederatedData) -> dict[str, Any]:
    """Plain numbers about the training rows, in O(clients + rows).

    Returns:
      num_clients: how many clients there are.
      examples: min, median, mean and max of the clients' training rows.
      size_histogram: at most 12 bins [low, high, clients]; a client with `low` to `high` training rows, both included,
        is counted in it.
      labels: how often each label occurs in the table of training rows; where clients' rows overlap, once a row.
      client_labels: the same for each of the first 20 clients, by id.

    >>> from fl_components.data.heart_disease import HeartDisease
    >>> made = summary(HeartDisease().load(seed=0))
    >>> made["num_clients"], made["examples"], made["labels"]
    (4, {'min': 30, 'median': 128.5, 'mean': 121.5, 'max': 199}, [234, 252])
    >>> made["client_labels"]["va"]
    [19, 66]
    """
    sizes_n = data.train_rows.lengths
    return {
        "num_clients": data.num_clients,
        "examples": {
            "min": int(sizes_n.min()),
            "median": float(np.median(sizes_n)),
            "mean": float(sizes_n.mean()),
            "max": int(sizes_n.max()),
        },
        "size_histogram": _histogram(sizes_n),
        "labels": np.bincount(data.y_train[data.y_train != IGNORED], minlength=data.num_classes).tolist(),
        "client_labels": {
            data.client_ids[client]: data.label_counts(client).tolist()
            for client in range(min(_SHOWN_CLIENTS, data.num_clients))
        },
    }


def _histogram(sizes_n: NDArray[np.int64]) -> list[list[int]]:
    smallest, largest = int(sizes_n.min()), int(sizes_n.max())
    width = -(-(largest - smallest + 1) // _MAX_BINS)
    counts = np.bincount((sizes_n - smallest) // width).tolist()
    lows = range(smallest, largest + 1, width)
    return [[low, min(low + width - 1, largest), count] for low, count in zip(lows, counts, strict=True)]
