"""MNIST: 70,000 handwritten digits of 28 x 28 pixels."""

from __future__ import annotations

from typing import Final, Literal

from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.federated import FederatedData
from fedrounds.fl_components.data.folders import find_folder
from fedrounds.fl_components.data.idx import read_images
from fedrounds.fl_components.data.partition import Iid, Partition
from fedrounds.fl_components.data.partition.base import federate
from fedrounds.fl_components.data.well_known import are_well_known

_TRAIN: Final = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_TEST: Final = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class Mnist(DataRule):
    """MNIST (LeCun, Bottou, Bengio and Haffner, 1998): 60,000 training and 10,000 test rows, 10 classes.

    Read from its four IDX files, in `folder` or where `find_folder` looks. Inputs are pixels in [0, 1], float32
    [1, 28, 28]. The partition deals the training rows out; the test rows are nobody's.

    Args:
      partition: how the training rows are dealt out to clients.
      folder: where the files are.
      public: whether anyone may download the files. By default only if they are the published ones, by their checksums:
        files of your own in this form are private.
    """

    kind: Literal["mnist"] = "mnist"
    partition: Partition = Iid(num_clients=100)
    folder: str | None = None
    public: bool | None = None

    @property
    def is_well_known(self) -> bool:
        return are_well_known("mnist", [*_TRAIN, *_TEST], self.folder)

    def known_num_clients(self) -> int | None:
        return self.partition.known_num_clients()

    def load(self, seed: int) -> FederatedData:
        """Raises `DataError` when a file is missing or damaged, or the partition leaves a client without rows."""
        folder = find_folder("mnist", [*_TRAIN, *_TEST], self.folder)
        (x_train, y_train), (x_test, y_test) = (
            read_images(folder, *files, num_classes=10) for files in (_TRAIN, _TEST)
        )
        return federate(
            self.partition,
            seed,
            (x_train[:, None], y_train),
            (x_test[:, None], y_test),
            num_classes=10,
            public=self.is_public,
        )
