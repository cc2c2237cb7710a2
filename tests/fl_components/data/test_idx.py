from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrounds.fl_components.data.idx import read_idx, read_images
from fedrounds.fl_components.errors import DataError
from tests.fl_components.data.idx_files import idx, labels, pixels, write_idx
from tests.support import cases

WHOLE = idx(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
ZIPPED = gzip.compress(WHOLE, mtime=0)  # else the time would be in the names of tests


@pytest.mark.parametrize("name", ["values", "values.gz"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "float32", "float64"])
def test_what_was_written_is_read(tmp_path: Path, dtype: str, name: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_idx(tmp_path / name, values)
    found = read_idx(tmp_path / name)
    assert found.dtype == dtype and np.array_equal(found, values)


def test_a_compressed_file_is_told_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "values").write_bytes(gzip.compress(WHOLE))
    assert read_idx(tmp_path / "values").shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a", b"", "a is empty"),
        ("a", b"\0", "a is not an IDX file"),
        ("a", b"<!DOCTYPE html>", "is not an IDX file: it begins with the bytes '3c 21 44 4f'"),
        ("a", b"\0\0\x0a\x01" + WHOLE[4:], "is not an IDX file"),
        ("a", b"\0\0\x08\0", "is not an IDX file"),
        ("a", b"\0\0\x08\x41" + b"\0\0\0\1" * 65 + b"\7", "is not an IDX file"),
        ("a", b"\0\0\x08\x04" + b"\0" * 4 + b"\xff" * 12, "has no values"),
        ("a", WHOLE[:10], "ends after 10 bytes, within its header"),
        ("a", WHOLE[:-1], r"has 63 bytes \(uncompressed\) where its header, of shape \[2, 3, 4\], makes 64"),
        ("a", WHOLE + b"\0", "has 65 bytes .* makes 64"),
        ("a", b"\0\0\x0e\x03" + b"\xff" * 12, "has 16 bytes"),
        ("a.gz", WHOLE, "cannot be uncompressed"),
        ("a.gz", ZIPPED[:-9], "cannot be uncompressed"),
        ("a.gz", ZIPPED + b"more", "cannot be uncompressed"),
        ("a.gz", ZIPPED[:-8] + b"\0" * 8, "cannot be uncompressed: CRC"),
        ("a.gz", ZIPPED[:12] + b"\xff" * 20, "cannot be uncompressed"),
        ("a.gz", gzip.compress(WHOLE + b"\0", mtime=0), "has 65 bytes"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(tmp_path / name)
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint is not None and "get the file anew" in caught.value.hint


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_idx(tmp_path)


@settings(max_examples=cases(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(compressed=st.booleans(), data=st.data())
def test_cut_anywhere_a_file_is_refused(tmp_path: Path, compressed: bool, data: st.DataObject) -> None:
    content = gzip.compress(WHOLE, mtime=0) if compressed else WHOLE
    length = data.draw(st.integers(0, len(content) - 1))
    file = tmp_path / ("cut.gz" if compressed else "cut")
    file.write_bytes(content[:length])
    with pytest.raises(DataError) as caught:
        read_idx(file)
    assert str(file) in caught.value.message and caught.value.hint


@settings(max_examples=cases(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80))
def test_any_bytes_are_an_array_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any").write_bytes(content)
    try:
        values = read_idx(tmp_path / "any")
    except DataError as error:
        assert error.hint
    else:
        assert content.endswith(values.astype(values.dtype.newbyteorder(">")).tobytes())


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_idx(tmp_path / "x", pixels(6))
        write_idx(tmp_path / "y.gz", labels(6, 3))
        return tmp_path

    def test_images_and_labels_that_belong_together(self, folder: Path) -> None:
        x, y = read_images(folder, "x", "y", num_classes=3)
        assert np.array_equal(x, pixels(6)) and x.dtype == np.uint8
        assert y.tolist() == [0, 1, 2, 0, 1, 2] and y.dtype == np.int64

    def test_labels_that_begin_at_one(self, folder: Path) -> None:
        write_idx(folder / "y", labels(6, 3, first=1))
        assert read_images(folder, "x", "y", num_classes=3, first_label=1)[1].tolist() == [0, 1, 2, 0, 1, 2]

    @pytest.mark.parametrize(
        ("images", "others", "words"),
        [
            (labels(6, 3), None, r"x has uint8 of shape \[6\], which cannot be images"),
            (None, pixels(6), r"y has uint8 of shape \[6, 28, 28\], which cannot be labels"),
            (pixels(6).astype(np.float32), None, "x has float32 .* cannot be images"),
            (None, np.zeros(6, np.int32), "y has int32 .* cannot be labels"),
            (pixels(0), None, r"x has no values: its header has the shape \[0, 28, 28\]"),
            (None, labels(5, 3), "x has 6 entries and .*y 5"),
            (None, np.array([0, 1, 2, 3, 0, 7], np.uint8), r"y, label 3 \(from 0\) is 3"),
            (pixels(6)[:, :27], None, "x has images of 27 x 28 pixels where they should be 28 x 28"),
        ],
    )
    def test_a_wrong_file_is_refused(
        self, folder: Path, images: np.ndarray | None, others: np.ndarray | None, words: str
    ) -> None:
        for name, values in (("x", images), ("y", others)):
            if values is not None:
                write_idx(folder / name, values)
        with pytest.raises(DataError, match=words) as caught:
            read_images(folder, "x", "y", num_classes=3)
        assert caught.value.hint

    def test_a_label_below_the_first_is_refused(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"label 0 \(from 0\) is 0") as caught:
            read_images(folder, "x", "y", num_classes=26, first_label=1)
        assert caught.value.hint is not None and "labels are 1 to 26" in caught.value.hint
