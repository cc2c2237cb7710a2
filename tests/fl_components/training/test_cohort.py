"""A wave of clients: each is trained as it would be alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fl_components.errors import ModelError
from fl_components.training import SGD, train_cohort
from fl_components.values import ClientTask

RULE = SGD(learning_rate=0.1, momentum=0.5, batch_size=4, epochs=2)


def client(index: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(index)
    x = generator.standard_normal((3 + index, 6)).astype(np.float32)
    return x, generator.integers(0, 3, 3 + index)


def test_clients_do_not_touch_each_other() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))
    params_D = np.random.default_rng(0).standard_normal(53).astype(np.float32)
    tasks = [ClientTask(f"c{index}", index, 3 + index, seed=100 + index) for index in (7, 2, 11)]
    threads = torch.get_num_threads()
    batch = train_cohort(RULE, module, params_D, tasks, client)
    assert torch.get_num_threads() == threads
    assert batch.client_ids == ("c7", "c2", "c11")
    assert (batch.deltas_ND.shape, batch.deltas_ND.dtype) == ((3, 53), np.float32)
    assert [loss.weight for loss in batch.losses] == [20, 10, 28]  # two passes each
    for row, task in enumerate(tasks):
        alone = train_cohort(RULE, module, params_D, [task], client)
        assert alone.deltas_ND[0].tobytes() == batch.deltas_ND[row].tobytes()
        assert alone.losses[0] == batch.losses[row]
    assert len({row.tobytes() for row in batch.deltas_ND}) == 3


def test_a_model_that_fails_later_is_named_with_its_client() -> None:
    class Tired(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("forward\nbroke")

    tasks = [ClientTask("c7", 7, 10, seed=1)]
    with pytest.raises(ModelError, match="the model failed while client c7 trained: ValueError: forward broke"):
        train_cohort(RULE, Tired(6, 3), np.zeros(21, np.float32), tasks, client)


def test_the_number_of_threads_comes_back_after_an_error() -> None:
    def missing(index: int) -> Any:
        raise OSError("no rows")

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module = nn.Linear(6, 3)
        try:
            train_cohort(RULE, module, np.zeros(21, np.float32), [ClientTask("a", 0, 3, 1)], missing)
        except OSError as error:
            assert str(error) == "no rows"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_no_clients() -> None:
    batch = train_cohort(RULE, nn.Linear(6, 3), np.zeros(21, np.float32), [], client)
    assert (batch.client_ids, batch.losses, batch.deltas_ND.shape) == ((), (), (0, 21))
