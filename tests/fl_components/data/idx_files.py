"""IDX files and small image data sets, written for tests."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

_CODES = {"uint8": 8, "int8": 9, "int16": 11, "int32": 12, "float32": 13, "float64": 14}


def idx(values: np.ndarray) -> bytes:
    """The content of an IDX file, as the description of the form has it."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, _CODES[values.dtype.name], values.ndim, *values.shape)
    return header + values.astype(values.dtype.newbyteorder(">")).tobytes()


def write_idx(file: Path, values: np.ndarray) -> None:
    """Compressed where the name ends in .gz."""
    content = idx(values)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def pixels(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 28, 28), dtype=np.uint8)


def labels(rows: int, num_classes: int, first: int = 0) -> np.ndarray:
    return (np.arange(rows) % num_classes + first).astype(np.uint8)


def write_mnist(folder: Path, rows: int = 300, test_rows: int = 20) -> None:
    for part, number, seed in (("train", rows, 0), ("t10k", test_rows, 1)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels(number, seed))
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels(number, 10))


def write_emnist(folder: Path, split: str, num_classes: int, first: int = 0) -> None:
    for part, number, seed in (("train", 130, 0), ("test", 30, 1)):
        write_idx(folder / f"emnist-{split}-{part}-images-idx3-ubyte", pixels(number, seed))
        write_idx(folder / f"emnist-{split}-{part}-labels-idx1-ubyte.gz", labels(number, num_classes, first))


def write_femnist(folder: Path) -> None:
    """130 images by the writers 2, 5 and 3000 in turn, and 8 to test on, two of them by writer 9."""
    writers = {"train": np.array([2, 5, 3000] * 44)[:130], "test": np.array([9, 3000, 2, 2, 9, 3000, 2, 5])}
    for seed, (part, numbers) in enumerate(writers.items()):
        write_idx(folder / f"femnist-{part}-images-idx3-ubyte", pixels(len(numbers), seed))
        write_idx(folder / f"femnist-{part}-labels-idx1-ubyte", labels(len(numbers), 62))
        write_idx(folder / f"femnist-{part}-writers-idx1-int", numbers.astype(np.int32))
