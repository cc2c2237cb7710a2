"""Federated averaging as a user of PyTorch would write it: a module, torch.optim.SGD, one client after the other."""

from __future__ import annotations

import time

import torch
from torch.nn.functional import cross_entropy

from benchmarks.peers.measure import Task, main
from benchmarks.peers.torch_models import accuracy, module


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    torch.set_num_threads(1)
    x_train, y_train = (torch.from_numpy(array) for array in task.images[:2])
    model, state = module(task), module(task).state_dict()
    seconds = []
    for round in range(rounds):
        began = time.perf_counter()
        average = {name: torch.zeros_like(value) for name, value in state.items()}
        examples = 0
        for client in task.cohort(round):
            model.load_state_dict(state)
            optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
            for rows in task.batches(round, client):
                optimizer.zero_grad()
                cross_entropy(model(x_train[rows]), y_train[rows]).backward()
                optimizer.step()
            weight = len(task.rows[client])
            for name, value in model.state_dict().items():
                average[name] += weight * value
            examples += weight
        state = {name: value / examples for name, value in average.items()}
        seconds.append(time.perf_counter() - began)
    model.load_state_dict(state)
    return seconds, accuracy(model, task)


if __name__ == "__main__":
    main("torch", run)
