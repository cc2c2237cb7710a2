"""MNIST, EMNIST and FEMNIST, from files written here; and MNIST's own files where there are some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.data import Emnist, Femnist, Mnist
from fedrounds.fl_components.data.partition import Iid, Natural, Shards
from fedrounds.fl_components.errors import DataError
from tests.fl_components.data.idx_files import pixels, write_emnist, write_femnist, write_idx, write_mnist
from tests.support import public_data


class TestMnist:
    def test_pixels_are_scaled_and_stay_with_their_labels(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        data = Mnist(folder=str(tmp_path), partition=Iid(num_clients=7)).load(seed=0)
        assert (data.input_shape, data.num_classes, data.num_clients, data.public) == ((1, 28, 28), 10, 7, False)
        label_of = {image.tobytes(): row % 10 for row, image in enumerate(pixels(300))}
        found = np.rint(data.x_train * 255).astype(np.uint8)
        assert [label_of[image.tobytes()] for image in found] == data.y_train.tolist()
        np.testing.assert_array_equal(data.x_test[:, 0], (pixels(20, seed=1) / np.float32(255)).astype(np.float32))

    def test_test_rows_are_nobodys(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        data = Mnist(folder=str(tmp_path)).load(seed=0)
        assert not data.test_rows.lengths.any() and len(data.unowned_test()[1]) == 20
        assert set(data.baselines()) == {"pooled_majority"}

    def test_nobody_made_mnist(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        with pytest.raises(DataError, match="partition natural needs data that says who made each row"):
            Mnist(folder=str(tmp_path), partition=Natural()).load(seed=0)

    def test_files_that_are_swapped_are_refused(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        (tmp_path / "t10k-labels-idx1-ubyte").rename(tmp_path / "t10k-images-idx3-ubyte")
        (tmp_path / "t10k-images-idx3-ubyte.gz").rename(tmp_path / "t10k-labels-idx1-ubyte.gz")
        with pytest.raises(
            DataError, match=r"t10k-images-idx3-ubyte has uint8 of shape \[20\], which cannot be images"
        ):
            Mnist(folder=str(tmp_path)).load(seed=0)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        write_mnist(tmp_path)
        (tmp_path / "train-labels-idx1-ubyte").unlink()
        with pytest.raises(DataError, match="and not train-labels-idx1-ubyte"):
            Mnist(folder=str(tmp_path)).load(seed=0)


class TestEmnist:
    @pytest.mark.parametrize(
        ("split", "num_classes", "first"),
        [
            ("balanced", 47, 0),
            ("byclass", 62, 0),
            ("bymerge", 47, 0),
            ("digits", 10, 0),
            ("letters", 26, 1),
            ("mnist", 10, 0),
        ],
    )
    def test_every_split_has_its_classes(self, tmp_path: Path, split: Any, num_classes: int, first: int) -> None:
        write_emnist(tmp_path, split, num_classes, first)
        data = Emnist(split=split, folder=str(tmp_path), partition=Iid(num_clients=3)).load(seed=0)
        assert data.num_classes == num_classes
        assert np.array_equal(np.unique(data.y_train), np.arange(num_classes))

    def test_images_are_turned_upright(self, tmp_path: Path) -> None:
        write_emnist(tmp_path, "balanced", 47)
        data = Emnist(folder=str(tmp_path)).load(seed=0)
        stored = pixels(30, seed=1) / np.float32(255)
        assert data.input_shape == (1, 28, 28)
        for image, as_stored in zip(data.x_test[:, 0], stored, strict=True):
            np.testing.assert_array_equal(image, as_stored.T)
        turned = {(image / np.float32(255)).T.tobytes() for image in pixels(130, seed=0)}
        assert {image.tobytes() for image in data.x_train[:, 0]} == turned  # in the order of the partition

    def test_another_split_is_not_found(self, tmp_path: Path) -> None:
        write_emnist(tmp_path, "balanced", 47)
        with pytest.raises(DataError) as caught:
            Emnist(split="letters", folder=str(tmp_path)).load(seed=0)
        assert caught.value.hint is not None and "emnist-letters-train-images-idx3-ubyte" in caught.value.hint


class TestFemnist:
    def test_a_client_is_a_writer_with_the_writers_test_rows(self, tmp_path: Path) -> None:
        write_femnist(tmp_path)
        data = Femnist(folder=str(tmp_path)).load(seed=0)
        assert data.client_ids == ("client-0002", "client-0005", "client-3000")
        assert [data.num_examples(i) for i in range(3)] == [44, 43, 43]
        x = pixels(130) / np.float32(255)
        for client in range(3):
            np.testing.assert_array_equal(data.train(client)[0][:, 0], x[client::3])
        assert [data.test(i)[1].tolist() for i in range(3)] == [[2, 3, 6], [7], [1, 5]]
        assert data.unowned_test()[1].tolist() == [0, 4]  # of writer 9, who has no training rows
        np.testing.assert_array_equal(data.test(1)[0][0, 0], pixels(8, seed=1)[7] / np.float32(255))

    def test_in_another_partition_test_rows_are_nobodys(self, tmp_path: Path) -> None:
        write_femnist(tmp_path)
        data = Femnist(folder=str(tmp_path), partition=Shards(num_clients=4)).load(seed=0)
        assert data.num_clients == 4
        assert not data.test_rows.lengths.any() and len(data.unowned_test()[1]) == 8

    @pytest.mark.parametrize(
        ("writers", "words"),
        [
            (np.zeros(129, np.int32), "train-images.* has 130 entries and .*train-writers-idx1-int 129"),
            (np.zeros(130, np.float32), "train-writers-idx1-int has float32 .* cannot be writers"),
            (np.zeros((130, 2), np.int32), r"shape \[130, 2\], which cannot be writers"),
        ],
    )
    def test_a_wrong_file_of_writers_is_refused(self, tmp_path: Path, writers: np.ndarray, words: str) -> None:
        write_femnist(tmp_path)
        write_idx(tmp_path / "femnist-train-writers-idx1-int", writers)
        with pytest.raises(DataError, match=words):
            Femnist(folder=str(tmp_path)).load(seed=0)


def test_the_mnist_that_everyone_has(home: Path) -> None:
    with public_data():
        data = Mnist(partition=Shards(num_clients=100)).load(seed=0)
    assert [data.num_examples(client) for client in range(100)] == [600] * 100
    # Counts of the data set's own description, and the mean and deviation that are in use everywhere.
    assert np.bincount(data.y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(data.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixel_mean = data.x_train.mean(dtype=np.float64)
    assert (pixel_mean, data.x_train.std(dtype=np.float64)) == pytest.approx((0.1307, 0.3081), abs=1e-4)
    assert max(np.count_nonzero(data.label_counts(client)) for client in range(100)) <= 4
