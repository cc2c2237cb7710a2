"""Every kind of model can be registered in MLflow, and predicts the same when it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrounds.fl_components.models import (
    Cnn,
    Gru,
    LogisticRegression,
    Mlp,
    ModelRule,
    ResNet,
    Transformer,
    build_seeded,
)
from fedrounds.tasks.tracking.model import LoggableModel, export

CASES = [
    (LogisticRegression(), (4,), (3,), np.float32),
    (Mlp(hidden=(4,)), (4,), (3,), np.float32),
    (Cnn(channels=(2, 3), hidden=4), (1, 8, 8), (3,), np.float32),
    (ResNet(blocks=(1, 1), width=8), (3, 8, 8), (3,), np.float32),
    (Gru(hidden=8), (6,), (6, 5), np.int64),
    (Transformer(width=8, heads=2, layers=1, dropout=0.1), (6,), (5,), np.int64),
]


class InPlace(nn.Module):
    """Brings its input to its scale in place, as torch allows."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        scores: torch.Tensor = self.scores(x)
        return scores


@pytest.mark.ci
def test_a_model_that_works_on_its_input_in_place_is_exported(tmp_path: Path) -> None:
    import mlflow

    module, rows = InPlace().eval(), np.ones((2, 4), np.float32)
    export(LoggableModel(module, rows, "net"), tmp_path / "model")
    assert (rows == 1).all()
    again, x = mlflow.pytorch.load_model(str(tmp_path / "model")), torch.ones(7, 4)
    with torch.no_grad():
        assert torch.allclose(again(x.clone()), module(x.clone()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "input_shape", "output_shape", "dtype"), CASES, ids=lambda each: getattr(each, "kind", "")
)
def test_it_predicts_the_same_when_it_is_read_again(
    rule: ModelRule, input_shape: tuple[int, ...], output_shape: tuple[int, ...], dtype: Any, tmp_path: Path
) -> None:
    import mlflow

    module = build_seeded(rule, input_shape, output_shape, seed=0).eval()
    export(LoggableModel(module, np.zeros((2, *input_shape), dtype), "net"), tmp_path / "model")
    again = mlflow.pytorch.load_model(str(tmp_path / "model"))
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (7, *input_shape)).astype(dtype))  # another batch size
    with torch.no_grad():
        assert torch.allclose(again(x), module(x), atol=1e-5)
