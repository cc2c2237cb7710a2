"""The IDX form of MNIST's files (LeCun, Cortes and Burges, "The MNIST database of handwritten digits").

Two zero bytes, a byte for the type of the values, a byte for the number of dimensions, each dimension in four bytes,
then the values: all big-endian. Files may be compressed with gzip.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.data.federated import Labels
from fedrounds.fl_components.data.files import unreadable
from fedrounds.fl_components.data.folders import find_file
from fedrounds.fl_components.errors import DataError

_TYPES: Final = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_DIMENSIONS: Final = range(1, 33)
_ANEW: Final = "get the file anew: it is damaged, or another kind of file"


def read_idx(file: Path) -> NDArray[Any]:
    """The array in an IDX file, in its own type and shape. Raises `DataError` when it is anything else.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    >>> read_idx(file)
    array([7, 9], dtype=uint8)
    """
    content = content_of(file)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES or content[3] not in _DIMENSIONS:
        raise DataError(f"{file} is not an IDX file: it begins with the bytes {content[:4].hex(' ')!r}", hint=_ANEW)
    dtype, start = np.dtype(_TYPES[content[2]]), 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{file} ends after {len(content)} bytes, within its header", hint=_ANEW)
    shape = [int(size) for size in np.frombuffer(content, ">u4", count=content[3], offset=4)]
    if 0 in shape:
        raise DataError(f"{file} has no values: its header has the shape {shape}", hint=_ANEW)
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise DataError(
            f"{file} has {len(content)} bytes (uncompressed) where its header, of shape {shape}, makes {expected}",
            hint="get the file anew: it was cut short" if len(content) < expected else _ANEW,
        )
    values = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def read_images(
    folder: Path, images: str, labels: str, *, num_classes: int, first_label: int = 0
) -> tuple[NDArray[np.uint8], Labels]:
    """Pixels uint8 [M, 28, 28] and labels int64 [M] from 0, of two files that belong together.

    `first_label` is the number that the file has for label 0. Raises `DataError` when one is missing or damaged, when
    they do not belong together, or when a label is none of `num_classes`.
    """
    images_file, pixels = _read(folder, images, "images", 3, "u")
    labels_file, y = _read(folder, labels, "labels", 1, "u")
    if pixels.shape[1:] != (28, 28):
        raise DataError(
            f"{images_file} has images of {pixels.shape[1]} x {pixels.shape[2]} pixels where they should be 28 x 28",
            hint="get the file anew: it is of another data set",
        )
    check_same_length(images_file, pixels, labels_file, y)
    wrong = np.flatnonzero((y < first_label) | (y >= first_label + num_classes))
    if wrong.size:
        raise DataError(
            f"{labels_file}, label {wrong[0]} (from 0) is {y[wrong[0]]}",
            hint=f"labels are {first_label} to {first_label + num_classes - 1}: get the file anew, or check "
            "whether it is of this data set",
        )
    return pixels, y.astype(np.int64) - first_label


def read_numbers(folder: Path, name: str, what: str) -> tuple[Path, NDArray[np.int64]]:
    """The file and its whole numbers [M], of any integer type."""
    file, values = _read(folder, name, what, 1, "iu")
    return file, values.astype(np.int64)


def check_same_length(file: Path, values: NDArray[Any], other_file: Path, others: NDArray[Any]) -> None:
    """Raises `DataError` when the two files cannot belong together."""
    if len(values) != len(others):
        raise DataError(
            f"{file} has {len(values)} entries and {other_file} {len(others)}",
            hint="the two do not belong together: get both anew, from one place",
        )


def _read(folder: Path, name: str, what: str, num_dimensions: int, kinds: str) -> tuple[Path, NDArray[Any]]:
    file = find_file(folder, name)
    if file is None:
        raise DataError(f"{folder / name} does not exist", hint=f"put {name}, or {name}.gz, there")
    values = read_idx(file)
    if values.ndim != num_dimensions or values.dtype.kind not in kinds:
        raise DataError(
            f"{file} has {values.dtype} of shape {list(values.shape)}, which cannot be {what}",
            hint="check whether files have been mixed up, or get the file anew",
        )
    return file, values


def content_of(file: Path) -> bytes:
    """The bytes of a file, uncompressed. Raises `DataError` when it cannot be read, or is empty."""
    try:
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error
    if not content:
        raise DataError(f"{file} is empty", hint="get the file anew")
    if content[:2] != b"\x1f\x8b" and file.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be uncompressed: {error}", hint="get the file anew: it is damaged") from error
