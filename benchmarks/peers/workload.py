"""The workloads that all peers train, from the files of MNIST; needs numpy alone, because every peer reads it.

W1: 1,000 clients of 60 images each, labels skewed by Dirichlet(0.3); the 2NN of 199,210 parameters; 100 clients a
round, one epoch in batches of 10 (6 steps of SGD), learning rate 0.1, FedAvg. W1u: the same with unequal clients,
10 to 300 images (log-normal). W2: the CNN of 1,663,370 parameters, 20 clients a round.

Partition, initial parameters, cohorts and shuffles follow from fixed seeds, so that engines can be compared number by
number. A file with the same names can take this one's place (`bench.py --workload FILE`): FLDATA names the folder of
MNIST's four files, FLCACHE a folder for what is prepared from them.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NCLIENTS, NPER, BATCH, LR = 1000, 60, 10, 0.1
COHORT = {"W1": 100, "W1u": 100, "W2": 20}
CLASSES = 10
LABEL_SKEW = 0.3
SIZE_SPREAD, SMALLEST, LARGEST = 0.7, 10, 300
LAYERS: dict[str, list[tuple[int, ...]]] = {  # the shape of each layer's weights
    "mlp": [(200, 784), (200, 200), (10, 200)],
    "cnn": [(32, 1, 5, 5), (64, 32, 5, 5), (512, 3136), (10, 512)],
}


def data() -> tuple[NDArray[Any], ...]:
    """Images float32 [M, 784] in [0, 1] and labels int64 [M]: of training, then of testing."""
    found = np.load(_prepared() / "images.npz")
    return tuple(found[name] for name in ("x_train", "y_train", "x_test", "y_test"))


def partition() -> NDArray[np.int64]:
    """The training rows of each client, [clients, 60]."""
    rows: NDArray[np.int64] = np.load(_prepared() / "partition.npy")
    return rows


def partition_u() -> list[NDArray[np.int64]]:
    """The training rows of each client of W1u: the same rows in the same order, cut unequally."""
    *clients, _ = np.split(partition().reshape(-1), np.cumsum(np.load(_prepared() / "sizes.npy")))
    return clients


def init(model: str) -> list[NDArray[np.float32]]:
    """The initial parameters: weight and bias of each layer, uniform within 1 / sqrt(inputs)."""
    rng = np.random.default_rng(0)
    # All models from one generator, one after the other.
    drawn = {name: [array for shape in shapes for array in _layer(rng, shape)] for name, shapes in LAYERS.items()}
    return drawn[model]


def cohort(rnd: int, m: int) -> NDArray[np.int64]:
    """The m clients of round `rnd`."""
    return np.random.default_rng([1000, rnd]).choice(NCLIENTS, m, replace=False)


def perm(rnd: int, client: int, n: int = NPER) -> NDArray[np.int64]:
    """The order in which a client goes through its n rows in round `rnd`."""
    return np.random.default_rng([7, rnd, int(client)]).permutation(n)


def _layer(rng: np.random.Generator, shape: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    weight = rng.uniform(-bound, bound, tuple(shape)).astype(np.float32)
    return weight, rng.uniform(-bound, bound, shape[0]).astype(np.float32)


def _prepared() -> Path:
    """The folder with what is made once; its last file stands when all do."""
    folder = Path(os.environ["FLCACHE"])
    if not (folder / "images.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _prepare(Path(os.environ["FLDATA"]), folder)
    return folder


def _prepare(mnist: Path, folder: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, file in (("train", "train"), ("test", "t10k")):
        arrays[f"x_{name}"] = _idx(mnist / f"{file}-images-idx3-ubyte", 16).reshape(-1, 784) / np.float32(255)
        arrays[f"y_{name}"] = _idx(mnist / f"{file}-labels-idx1-ubyte", 8).astype(np.int64)
    rng = np.random.default_rng(42)
    np.save(folder / "partition.npy", _skewed(rng, arrays["y_train"]))
    np.save(folder / "sizes.npy", _unequal_sizes(rng))
    with open(folder / "images.part", "wb") as part:
        np.savez(part, **arrays)
    (folder / "images.part").replace(folder / "images.npz")


def _idx(file: Path, header_bytes: int) -> NDArray[np.uint8]:
    packed = file.with_name(f"{file.name}.gz")
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else file.read_bytes()
    return np.frombuffer(content, np.uint8, offset=header_bytes)


def _skewed(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each client draws its labels' proportions, then row by row from the labels that are left."""
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(CLASSES)]
    rows = np.empty((NCLIENTS, NPER), np.int64)
    for client in range(NCLIENTS):
        proportions = rng.dirichlet([LABEL_SKEW] * CLASSES)
        for position in range(NPER):
            chances = np.where([bool(pool) for pool in left], proportions, 0.0)
            if not chances.sum() > 0:
                chances = np.array([float(len(pool)) for pool in left])
            label = rng.choice(CLASSES, p=chances / chances.sum())
            rows[client, position] = left[label].pop()
    return rows


def _unequal_sizes(rng: np.random.Generator) -> NDArray[np.int64]:
    """Log-normal sizes that sum to at most all rows."""
    sizes = np.exp(rng.normal(0, SIZE_SPREAD, NCLIENTS))
    sizes = np.clip(np.round(sizes / sizes.mean() * NPER), SMALLEST, LARGEST).astype(np.int64)
    while sizes.sum() > NCLIENTS * NPER:
        sizes[rng.integers(NCLIENTS)] -= 1
        sizes = np.maximum(sizes, SMALLEST)
    return sizes
