"""FEMNIST: handwritten digits and letters, with the writer of each."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.base import DataRule
from fedrounds.fl_components.data.emnist import CHARACTERS
from fedrounds.fl_components.data.federated import FederatedData, Labels
from fedrounds.fl_components.data.folders import find_folder
from fedrounds.fl_components.data.idx import check_same_length, read_images, read_numbers
from fedrounds.fl_components.data.partition import Natural, Partition
from fedrounds.fl_components.data.partition.base import federate

_NUM_CLASSES: Final = len(CHARACTERS)


class Femnist(DataRule):
    """FEMNIST (Caldas et al., 2018, "LEAF: a benchmark for federated settings"): EMNIST by writer.

    Read from six IDX files, in `folder` or where `find_folder` looks: `femnist-train-images-idx3-ubyte`,
    `femnist-train-labels-idx1-ubyte` and `femnist-train-writers-idx1-int`, and the same with `test`. A file of writers
    has one whole number an image, of 32 bits or fewer; images are upright as MNIST's and are not turned. Inputs are
    float32 [1, 28, 28] in [0, 1], labels the 62 digits and letters.

    In the natural partition a client is a writer, and has the writer's test rows; those of a writer without training
    rows are nobody's. In any other partition all test rows are nobody's.

    Args:
      partition: how the training rows are dealt out to clients.
      folder: where the files are.
      public: True for files made from LEAF's, or others that anyone may download: they have no known checksum.
    """

    kind: Literal["femnist"] = "femnist"
    partition: Partition = Natural()
    folder: str | None = None
    public: bool = False

    def known_num_clients(self) -> int | None:
        return self.partition.known_num_clients()

    def load(self, seed: int) -> FederatedData:
        """Raises `DataError` when a file is missing or damaged, or the partition leaves a client without rows."""
        train, test = _files("train"), _files("test")
        folder = find_folder("femnist", [*train, *test], self.folder)
        (x_train, y_train, writers), (x_test, y_test, test_writers) = _read(folder, *train), _read(folder, *test)
        return federate(
            self.partition,
            seed,
            (x_train[:, None], y_train),
            (x_test[:, None], y_test),
            num_classes=_NUM_CLASSES,
            class_names=tuple(CHARACTERS),
            owners_M=writers,
            test_owners=test_writers,
            public=self.public,
        )


def _files(part: str) -> tuple[str, str, str]:
    start = f"femnist-{part}"
    return f"{start}-images-idx3-ubyte", f"{start}-labels-idx1-ubyte", f"{start}-writers-idx1-int"


def _read(folder: Path, images: str, labels: str, writers: str) -> tuple[NDArray[np.uint8], Labels, NDArray[np.int64]]:
    pixels, y = read_images(folder, images, labels, num_classes=_NUM_CLASSES)
    file, numbers = read_numbers(folder, writers, "writers")
    check_same_length(folder / images, pixels, file, numbers)
    return pixels, y, numbers
