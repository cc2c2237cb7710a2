"""Loss and accuracy equal what is computed directly, however many batches it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedrounds.fl_components.training import Evaluation, evaluate
from fedrounds.fl_components.training.evaluation import BATCH_SIZE


@pytest.mark.parametrize("num_examples", [1, 7, BATCH_SIZE, BATCH_SIZE + 1, 2 * BATCH_SIZE + 5])
def test_equal_to_direct_computation(num_examples: int) -> None:
    generator = np.random.default_rng(num_examples)
    x = generator.standard_normal((num_examples, 4)).astype(np.float32)
    y = generator.integers(0, 3, num_examples)
    module = nn.Linear(4, 3)
    loss, accuracy = evaluate(module, x, y)
    logits = (x @ module.weight.detach().numpy().T + module.bias.detach().numpy()).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert loss.mean == pytest.approx(-log_probabilities[np.arange(num_examples), y].mean(), rel=1e-5)
    assert accuracy.mean == (logits.argmax(1) == y).mean()
    assert loss.weight == accuracy.weight == num_examples


def test_no_examples_have_no_mean() -> None:
    loss, accuracy = evaluate(nn.Linear(4, 3), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert (loss.weight, accuracy.weight) == (0, 0)
    assert np.isnan(loss.mean)


def test_dropout_is_off_and_nothing_is_learnt() -> None:
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    x, y = np.ones((5, 4), np.float32), np.zeros(5, np.int64)
    before = torch.get_rng_state()
    first: Any = evaluate(module, x, y)
    assert first == evaluate(module, x, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_tokens_and_more_scores_than_classes() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 6))
    loss, _ = evaluate(module, np.array([[1, 2], [8, 0]]), np.array([0, 1]))
    assert loss.weight == 2


def test_every_round_at_the_most() -> None:
    assert Evaluation().every == 1
    with pytest.raises(ValidationError, match="every"):
        Evaluation(every=0)
