"""pfl (Granqvist et al. 2024, https://arxiv.org/abs/2404.06430): FederatedAveraging on the simulated backend, PyTorch.

Under `torchrun --nproc-per-node N` the cohort is shared by N processes, as pfl documents; the first answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.peers.measure import Task, main
from benchmarks.peers.torch_models import accuracy, module


class Classifier(nn.Module):
    """The model with the two methods that pfl calls."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.network = module(task)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.network(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Rounds(TrainingProcessCallback):
    """The seconds of each round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self._began = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
        return False, Metrics()


def members(task: Task) -> Iterator[tuple[int, int]]:
    """(round, client) in the order in which pfl asks for them: the workload's cohorts, one after the other."""
    round = 0
    while True:
        yield from ((round, client) for client in task.cohort(round))
        round += 1


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    torch.set_num_threads(1)
    x_train, y_train = (torch.from_numpy(array) for array in task.images[:2])

    def dataset(member: tuple[int, int]) -> Dataset:
        rows = task.shuffled(*member)
        return Dataset([x_train[rows], y_train[rows]])

    sampler = members(task)
    data = FederatedDataset(dataset, lambda: next(sampler))
    classifier = Classifier(task)
    model = PyTorchModel(classifier, torch.optim.SGD, torch.optim.SGD(classifier.parameters(), lr=1.0))
    clock = Rounds()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=task.cohort_size,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.learning_rate, local_batch_size=task.batch_size
        ),
        callbacks=[clock],
    )
    return clock.seconds, accuracy(classifier.network, task)


if __name__ == "__main__":
    main("pfl", run, answers=os.environ.get("RANK", "0") == "0")
