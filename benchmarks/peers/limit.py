"""The floating-point limit: a round's matrix multiplications at the best rate at which this machine multiplies."""

from __future__ import annotations

import math
import os
import time

import torch

from benchmarks.peers.measure import Task, main

SIZES = (512, 1024, 2048)
SECONDS_PER_SIZE = 1.0


def flops_per_example(task: Task) -> int:
    """Of one step of SGD: a layer is multiplied forward, for its weights' gradient and, but the first, its inputs'."""
    places = [28 * 28, 14 * 14, 1, 1] if task.model == "cnn" else [1, 1, 1]  # where a layer is applied
    forward = [2 * math.prod(weight.shape) * at for weight, at in zip(task.initial[::2], places, strict=True)]
    return 3 * sum(forward) - forward[0]


def best_rate() -> float:
    """Floating-point operations a second of the fastest square multiplication, a thread on each core."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    best = 0.0
    for size in SIZES:
        a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
        until = time.perf_counter() + SECONDS_PER_SIZE
        while (began := time.perf_counter()) < until:
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def run(task: Task, rounds: int, setting: str) -> tuple[list[float], None]:
    rate = best_rate()
    return [flops_per_example(task) * task.num_examples(round) / rate for round in range(rounds)], None


if __name__ == "__main__":
    main("torch", run)
