"""The workloads' models in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.peers.measure import Task


def module(task: Task) -> nn.Sequential:
    """The workload's model with its initial parameters; takes images [B, 784]."""
    layers: list[nn.Module]
    if task.model == "mlp":
        layers = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)]
    else:
        layers = [nn.Unflatten(1, (1, 28, 28))]
        layers += [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10)]
    model = nn.Sequential(*layers)
    load(model, task.initial)
    return model


def load(model: nn.Module, arrays: Sequence[NDArray[np.float32]]) -> None:
    """Put the arrays into the parameters, in their order."""
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), arrays, strict=True):
            parameter.copy_(torch.from_numpy(array))


def accuracy(model: nn.Module, task: Task) -> float:
    """On the test images."""
    _, _, x_test, y_test = (torch.from_numpy(array) for array in task.images)
    with torch.no_grad():
        hits = [model(x).argmax(1) == y for x, y in zip(x_test.split(1000), y_test.split(1000), strict=True)]
    return float(torch.cat(hits).double().mean())
