"""Example-level DP-SGD: three ways that agree, and that what leaves a client is clipped, noised and nobody else's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedrounds.fl_components.admission import Admission, RoundAdmission
from fedrounds.fl_components.aggregation import Mean
from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.errors import ConfigError, ModelError
from fedrounds.fl_components.executors import LocalExecution, Workload
from fedrounds.fl_components.models import Cnn, Gru, Mlp, ModelRule, ModelSpec, Transformer, build_seeded
from fedrounds.fl_components.parameters import flatten, load_into
from fedrounds.fl_components.privacy import ExampleLevel
from fedrounds.fl_components.privacy.steps import PIECE_ROWS, Mechanism, private_batches
from fedrounds.fl_components.shared_memory import SharedMemory
from fedrounds.fl_components.task import Classification
from fedrounds.fl_components.training import (
    SGD,
    StreamingSum,
    grad_sampler_name,
    one_thread,
)
from fedrounds.fl_components.training.chunk import ExampleTable
from fedrounds.fl_components.training.engine import Engine
from fedrounds.fl_components.training.layers import Batch
from fedrounds.fl_components.training.objectives import Proximal
from fedrounds.fl_components.training.opacus_sampler import OpacusGradSampler
from fedrounds.fl_components.training.per_example import ClippedReplicas, GhostNorms, VmapExamples
from fedrounds.fl_components.training.sgd import PerExampleLoop
from fedrounds.fl_components.values import SimulatedClient
from tests.support import cases, parameters

PRIVACY: dict[str, Any] = {
    "kind": "example_level",
    "noise_multiplier": 0.5,
    "max_grad_norm": 0.7,
    "sampling_rate": 0.4,
}


def rule(privacy: dict[str, Any] | None = None, **options: Any) -> SGD:
    if not options.keys() & {"steps", "epochs"}:
        options["steps"] = 4
    return SGD.model_validate({"learning_rate": 0.1, "privacy": {**PRIVACY, **(privacy or {})}, **options})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Careful(nn.Module):
    """Looks at a number between its layers: only one example at a time is right."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.dropout = nn.Linear(6, 5), nn.LayerNorm(5), nn.Dropout(0.3)
        self.unused, self.last = nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.norm(self.wide(x))))
        return self.last(hidden) if x.shape[0] == 0 or hidden.detach().abs().max().item() < 1e9 else self.last(-hidden)


def twice() -> nn.Module:
    """One layer at two places, and tied weights, over the positions of a sequence."""
    layer, tied = nn.Linear(6, 6), nn.Linear(6, 6)
    tied.weight = layer.weight
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), tied, nn.Tanh(), nn.Linear(6, 3))


def built(kind: ModelRule, input_shape: tuple[int, ...], output_shape: tuple[int, ...] = (3,)) -> nn.Module:
    return build_seeded(kind, input_shape, output_shape, seed=3)


def floats(*shape: int) -> Callable[[Any, int], Any]:
    return lambda generator, total: generator.standard_normal((total, *shape)).astype(np.float32)


def tokens(generator: Any, total: int) -> Any:
    return generator.integers(0, 3, (total, 6))


# A model, what it takes, the shape of a row's labels, and the way.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...], str]] = {
    "mlp": (lambda: built(Mlp(hidden=(8, 7)), (6,)), floats(6), (), "ghost norms"),
    "dropout": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.Dropout(0.4), nn.ReLU(), nn.Linear(8, 3, bias=False), nn.Dropout(0.2)
        ),
        floats(6),
        (),
        "ghost norms",
    ),
    "sequences": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        floats(5, 4),
        (5,),
        "ghost norms",
    ),
    "used-twice": (twice, floats(5, 6), (5,), "ghost norms"),
    "cnn": (lambda: built(Cnn(channels=(2, 3), hidden=8), (8, 8)), floats(8, 8), (), "vmap"),
    "transformer": (
        lambda: built(Transformer(width=8, heads=2, layers=1), (6,), (6, 3)),
        tokens,
        (6,),
        "vmap",
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(24, 3)),
        tokens,
        (),
        "vmap",
    ),
    "gru": (lambda: built(Gru(hidden=4), (6,), (6, 3)), tokens, (6,), "vmap"),
    "layer-norm-and-dropout": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)),
        floats(6),
        (),
        "opacus",
    ),
    "careful": (Careful, floats(6), (), "one example at a time"),
}


class Data:
    """Clients' examples in one array, with a key for each."""

    def __init__(self, sizes: list[int], x_of: Any, labels: tuple[int, ...], seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        total = sum(sizes)
        self.x, self.y = x_of(generator, total), generator.integers(0, 3, (total, *labels))
        if labels:
            self.y[generator.random(self.y.shape) < 0.3] = IGNORED
            self.y[0] = IGNORED  # a row of which no label counts
        stops = np.cumsum(sizes)
        self.examples = ExampleTable(torch.from_numpy(self.x), torch.from_numpy(self.y), stops - sizes, stops)
        self.tasks = [
            SimulatedClient(f"c{row}", row, size, seed=2**70 + row, key=bytes([seed % 256, row]) * 16)
            for row, size in enumerate(sizes)
        ]

    def rows(self, task: SimulatedClient) -> tuple[Tensor, Tensor]:
        own = slice(self.examples.starts[task.index], self.examples.stops[task.index])
        return self.examples.x[own], self.examples.y[own]

    def alone(self, rule: SGD, module: nn.Module, params_D: Any) -> tuple[Any, list[Any]]:
        found = [
            rule.train(module, params_D, *self.rows(task), task.seed, task.key, work=task.work) for task in self.tasks
        ]
        return np.stack([delta_D for delta_D, _ in found]), [loss for _, loss in found]

    def together(self, rule: SGD, module: nn.Module, params_D: Any, tasks: Any = None) -> tuple[Any, Any]:
        tasks = tasks or self.tasks
        found_ND = np.empty((len(tasks), len(params_D)), np.float32)
        report = Engine(module, self.examples).train(rule, params_D, tasks, found_ND)
        return found_ND, report


def clipped_by(way: Any, module: nn.Module, x: Tensor, y: Tensor, mechanism: Mechanism, smoothing: float) -> Tensor:
    """The sum of one client's clipped gradients, before it is rounded, float64 [D], in `max_grad_norm`s' unit."""
    parameters = [each for each in module.parameters() if each.requires_grad]
    if isinstance(way, ClippedReplicas):
        sums = [torch.full((1, *each.shape), math.nan) for each in parameters]
        way.use([each.detach()[None].clone() for each in parameters])
        way.add_clipped(Batch(x[None], y[None], [], [], []), smoothing, mechanism, sums, fresh=True)
    else:
        sums, _ = way(x, y, list(range(len(y))))
    return torch.cat([each.flatten() for each in sums]).double() * mechanism.unit


def three_ways(
    module: nn.Module, fast: type[ClippedReplicas], x: Tensor, y: Tensor, norm: float, smoothing: float = 0.0
) -> list[Tensor]:
    """By the loop, by a fast way and by Opacus."""
    private = ExampleLevel(noise_multiplier=0.5, max_grad_norm=norm, sampling_rate=0.5)
    mechanism = Mechanism.of(private, len(flatten(module)))
    parameters = [each for each in module.parameters() if each.requires_grad]
    ways = [
        PerExampleLoop(Classification(), module.train(), parameters, mechanism, smoothing),
        fast(module, Classification()),
        OpacusGradSampler(module, Classification()).clipped_sum(mechanism, smoothing),
    ]
    return [clipped_by(way, module, x, y, mechanism, smoothing) for way in ways]


class TestThreeWays:
    @settings(max_examples=cases(12), deadline=None)
    @given(
        widths=st.lists(st.integers(1, 20), max_size=2),
        features=st.integers(1, 30),
        num_rows=st.integers(1, PIECE_ROWS),
        norm=st.sampled_from([1e-3, 0.5, 20.0]),
        scale=st.sampled_from([0.1, 1.0]),
        smoothing=st.sampled_from([0.0, 0.2]),
        seed=st.integers(0, 1000),
    )
    def test_sums_of_any_network(
        self,
        widths: list[int],
        features: int,
        num_rows: int,
        norm: float,
        scale: float,
        smoothing: float,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            edges = [features, *widths, 3]
            module = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(edges)))
        x = torch.randn(num_rows, features, generator=generator) * scale
        y = torch.randint(0, 3, (num_rows,), generator=generator)
        loop, *others = three_ways(module, GhostNorms, x, y, norm, smoothing)
        for found in [
            *others,
            clipped_by(VmapExamples(module, Classification()), module, x, y, mechanism_of(module, norm), smoothing),
        ]:
            # 1e-6 of C for each example that is clipped; of its own length where it is not.
            torch.testing.assert_close(found, loop, rtol=0, atol=1e-6 * norm * max(1.0, num_rows / 8))
        assert 0 < float(loop.norm()) <= num_rows * norm

    @pytest.mark.parametrize("case", ["sequences", "used-twice", "cnn", "transformer", "embedding"])
    def test_sums_of_other_models(self, case: str) -> None:
        make, x_of, labels, way = CASES[case]
        module, data = make(), Data([9], x_of, labels)
        fast = GhostNorms if way == "ghost norms" else VmapExamples
        for norm in (0.05, 50.0):
            loop, *others = three_ways(module, fast, data.examples.x, data.examples.y, norm, smoothing=0.1)
            for found in others:
                torch.testing.assert_close(found, loop, rtol=0, atol=1e-6 * max(norm, float(loop.abs().max())))
            assert float(loop.norm()) > 0.01

    @pytest.mark.parametrize("case", parameters(CASES, quick=("mlp", "gru", "careful")))
    def test_clients_together_come_to_what_each_comes_to_alone(self, case: str) -> None:
        """With the same noise: next to it the differences are those of sums and of a unit here and there."""
        make, x_of, labels, way = CASES[case]
        module, data = make(), Data([9, 1, 17], x_of, labels)
        params_D = flatten(module)
        assert grad_sampler_name(module, data.examples) == way
        assert flatten(module).tobytes() == params_D.tobytes()
        options = {"momentum": 0.5, "weight_decay": 0.01, "objective": Proximal(mu=0.1), "label_smoothing": 0.1}
        for each in (rule(), rule(**options)):
            expected_ND, losses = data.alone(each, module, params_D)
            found_ND, report = data.together(each, module, params_D)
            np.testing.assert_allclose(found_ND, expected_ND, rtol=0, atol=3e-6 * np.abs(expected_ND).max())
            assert [loss.weight for loss in report.losses] == [loss.weight for loss in losses]
            assert [loss.total for loss in report.losses] == pytest.approx([loss.total for loss in losses], rel=1e-4)
        assert any(len(rows) == 0 for rows in private_batches(each.privacy, data.tasks[1].key, 1, 4))  # type: ignore

    @pytest.mark.parametrize(
        "case", parameters(["mlp", "cnn", "careful", "dropout", "layer-norm-and-dropout"], quick=("mlp", "careful"))
    )
    def test_batches_of_several_pieces(self, case: str) -> None:
        """Each example with draws of its own: those of a piece are not those of the piece before."""
        make, x_of, labels, _ = CASES[case]
        module, data = make(), Data([2 * PIECE_ROWS + 5, 3, PIECE_ROWS], x_of, labels)
        params_D, each = flatten(module), rule({"sampling_rate": 1.0}, steps=2)
        expected_ND, _ = data.alone(each, module, params_D)
        np.testing.assert_allclose(data.together(each, module, params_D)[0], expected_ND, rtol=0, atol=2e-6)

    def test_stragglers_stop_early(self) -> None:
        module, data = CASES["mlp"][0](), Data([8] * 12, floats(6), ())
        params_D = flatten(module)
        each = rule(epochs=2)
        data.tasks = [replace(task, work=1 if task.index % 3 == 0 else None) for task in data.tasks]
        steps = [len(each.private_batches_of(8, task.key, task.work)) for task in data.tasks]
        assert steps == [5 if task.work is None else 3 for task in data.tasks]
        found_ND, _ = data.together(each, module, params_D)
        np.testing.assert_allclose(found_ND, data.alone(each, module, params_D)[0], rtol=0, atol=3e-6)


def mechanism_of(module: nn.Module, norm: float) -> Mechanism:
    return Mechanism.of(ExampleLevel(noise_multiplier=0.5, max_grad_norm=norm, sampling_rate=0.5), len(flatten(module)))


class TestClipping:
    @pytest.mark.parametrize("case", ["mlp", "sequences", "used-twice", "cnn", "transformer"])
    def test_no_example_is_longer_than_the_norm(self, case: str) -> None:
        make, x_of, labels, way = CASES[case]
        module, data = make(), Data([6], x_of, labels)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(3)
        for place in range(6):
            x, y = (each[place : place + 1] for each in data.rows(data.tasks[0]))
            for found in three_ways(module, GhostNorms if way == "ghost norms" else VmapExamples, x, y, norm=0.01):
                counts = bool((y != IGNORED).any())
                assert float(found.norm()) == pytest.approx(0.01 if counts else 0, rel=2e-3) and found.norm() <= 0.01

    def test_the_mean_is_over_an_example_s_own_labels(self) -> None:
        """Not over those of the batch; and a row of which none counts adds nothing."""
        make, x_of, labels, _ = CASES["sequences"]
        module, data = make(), Data([4], x_of, labels)
        x, y = data.rows(data.tasks[0])
        expected = torch.zeros(len(flatten(module)), dtype=torch.float64)
        for row, label in zip(x[1:], y[1:], strict=True):
            module.zero_grad()
            nn.functional.cross_entropy(module(row), label, ignore_index=IGNORED).backward()
            expected += torch.cat([each.grad.flatten() for each in module.parameters()])  # type: ignore[union-attr]
        for found in three_ways(module, GhostNorms, x, y, norm=1e3):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("fast", [GhostNorms, VmapExamples])
    @pytest.mark.parametrize("value", [math.inf, math.nan, 1e35])
    def test_what_is_not_finite_contributes_zero_and_changes_nothing_else(self, fast: Any, value: float) -> None:
        module, data = CASES["mlp"][0](), Data([6], floats(6), ())
        x, y = data.rows(data.tasks[0])
        spoiled = x.clone()
        spoiled[2] = value
        without = torch.arange(6) != 2
        others = three_ways(module, fast, x[without], y[without], norm=0.5)
        for found, expected in zip(three_ways(module, fast, spoiled, y, norm=0.5), others, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)
        also_spoiled = x.clone()
        also_spoiled[2] = math.inf
        bits = three_ways(module, fast, also_spoiled, y, norm=0.5)
        assert all(map(torch.equal, bits, three_ways(module, fast, spoiled, y, norm=0.5)))

    @pytest.mark.parametrize("case", ["mlp", "cnn"])
    def test_another_client_s_bad_example_changes_no_bit(self, case: str) -> None:
        make, x_of, labels, _ = CASES[case]
        bits = []
        for spoiled in (False, True):
            module, data = make(), Data([9, 9], x_of, labels)
            if spoiled:
                data.x[:4] = np.nan
            params_D = flatten(module)
            found_ND, _ = data.together(rule(), module, params_D)
            assert np.isfinite(found_ND).all()
            bits.append((found_ND[0].tobytes(), found_ND[1].tobytes()))
        assert bits[0][0] != bits[1][0] and bits[0][1] == bits[1][1]

    def test_one_example_moves_an_aligned_sum_by_at_most_the_norm(self) -> None:
        """A whole piece of equal gradients, far longer than the norm, as the fast way adds them up and rounds."""
        module = nn.Linear(300, 40)
        mechanism = mechanism_of(module, 0.7)
        x, y = torch.rand(1, 300).expand(PIECE_ROWS, 300).clone() * 1e3, torch.zeros(PIECE_ROWS, dtype=torch.int64)
        without = x.clone()
        without[5] = math.inf
        for way in (GhostNorms(module, Classification()), VmapExamples(module, Classification())):
            all_, less = (
                (clipped_by(way, module, each, y, mechanism, 0.0) / mechanism.unit).round() * mechanism.unit
                for each in (x, without)
            )
            assert 0.99 * 0.7 < float((all_ - less).norm()) <= 0.7


class TestRelease:
    @pytest.mark.parametrize("case", ["mlp", "cnn", "careful"])
    def test_empty_batches_release_noise_over_the_expected_size(self, case: str) -> None:
        make, x_of, labels, _ = CASES[case]
        module, data = make(), Data([4, 7], x_of, labels)
        params_D, each = flatten(module), rule({"sampling_rate": 1e-9}, steps=2)
        mechanism = Mechanism.of(each.privacy, len(params_D))  # type: ignore[arg-type]
        both = [data.together(each, module, params_D)[0], data.alone(each, module, params_D)[0]]
        draws = []
        for row, task in enumerate(data.tasks):
            noise = mechanism.noise(task.key or b"")
            drawn = [torch.cat([block.double() for block in noise.blocks(len(params_D))]).numpy() for _ in range(2)]
            draws.append(drawn[0])
            expected_D = -0.1 * mechanism.unit * (drawn[0] + drawn[1]) / (1e-9 * task.num_examples)
            for found_ND in both:
                np.testing.assert_allclose(found_ND[row], expected_D, rtol=1e-5, atol=1e-6 * np.abs(expected_D).max())
        assert abs(np.corrcoef(draws)[0, 1]) < 0.5 and mechanism.unit * np.std(draws) == pytest.approx(0.35, rel=0.2)

    def test_the_denominator_is_the_expected_size_of_a_batch(self) -> None:
        """A step that clips nothing, with next to no noise, is the sum of the gradients over q n, whoever came."""
        module, data = CASES["mlp"][0](), Data([40], floats(6), ())
        params_D, (task,) = flatten(module), data.tasks
        each = rule({"noise_multiplier": 1e-3, "max_grad_norm": 5.0, "sampling_rate": 0.3}, steps=1)
        (rows,) = each.private_batches_of(40, task.key)
        assert len(rows) != 12
        x, y = data.rows(task)
        mean_D, _ = SGD(learning_rate=0.1, batch_size=None, steps=1).train(module, params_D, x[rows], y[rows], 0)
        found_D = data.together(each, module, params_D)[0][0]
        np.testing.assert_allclose(found_D, mean_D * len(rows) / 12, rtol=0, atol=5 * 0.1 * 5e-3 / 12)
        assert np.abs(mean_D).max() > 0.005

    def test_what_follows_is_post_processing_in_the_stated_order(self) -> None:
        """Proximal term, weight decay, momentum, step: by hand in float64, from empty batches' noise."""
        module, data = CASES["mlp"][0](), Data([10], floats(6), ())
        params_D, (task,) = flatten(module), data.tasks
        each = rule(
            {"sampling_rate": 1e-9},
            steps=3,
            momentum=0.9,
            weight_decay=0.2,
            objective=Proximal(mu=0.3),
            learning_rate=1e-8,
        )
        mechanism = Mechanism.of(each.privacy, len(params_D))  # type: ignore[arg-type]
        noise, w, velocity = mechanism.noise(task.key or b""), params_D.astype(np.float64), 0.0
        for _ in range(3):
            drawn = torch.cat([block.double() for block in noise.blocks(len(params_D))]).numpy()
            gradient = drawn * mechanism.unit / 1e-8 + 0.3 * (w - params_D) + 0.2 * w
            velocity = 0.9 * velocity + gradient
            w = w - 1e-8 * velocity
        for found_ND in (data.alone(each, module, params_D)[0], data.together(each, module, params_D)[0]):
            np.testing.assert_allclose(found_ND[0], w - params_D, rtol=1e-4, atol=1e-6)

    def test_max_batch_size(self) -> None:
        module, data = CASES["mlp"][0](), Data([30], floats(6), ())
        params_D = flatten(module)
        each = rule({"sampling_rate": 0.9, "max_batch_size": 4})
        found_ND, report = data.together(each, module, params_D)
        assert report.losses[0].weight == 4 * 4
        np.testing.assert_allclose(found_ND, data.alone(each, module, params_D)[0], rtol=0, atol=2e-6)

    def test_a_client_s_noise_is_its_own_whoever_trains_beside(self) -> None:
        module, data = CASES["mlp"][0](), Data([9, 4, 17, 9], floats(6), ())
        params_D = flatten(module)
        found_ND, _ = data.together(rule(), module, params_D)
        alone_ND, _ = data.together(rule(), module, params_D, [data.tasks[2]])
        np.testing.assert_allclose(alone_ND[0], found_ND[2], rtol=0, atol=1e-6)
        again_ND, _ = data.together(rule(), module, params_D)
        assert again_ND.tobytes() == found_ND.tobytes()

    def test_no_key_no_training(self) -> None:
        module, data = CASES["mlp"][0](), Data([5], floats(6), ())
        with pytest.raises(ValueError, match="from a key of its own"):
            rule().train(module, flatten(module), data.x, data.y, seed=0)
        with pytest.raises(ValueError, match="need a key each"):
            data.together(rule(), module, flatten(module), [replace(data.tasks[0], key=None)])


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - 1e-5 * x.mean(0))


class TestRefused:
    def refusal(self, module: nn.Module) -> ModelError:
        data = Data([5, 5], floats(6), ())
        params_D, out = flatten(module), np.full((2, len(flatten(module))), 7.0, np.float32)
        with pytest.raises(ModelError) as raised:
            Engine(module, data.examples).train(rule(), params_D, data.tasks, out)
        assert (out == 7).all()
        with pytest.raises(ModelError) as early:
            grad_sampler_name(module, data.examples)
        assert early.value.message == raised.value.message
        return raised.value

    def test_rows_of_a_batch_meet(self) -> None:
        assert self.refusal(Centred()).message.startswith("gradients of examples would mix: ")

    def test_batch_norm_with_opacus_s_own_reason(self) -> None:
        error = self.refusal(
            nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
        )
        assert "gradients of examples would mix" in error.message
        assert "BatchNorm cannot support training with differential privacy" in error.message
        assert error.hint is not None and "GroupNorm" in error.hint

    def test_without_opacus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opacus", None)
        data = Data([5], floats(6), ())
        with pytest.raises(ConfigError, match="needs Opacus") as raised:
            grad_sampler_name(CASES["layer-norm-and-dropout"][0](), data.examples)
        assert raised.value.hint == "pip install 'fedrounds[opacus]'"
        assert grad_sampler_name(CASES["mlp"][0](), data.examples) == "ghost norms"
        assert grad_sampler_name(Careful(), data.examples) == "one example at a time"

    def test_a_run_without_a_claim_needs_no_way(self) -> None:
        data, module = Data([5], floats(6), ()), Centred()
        out = np.empty((1, 21), np.float32)
        Engine(module, data.examples).train(SGD(learning_rate=0.1, steps=1), flatten(module), data.tasks, out)
        assert np.isfinite(out).all()


@pytest.mark.ci
def test_processes_come_to_the_same_bits() -> None:
    kind, data = Mlp(hidden=(5,)), Data([4, 9, 7, 1, 12, 5], floats(6), ())
    module = build_seeded(kind, (6,), (3,), seed=1)
    arrays = {"x": data.x, "y": data.y, "starts": data.examples.starts, "stops": data.examples.stops}
    params_D = flatten(module)
    work = Workload(
        module=module,
        spec=ModelSpec.of(kind, (6,), (3,), 1, module),
        task=Classification(),
        examples=SharedMemory.from_arrays(arrays),
        num_parameters=len(params_D),
        result=(np.float32, (len(params_D),)),
    )
    shards = [data.tasks[start : start + 2] for start in range(0, 6, 2)]
    bits = []
    for processes in (1, 2):
        executor = LocalExecution(processes=processes).executor(work, print)
        try:
            streaming = StreamingSum(Mean(weights="uniform"), RoundAdmission(Admission()))
            found = executor.train(rule(momentum=0.5), params_D, shards, streaming)
            bits.append([(report, result.tobytes()) for report, result in found])
        finally:
            executor.close()
    assert bits[0] == bits[1] and len({each for _, each in bits[0]}) == 3
    load_into(module, params_D)
