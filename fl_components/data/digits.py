"""Digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, dealt out to clients."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.federated import FederatedData, RowRanges
from fedrounds.fl_components.data.partition import Iid, Partition
from fedrounds.fl_components.data.partition.base import generator
from fedrounds.fl_components.errors import DataError


class Digits(DataRule):
    """The UCI handwritten digits (Alpaydin and Kaynak, 1998) that scikit-learn ships; public, needs no network.

    The partition deals all rows out, and of each client's `test_fraction`, rounded down, are test rows. Inputs are 64
    pixels in [0, 1], and there are 10 classes.

    >>> data = Digits(partition=Iid(num_clients=4)).load(seed=0)
    >>> data.num_examples(0), data.input_shape, data.num_classes
    (360, (64,), 10)
    """

    kind: Literal["digits"] = "digits"
    public: ClassVar[bool] = True
    partition: Partition = Iid(num_clients=10)
    test_fraction: float = Field(default=0.2, ge=0.0, lt=1.0)

    @property
    def is_well_known(self) -> bool:
        return True

    def known_num_clients(self) -> int | None:
        return self.partition.known_num_clients()

    def load(self, seed: int) -> FederatedData:
        """Raises `DataError` when the partition would leave a client without rows, or share test rows."""
        from sklearn.datasets import load_digits  # a second to import: only when it is used

        x, y = load_digits(return_X_y=True)
        x, y = (x / 16.0).astype(np.float32), y.astype(np.int64)
        dealt = self.partition.deal(y, generator(seed))
        x, y, rows = x[dealt.order], y[dealt.order], dealt.rows
        num_test = (self.test_fraction * rows.lengths).astype(np.int64)
        if num_test.any() and np.any(rows.starts[1:] < rows.stops[:-1]):
            raise DataError(
                f"{len(dealt.client_ids)} clients share {len(y)} rows of digits: one's test rows would be another's "
                "training rows",
                hint="set data.test_fraction to 0, or make num_clients or examples_per_client smaller",
            )
        before_n = np.cumsum(num_test) - num_test  # test rows of the clients before
        test = np.arange(num_test.sum()) + np.repeat(rows.starts - before_n, num_test)
        train_starts = rows.starts - before_n
        return FederatedData(
            client_ids=dealt.client_ids,
            x_train=np.delete(x, test, axis=0),
            y_train=np.delete(y, test),
            train_rows=RowRanges(train_starts, train_starts + rows.lengths - num_test),
            x_test=x[test],
            y_test=y[test],
            test_rows=RowRanges.consecutive(num_test),
            num_classes=10,
            public=self.public,
        )
