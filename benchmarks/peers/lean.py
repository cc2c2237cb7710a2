"""The leanest loop in PyTorch alone: functional forward, updates in place, buffers made once, one thread a process.

The setting is the number of processes: 1, or as many as share a cohort, each of which sums its clients' parameters.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, linear, max_pool2d, relu

from benchmarks.peers.measure import Task, main
from benchmarks.peers.torch_models import accuracy, load, module


class Loop:
    """Trains clients in one flat buffer of parameters."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.x_train, self.y_train = (torch.from_numpy(array) for array in task.images[:2])
        shapes = [array.shape for array in task.initial]
        self.flat_D = torch.empty(sum(shape.numel() for shape in map(torch.Size, shapes)))
        pieces = self.flat_D.split([torch.Size(shape).numel() for shape in shapes])
        self.parameters = [piece.view(shape).requires_grad_() for piece, shape in zip(pieces, shapes, strict=True)]
        self.x_B784 = torch.empty(task.batch_size, 784)
        self.y_B = torch.empty(task.batch_size, dtype=torch.int64)

    def train(self, params_D: Tensor, round: int, clients: Sequence[int], sum_D: Tensor) -> None:
        """Set `sum_D` to the clients' trained parameters, each times its number of examples."""
        sum_D.zero_()
        forward = _mlp if self.task.model == "mlp" else _cnn
        for client in clients:
            self.flat_D.copy_(params_D)
            for rows in self.task.batches(round, client):
                size, index = len(rows), torch.from_numpy(rows)
                x = torch.index_select(self.x_train, 0, index, out=self.x_B784[:size])
                y = torch.index_select(self.y_train, 0, index, out=self.y_B[:size])
                loss = cross_entropy(forward(x, *self.parameters), y)
                gradients = torch.autograd.grad(loss, self.parameters)
                with torch.no_grad():
                    torch._foreach_add_(self.parameters, gradients, alpha=-self.task.learning_rate)
            sum_D.add_(self.flat_D, alpha=len(self.task.rows[client]))


def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    return linear(relu(linear(relu(linear(x, w1, b1)), w2, b2)), w3, b3)


def _cnn(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, w4: Tensor, b4: Tensor
) -> Tensor:
    x = max_pool2d(relu(conv2d(x.view(-1, 1, 28, 28), w1, b1, padding=2)), 2)
    x = max_pool2d(relu(conv2d(x, w2, b2, padding=2)), 2)
    return linear(relu(linear(x.flatten(1), w3, b3)), w4, b4)


def _work(task: Task, params_D: Tensor, sum_D: Tensor, requests: Connection) -> None:
    """A process: for each (round, clients) that it is sent, their sum; until it is sent None."""
    torch.set_num_threads(1)
    loop = Loop(task)
    requests.send("ready")
    while (request := requests.recv()) is not None:
        round, clients = request
        loop.train(params_D, round, clients, sum_D)
        requests.send("done")


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], float]:
    torch.set_num_threads(1)
    processes = 1 if setting == "best" else int(setting)
    params_D = torch.cat([torch.from_numpy(array).reshape(-1) for array in task.initial]).share_memory_()
    sums_PD = torch.zeros(processes, len(params_D)).share_memory_()
    _ = task.images, task.rows  # loaded before the fork: shared
    seconds = []
    if processes == 1:
        loop = Loop(task)
        for round in range(rounds):
            began = time.perf_counter()
            loop.train(params_D, round, task.cohort(round), sums_PD[0])
            params_D.copy_(sums_PD[0]).div_(task.num_examples(round))
            seconds.append(time.perf_counter() - began)
    else:
        fork = multiprocessing.get_context("fork")
        pipes = [fork.Pipe() for _ in range(processes)]
        workers = [
            fork.Process(target=_work, args=(task, params_D, sum_D, theirs), daemon=True)
            for sum_D, (_, theirs) in zip(sums_PD, pipes, strict=True)
        ]
        for worker in workers:
            worker.start()
        for ours, _ in pipes:
            ours.recv()
        for round in range(rounds):
            began = time.perf_counter()
            cohort = task.cohort(round)
            for number, (ours, _) in enumerate(pipes):
                ours.send((round, cohort[number::processes]))
            for ours, _ in pipes:
                ours.recv()
            torch.sum(sums_PD, 0, out=params_D).div_(task.num_examples(round))
            seconds.append(time.perf_counter() - began)
        for ours, _ in pipes:
            ours.send(None)
        for worker in workers:
            worker.join()
    return seconds, _accuracy(task, params_D)


def _accuracy(task: Task, params_D: Tensor) -> float:
    model = module(task)
    pieces = params_D.split([array.size for array in task.initial])
    load(model, [piece.view(array.shape).numpy() for piece, array in zip(pieces, task.initial, strict=True)])
    return accuracy(model, task)


if __name__ == "__main__":
    main("torch", run)
