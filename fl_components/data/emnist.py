"""EMNIST: handwritten digits and letters in the form of MNIST."""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final, Literal

from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.federated import FederatedData
from fedrounds.fl_components.data.folders import find_folder
from fedrounds.fl_components.data.idx import read_images
from fedrounds.fl_components.data.partition import Iid, Partition
from fedrounds.fl_components.data.partition.base import federate

CHARACTERS: Final = digits + ascii_uppercase + ascii_lowercase
"""What the labels of `byclass` stand for, in their order."""

_CLASSES: Final = {
    "balanced": digits + ascii_uppercase + "abdefghnqrt",  # other lower case letters count as their upper case
    "byclass": CHARACTERS,
    "bymerge": digits + ascii_uppercase + "abdefghnqrt",
    "digits": digits,
    "letters": ascii_uppercase,  # of either case
    "mnist": digits,
}


class Emnist(DataRule):
    """EMNIST (Cohen, Afshar, Tapson and van Schaik, 2017), in one of its six splits.

    Read from the four IDX files of the split, `emnist-SPLIT-train-images-idx3-ubyte` and so on, in `folder` or where
    `find_folder` looks. They hold images transposed: they are turned, so that inputs are upright as MNIST's, float32
    [1, 28, 28] in [0, 1]. The split `letters` numbers its labels from 1 in the files, and from 0 here.

    Args:
      split: which of the six.
      partition: how the training rows are dealt out to clients.
      folder: where the files are.
      public: True for the published files, or others that anyone may download: they have no known checksum.
    """

    kind: Literal["emnist"] = "emnist"
    split: Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"] = "balanced"
    partition: Partition = Iid(num_clients=100)
    folder: str | None = None
    public: bool = False

    def known_num_clients(self) -> int | None:
        return self.partition.known_num_clients()

    def load(self, seed: int) -> FederatedData:
        """Raises `DataError` when a file is missing or damaged, or the partition leaves a client without rows."""
        train, test = (
            (f"emnist-{self.split}-{part}-images-idx3-ubyte", f"emnist-{self.split}-{part}-labels-idx1-ubyte")
            for part in ("train", "test")
        )
        folder = find_folder("emnist", [*train, *test], self.folder)
        names, first_label = tuple(_CLASSES[self.split]), int(self.split == "letters")
        (x_train, y_train), (x_test, y_test) = (
            read_images(folder, *files, num_classes=len(names), first_label=first_label) for files in (train, test)
        )
        return federate(
            self.partition,
            seed,
            (x_train.transpose(0, 2, 1)[:, None], y_train),
            (x_test.transpose(0, 2, 1)[:, None], y_test),
            num_classes=len(names),
            class_names=names,
            public=self.public,
        )
