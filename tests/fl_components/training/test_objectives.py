"""What every objective promises; a new one is one line in OBJECTIVES."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.models import Mlp, build_seeded
from fedrounds.fl_components.parameters import flatten, load_into
from fedrounds.fl_components.privacy import ExampleLevel
from fedrounds.fl_components.training import SGD, ExampleTable, next_kept
from fedrounds.fl_components.training.engine import Engine
from fedrounds.fl_components.training.objectives import LossAlone, ObjectiveRule, Proximal, Scaffold
from fedrounds.fl_components.values import SimulatedClient

OBJECTIVES: list[ObjectiveRule] = [LossAlone(), Proximal(mu=0.3), Scaffold()]
SIZES = (7, 20, 3, 11)


class Unknown(nn.Module):
    """No layer that the engine batches by itself: its clients train by torch.func.vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 18).view(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight)


class Branching(nn.Module):
    """Looks at values, which vmap cannot: its clients train one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layer(x)
        return scores * 2 if float(x.detach().sum()) > 1e9 else scores


MODELS = {"batched layers": lambda: build_seeded(Mlp(hidden=(5,)), (6,), (3,), 1), "vmap": Unknown, "alone": Branching}


class Clients:
    """Four clients, what each keeps, and what the server sent."""

    def __init__(self, objective: ObjectiveRule, module: nn.Module) -> None:
        draw = np.random.default_rng(0)
        total, stops = sum(SIZES), np.cumsum(SIZES)
        self.x = draw.standard_normal((total, 6)).astype(np.float32)
        self.y = draw.integers(0, 3, total)
        self.starts, self.stops = stops - SIZES, stops
        self.examples = ExampleTable(torch.from_numpy(self.x), torch.from_numpy(self.y), self.starts, self.stops)
        params_D = flatten(module)

        def vector() -> Float32:
            return 0.1 * draw.standard_normal(len(params_D)).astype(np.float32)

        self.base_M = np.concatenate([params_D, *(vector() for _ in objective.channels)])
        self.clients = [
            SimulatedClient(
                f"c{row}",
                row,
                size,
                seed=row,
                key=bytes([row]) * 32,
                kept={name: vector() for name in objective.channels},
            )
            for row, size in enumerate(SIZES)
        ]

    def alone(self, rule: SGD, module: nn.Module) -> Any:
        """The updates [N, M] of the reference loop."""
        return np.stack(
            [
                rule.train(
                    module,
                    self.base_M,
                    self.x[self.starts[each.index] : self.stops[each.index]],
                    self.y[self.starts[each.index] : self.stops[each.index]],
                    each.seed,
                    each.key if rule.example_level else None,
                    kept=each.kept,
                )[0]
                for each in self.clients
            ]
        )

    def together(self, rule: SGD, module: nn.Module) -> Any:
        updates_NM = np.empty((len(SIZES), len(self.base_M)), np.float32)
        Engine(module, self.examples).train(rule, self.base_M, self.clients, updates_NM)
        return updates_NM


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.kind)
class TestObjective:
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize(
        "options", [{}, {"max_gradient_norm": 0.3, "weight_decay": 0.01}], ids=["plain", "options"]
    )
    def test_many_clients_train_as_each_does_alone(
        self, objective: ObjectiveRule, model: str, options: dict[str, Any]
    ) -> None:
        rule = SGD(learning_rate=0.1, epochs=2, batch_size=4, objective=objective, **options)
        module = MODELS[model]()
        clients = Clients(objective, module)
        np.testing.assert_allclose(clients.together(rule, module), clients.alone(rule, module), rtol=0, atol=2e-5)

    def test_so_they_do_under_a_claim_about_examples(self, objective: ObjectiveRule) -> None:
        privacy = ExampleLevel(noise_multiplier=0.5, max_grad_norm=1.0, sampling_rate=0.5)
        rule = SGD(learning_rate=0.1, steps=3, objective=objective, privacy=privacy)
        module = MODELS["batched layers"]()
        clients = Clients(objective, module)
        np.testing.assert_allclose(clients.together(rule, module), clients.alone(rule, module), rtol=0, atol=2e-5)

    def test_an_update_has_a_channel_for_each_that_the_server_sends(self, objective: ObjectiveRule) -> None:
        module = MODELS["batched layers"]()
        clients = Clients(objective, module)
        update_M = clients.alone(SGD(learning_rate=0.1, epochs=1, objective=objective), module)[0]
        num_parameters = len(flatten(module))
        assert len(update_M) == num_parameters * (1 + len(objective.channels))
        parts = np.split(update_M, 1 + len(objective.channels))
        sent = dict(zip(("delta", *objective.channels), parts, strict=True))
        kept = next_kept(objective, {}, sent)
        assert kept.keys() == set(objective.channels)
        assert all(each.shape == (num_parameters,) for each in kept.values())


class TestScaffold:
    def test_it_computes_algorithm_1_of_the_paper(self) -> None:
        """Karimireddy et al. 2020: y_i <- y_i - eta (g(y_i) - c_i + c); c_i+ = c_i - c + (x - y_i) / (K eta)."""
        module, objective = MODELS["batched layers"](), Scaffold()
        clients = Clients(objective, module)
        rule = SGD(learning_rate=0.1, steps=5, batch_size=None, objective=objective)
        update_M = clients.alone(rule, module)[1]
        x_D, c_D = np.split(clients.base_M, 2)
        own = clients.clients[1]
        rows = slice(clients.starts[1], clients.stops[1])
        y_D = x_D.copy()
        for _ in range(5):
            load_into(module, y_D)
            loss = nn.functional.cross_entropy(
                module(torch.from_numpy(clients.x[rows])), torch.from_numpy(clients.y[rows])
            )
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            g_D = np.concatenate([gradient.numpy().ravel() for gradient in gradients])
            y_D = y_D - np.float32(0.1) * (g_D - own.kept["control"] + c_D)
        delta_D, change_D = np.split(update_M, 2)
        np.testing.assert_allclose(delta_D, y_D - x_D, atol=1e-5)
        c_plus_D = own.kept["control"] - c_D + (x_D - y_D) / (5 * 0.1)
        np.testing.assert_allclose(change_D, c_plus_D - own.kept["control"], atol=1e-4)
        kept = next_kept(objective, own.kept, {"delta": delta_D, "control": change_D})
        np.testing.assert_allclose(kept["control"], c_plus_D, atol=1e-4)
        # c <- c + |S| / N mean(change)
        received = objective.next_received({"control": c_D}, {"control": change_D.astype(np.float64)}, 0.25)
        np.testing.assert_allclose(received["control"], c_D + 0.25 * change_D, atol=1e-6)

    def test_momentum_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"objective\.kind is scaffold and training\.momentum is 0\.9"):
            parse_config(
                {
                    "name": "r",
                    "rounds": 1,
                    "data": {"kind": "digits"},
                    "model": {"kind": "logistic_regression"},
                    "training": {"learning_rate": 0.1, "epochs": 1, "momentum": 0.9, "objective": {"kind": "scaffold"}},
                }
            )
