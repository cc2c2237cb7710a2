"""Digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, dealt out to clients at random."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from fl_components import randomness
from fl_components.data.federated import ClientExamples, FederatedData
from fl_components.data.base import DataRule


class Digits(DataRule):
    """The UCI handwritten digits (Alpaydin and Kaynak, 1998) that scikit-learn ships; public, needs no network.

    The rows are shuffled by the seed and cut into `num_clients` parts that differ by one row at most (an IID
    partition); of each part `test_fraction`, rounded down, are test rows. Inputs are 64 pixels in [0, 1], and there are
    10 classes.

    >>> data = Digits(num_clients=4).load(seed=0)
    >>> data.num_examples(0), data.input_shape, data.num_classes
    (360, (64,), 10)
    """

    kind: Literal["digits"] = "digits"
    num_clients: int = Field(default=10, ge=1, le=1797)
    test_fraction: float = Field(default=0.2, ge=0.0, lt=1.0)

    def known_num_clients(self) -> int:
        return self.num_clients

    def load(self, seed: int) -> FederatedData:
        from sklearn.datasets import load_digits  # a second to import: only when it is used

        x, y = load_digits(return_X_y=True)
        x, y = (x / 16.0).astype(np.float32), y.astype(np.int64)
        order = randomness.generator(seed, 0, "partition").permutation(len(y))
        clients: dict[str, ClientExamples] = {}
        for number, rows in enumerate(np.array_split(order, self.num_clients)):
            num_test = int(self.test_fraction * len(rows))
            test, train = rows[:num_test], rows[num_test:]
            clients[f"client-{number:04d}"] = ClientExamples(x[train], y[train], x[test], y[test])
        return FederatedData.from_clients(clients, num_classes=10, public=True)
