"""Every learning task trains in the same way by the reference loop, by the engine, and under an example-level claim."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.task import Classification, LearningTask, Regression
from fedrounds.fl_components.training import SGD, CanaryClient, ExampleTable, grad_sampler_name
from fedrounds.fl_components.training.engine import Engine
from fedrounds.fl_components.values import SimulatedClient

SIZES = (9, 5, 7)
PRIVATE = {"kind": "example_level", "noise_multiplier": 0.5, "max_grad_norm": 0.3, "sampling_rate": 0.5}
TASKS = pytest.mark.parametrize(("task", "num_outputs"), [(Classification(), 3), (Regression(), 1)], ids=str)


class Scaled(nn.Module):
    """A layer that has no form for many clients, so that the engine falls back on vmap."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, num_outputs), nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: Any) -> Any:
        return self.linear(x * self.scale)


WAYS = {"many clients at once": partial(nn.Linear, 8), "torch.func.vmap": Scaled}


def network(way: str, num_outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), WAYS[way](num_outputs))


def examples(task: LearningTask) -> ExampleTable:
    generator = torch.Generator().manual_seed(1)
    stops = np.cumsum(SIZES)
    y = task.synthetic_targets((sum(SIZES),), generator)
    return ExampleTable(torch.randn(sum(SIZES), 6, generator=generator), y, stops - SIZES, stops, task)


@TASKS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "fields",
    [{"epochs": 2, "batch_size": 4, "momentum": 0.5}, {"epochs": 2, "batch_size": 4}, {"steps": 4, "privacy": PRIVATE}],
    ids=("momentum", "vanilla", "private"),
)
def test_the_engine_trains_as_the_reference_loop(
    task: LearningTask, num_outputs: int, way: str, fields: dict[str, Any]
) -> None:
    module, table, rule = network(way, num_outputs), examples(task), SGD.model_validate({"learning_rate": 0.1} | fields)
    tasks = [SimulatedClient(str(row), row, size, row, key=bytes([row + 1]) * 32) for row, size in enumerate(SIZES)]
    params_D, engine = flatten(module), Engine(module, table)
    assert (engine.note == "") == (way == "many clients at once") and engine._replicas is not None
    together_ND = np.empty((len(tasks), len(params_D)), np.float32)
    report = engine.train(rule, params_D, tasks, together_ND)
    for row, each in enumerate(tasks):
        rows = slice(table.starts[row], table.stops[row])
        alone_D, loss = rule.train(
            module, params_D, table.x[rows], table.y[rows], each.seed, each.key, learning_task=task
        )
        np.testing.assert_allclose(together_ND[row], alone_D, rtol=0, atol=3e-6)
        assert report.losses[row].mean == pytest.approx(loss.mean, rel=1e-5)


@TASKS
def test_gradients_of_examples_have_a_fast_way(task: LearningTask, num_outputs: int) -> None:
    names = [grad_sampler_name(network(way, num_outputs), examples(task)) for way in WAYS]
    assert names == ["ghost norms", "vmap"]


@TASKS
def test_canaries_are_as_long_as_clipping_allows(task: LearningTask, num_outputs: int) -> None:
    """An audit of a claim about examples tells which canaries joined, where there is hardly any noise."""
    rule = SGD.model_validate(
        {"learning_rate": 1.0, "epochs": 1, "privacy": PRIVATE | {"noise_multiplier": 0.01, "max_grad_norm": 1.0}}
    )
    shadow = CanaryClient(network("many clients at once", num_outputs), examples(task), rule, num_canaries=20)
    joined = np.arange(20) % 2 == 0
    moved = shadow.step(joined, key=bytes(32))[-20:]
    assert moved[joined].min() > 2 * abs(moved[~joined]).max()
