"""Local SGD against an implementation of its own in numpy, and what a client's training leaves alone."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fedrounds.fl_components.parameters import flatten, load_into, num_parameters
from fedrounds.fl_components.training import SGD

FEATURES, CLASSES = 5, 3


def examples(num_examples: int, seed: int = 0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((num_examples, FEATURES)).astype(np.float32)
    return x, generator.integers(0, CLASSES, num_examples)


def logistic_regression() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, CLASSES))


def start(module: nn.Module) -> Any:
    return np.random.default_rng(9).standard_normal(num_parameters(module)).astype(np.float32)


def numpy_sgd(rule: SGD, params_D: Any, x: Any, y: Any, batches: Iterator[Any]) -> tuple[Any, float, float]:
    """Multinomial logistic regression by SGD with heavy-ball momentum, in float64: delta, loss sum, examples."""
    weights = params_D[: FEATURES * CLASSES].astype(np.float64).reshape(CLASSES, FEATURES)
    bias = params_D[FEATURES * CLASSES :].astype(np.float64)
    velocity = [np.zeros_like(weights), np.zeros_like(bias)]
    loss_sum, seen = 0.0, 0
    for rows in batches:
        xb, yb = x[rows].astype(np.float64), y[rows]
        logits = xb @ weights.T + bias
        exp = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exp / exp.sum(1, keepdims=True)
        loss_sum += -np.log(probabilities[np.arange(len(rows)), yb]).sum()
        seen += len(rows)
        error = (probabilities - np.eye(CLASSES)[yb]) / len(rows)
        for index, (value, gradient) in enumerate(((weights, error.T @ xb), (bias, error.sum(0)))):
            velocity[index] = rule.momentum * velocity[index] + gradient
            value -= rule.learning_rate * velocity[index]
    return np.concatenate([weights.ravel(), bias]) - params_D, loss_sum, seen


class TestAgainstNumpy:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize(
        ("length", "batch_size"), [({"epochs": 3}, 4), ({"steps": 7}, 4), ({"epochs": 2}, None), ({"steps": 5}, 100)]
    )
    def test_the_same_update_and_loss(self, momentum: float, length: dict[str, int], batch_size: int | None) -> None:
        rule = SGD(learning_rate=0.1, momentum=momentum, batch_size=batch_size, **length)
        module, (x, y) = logistic_regression(), examples(11)  # in batches of 4 the last one has 3 rows
        params_D = start(module)
        delta_D, loss = rule.train(module, params_D, x, y, seed=5)
        batches = rule.batches(11, np.random.Generator(np.random.Philox(key=5)))
        expected_D, loss_sum, seen = numpy_sgd(rule, params_D, x, y, batches)
        assert delta_D.dtype == np.float32
        np.testing.assert_allclose(delta_D, expected_D, rtol=0, atol=1e-6)
        assert np.abs(expected_D).max() > 0.05
        assert loss.weight == seen
        assert loss.total == pytest.approx(loss_sum, rel=1e-5)

    def test_one_full_batch_is_one_gradient_step(self) -> None:
        module, (x, y) = logistic_regression(), examples(11)
        params_D = start(module)
        delta_D, _ = SGD(learning_rate=0.5, batch_size=None, steps=1).train(module, params_D, x, y, seed=0)
        load_into(module, params_D)
        module.zero_grad()
        nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        gradient_D = np.concatenate([p.grad.numpy().ravel() for p in module.parameters() if p.grad is not None])
        np.testing.assert_allclose(delta_D, -0.5 * gradient_D, atol=1e-6)


class TestBatches:
    @given(
        num_examples=st.integers(1, 40),
        batch_size=st.none() | st.integers(1, 50),
        length=st.tuples(st.sampled_from(["epochs", "steps"]), st.integers(1, 12)),
    )
    def test_how_many_and_which_rows(self, num_examples: int, batch_size: int | None, length: tuple[str, int]) -> None:
        unit, count = length
        rule = SGD.model_validate({"learning_rate": 1, "batch_size": batch_size, unit: count})
        batches = list(rule.batches(num_examples, np.random.default_rng(0)))
        size = min(batch_size or num_examples, num_examples)
        per_epoch = -(-num_examples // size)
        assert len(batches) == (count if unit == "steps" else count * per_epoch)
        for begin in range(0, len(batches), per_epoch):
            one_pass = batches[begin : begin + per_epoch]
            rows = np.concatenate(one_pass)
            assert len(set(rows.tolist())) == len(rows)
            assert all(len(batch) == size for batch in one_pass[:-1])
            if len(one_pass) == per_epoch:
                assert sorted(rows.tolist()) == list(range(num_examples))
                assert len(one_pass[-1]) == num_examples - size * (per_epoch - 1)
            else:
                assert len(one_pass[-1]) == size

    def test_each_pass_is_shuffled_anew(self) -> None:
        rule = SGD(learning_rate=1, batch_size=None, epochs=3)
        first, second, third = rule.batches(50, np.random.default_rng(0))
        assert not np.array_equal(first, second)
        assert not np.array_equal(second, third)


class Net(nn.Module):
    """Dropout, a frozen layer and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, 8).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.dropout(torch.relu(self.frozen(x)) * self.scale))
        return out


class TestSeeds:
    rule = SGD(learning_rate=0.1, momentum=0.9, batch_size=4, epochs=2)

    @pytest.mark.parametrize("make", [logistic_regression, Net])
    def test_a_seed_decides_every_bit(self, make: Any) -> None:
        module, (x, y) = make(), examples(11)
        params_D = start(module)
        first_D, first_loss = self.rule.train(module, params_D, x, y, seed=2**127 + 1)
        self.rule.train(module, params_D + 1, *examples(30, seed=1), seed=3)  # another client in between
        torch.rand(5)
        again_D, again_loss = self.rule.train(module.eval(), params_D, x, y, seed=2**127 + 1)
        other_D, _ = self.rule.train(module, params_D, x, y, seed=2**127 + 2)
        assert (again_D.tobytes(), again_loss) == (first_D.tobytes(), first_loss)
        assert other_D.tobytes() != first_D.tobytes()

    def test_dropout_draws_from_the_seed(self) -> None:
        """With one batch of all examples only the dropout's draws are left to differ by more than rounding."""
        module, (x, y) = Net(), examples(11)
        rule, params_D = SGD(learning_rate=0.1, batch_size=None, steps=1), start(module)
        first_D, again_D, other_D = (rule.train(module, params_D, x, y, seed)[0] for seed in (1, 1, 2))
        assert first_D.tobytes() == again_D.tobytes()
        assert np.abs(first_D - other_D).max() > 1e-3

    def test_the_caller_s_generators_are_left_alone(self) -> None:
        module, (x, y) = Net(), examples(11)
        before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
        self.rule.train(module, start(module), x, y, seed=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]

    def test_seeding_writes_no_traceback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torch.manual_seed writes one for each kind of device that is not in use: a millisecond for each client."""
        module, (x, y) = Net(), examples(11)

        def format_stack(*_: object) -> list[str]:
            raise AssertionError("a traceback is written")

        monkeypatch.setattr(traceback, "format_stack", format_stack)
        self.rule.train(module, start(module), x, y, seed=1)


class TestWhatAClientKeeps:
    def test_momentum_starts_at_zero_in_every_round(self) -> None:
        module, (x, y) = logistic_regression(), examples(8)
        rule, params_D = SGD(learning_rate=0.1, momentum=0.9, batch_size=None, steps=1), start(module)
        first_D, _ = rule.train(module, params_D, x, y, seed=1)
        second_D, _ = rule.train(module, params_D, x, y, seed=1)
        assert first_D.tobytes() == second_D.tobytes()
        two_steps = SGD(learning_rate=0.1, momentum=0.9, batch_size=None, steps=2)
        assert np.abs(two_steps.train(module, params_D, x, y, seed=1)[0]).sum() > 2.2 * np.abs(first_D).sum()

    def test_frozen_parameters_stay(self) -> None:
        module, (x, y) = Net(), examples(11)
        frozen = [p.detach().clone() for p in module.parameters() if not p.requires_grad]
        params_D = start(module)
        delta_D, _ = SGD(learning_rate=1, epochs=2).train(module, params_D, x, y, seed=1)
        assert len(delta_D) == 8 * CLASSES + CLASSES
        np.testing.assert_allclose(flatten(module), params_D + delta_D, atol=1e-6)
        assert np.abs(delta_D).max() > 0.1
        assert all(
            torch.equal(a, b)
            for a, b in zip(frozen, (p for p in module.parameters() if not p.requires_grad), strict=True)
        )

    def test_parameters_and_examples_given_are_left_alone(self) -> None:
        module, (x, y) = logistic_regression(), examples(11)
        params_D = start(module)
        before = params_D.tobytes(), x.tobytes(), y.tobytes()
        SGD(learning_rate=1, epochs=2).train(module, params_D, x, y, seed=1)
        assert (params_D.tobytes(), x.tobytes(), y.tobytes()) == before

    def test_it_trains_in_training_mode(self) -> None:
        module, (x, y) = Net().eval(), examples(4)
        SGD(learning_rate=1, steps=1).train(module, start(module), x, y, seed=1)
        assert module.training


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 0, "epochs": 1},
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "epochs": 1, "steps": 1},
        {"learning_rate": 0.1, "epochs": 0},
        {"learning_rate": 0.1, "steps": 0},
        {"learning_rate": 0.1, "epochs": 1, "batch_size": 0},
        {"learning_rate": 0.1, "epochs": 1, "momentum": 1},
        {"learning_rate": 0.1, "epochs": 1, "momentum": -0.1},
    ],
)
def test_what_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SGD.model_validate(fields)
