"""Loss and accuracy equal what is computed directly, however many batches it takes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fedrounds.fl_components.task import Classification
from fedrounds.fl_components.training import Evaluation, evaluate
from fedrounds.fl_components.training.evaluation import BATCH_SIZE

METRICS = Classification().metrics()


@pytest.mark.parametrize("num_examples", [1, 7, BATCH_SIZE, BATCH_SIZE + 1, 2 * BATCH_SIZE + 5])
def test_equal_to_direct_computation(num_examples: int) -> None:
    generator = np.random.default_rng(num_examples)
    x = generator.standard_normal((num_examples, 4)).astype(np.float32)
    y = generator.integers(0, 3, num_examples)
    module = nn.Linear(4, 3)
    values = evaluate(module, x, y, METRICS).values()
    logits = (x @ module.weight.detach().numpy().T + module.bias.detach().numpy()).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert values["loss"] == pytest.approx(-log_probabilities[np.arange(num_examples), y].mean(), rel=1e-5)
    assert values["accuracy"] == (logits.argmax(1) == y).mean()


def test_no_examples_have_no_metrics() -> None:
    assert evaluate(nn.Linear(4, 3), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), METRICS).values() == {}


def test_dropout_is_off_and_nothing_is_learnt() -> None:
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    x, y = np.ones((5, 4), np.float32), np.zeros(5, np.int64)
    before = torch.get_rng_state()
    first = evaluate(module, x, y, METRICS).values()
    assert first == evaluate(module, x, y, METRICS).values()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_tokens_and_more_scores_than_classes() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 6))
    values = evaluate(module, np.array([[1, 2], [8, 0]]), np.array([0, 1]), METRICS).values()
    assert sum(value for name, value in values.items() if name.startswith("confusion_matrix/")) == 2


def test_additive_metrics_keep_no_rows() -> None:
    """What is kept of a test set by them does not depend on its size."""
    kept = []
    for num_examples in (BATCH_SIZE, 5 * BATCH_SIZE):
        x, y = np.zeros((num_examples, 4), np.float32), np.zeros(num_examples, np.int64)
        additive = {name: metric for name, metric in METRICS.items() if metric.statistic.is_additive}
        kept.append(len(pickle.dumps(list(evaluate(nn.Linear(4, 3), x, y, additive)._kept.values()))))
    assert len(additive) > 5 and kept[0] == kept[1]


def test_only_pooled_metrics_of_public_test_examples_are_released() -> None:
    evaluation = Evaluation(public_test=True, metrics=("loss", "confusion_matrix"), primary="auroc").resolved(
        Classification()
    )
    names = [
        "eval/loss",
        "eval/auroc",
        "eval/confusion_matrix/sick/well",
        "eval/accuracy",
        "eval/auroc/clients/q10",
        "eval/client/va/auroc",
        "eval/baseline/pooled_majority",
    ]
    released = evaluation.releases(dict.fromkeys(names, 0.5))
    assert [name for name in names if released[name].kind == "charged"] == names[:3]
    assert {released[name].kind for name in names[3:]} == {"withheld"}
    hidden = evaluation.model_copy(update={"public_test": False}).releases(dict.fromkeys(names, 0.5))
    assert {release.kind for release in hidden.values()} == {"withheld"}


def test_every_round_at_the_most() -> None:
    assert Evaluation().every == 1
    with pytest.raises(ValidationError, match="every"):
        Evaluation(every=0)
