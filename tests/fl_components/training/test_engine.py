"""Many clients at once come to what each comes to alone (`SGD.train`), whatever the model, the sizes, the options."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedrounds.fl_components.admission import Admission, Clip, RoundAdmission
from fedrounds.fl_components.aggregation import Mean
from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.errors import ModelError
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
from fedrounds.fl_components.parameters import flatten, num_parameters
from fedrounds.fl_components.privacy.clipping import add_contributions, clip_norm_in_units
from fedrounds.fl_components.training import SGD, one_thread
from fedrounds.fl_components.training.chunk import ExampleTable
from fedrounds.fl_components.training.engine import CHUNK_BYTES, Engine, StreamingSum
from fedrounds.fl_components.training.layers import FactoredWeight
from fedrounds.fl_components.training.objectives import LossAlone, Proximal
from fedrounds.fl_components.training.replicas import LayeredReplicas, VmapReplicas
from fedrounds.fl_components.values import SimulatedClient
from tests.support import cases

OPTIONS: list[dict[str, Any]] = [
    {"epochs": 1},
    {"epochs": 2, "batch_size": None},
    {"steps": 5, "batch_size": 7},
    {"epochs": 1, "momentum": 0.9},
    {"epochs": 2, "objective": Proximal(mu=0.3)},
    {"epochs": 2, "weight_decay": 0.1},
    {"epochs": 1, "max_gradient_norm": 0.2},
    {"epochs": 3, "label_smoothing": 0.1},
    {
        "epochs": 2,
        "momentum": 0.5,
        "weight_decay": 0.01,
        "max_gradient_norm": 0.5,
        "label_smoothing": 0.2,
        "objective": Proximal(mu=0.1),
    },
]
QUICK_OPTIONS = [OPTIONS[2], OPTIONS[-1]]  # in one all that the others have


class Scaled(nn.Module):
    """A parameter that belongs to no layer: torch.func.vmap can do it, and the layers cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale)


class Peeking(nn.Linear):
    """Looks at a number in the middle of its work, which neither can do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().max().item() < 1e9 else super().forward(-x)


def linears(*, bias: bool = True, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Dropout(dropout), nn.ReLU(), nn.Linear(5, 3, bias=bias))


def twice(width: int = 6) -> nn.Module:
    """The same layer at two places."""
    layer = nn.Linear(width, width)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(width, 3))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    module[0].requires_grad_(False)
    return module


def tied(width: int = 6) -> nn.Module:
    module = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 3))
    module[2].weight = module[0].weight
    return module


def folding() -> nn.Module:
    """Makes two rows of each of a batch's: its first layer sees more rows than there are examples."""
    return nn.Sequential(nn.Unflatten(1, (2, 150)), nn.Linear(150, 100), nn.Tanh(), nn.Flatten(), nn.Linear(200, 3))


class Data:
    """Clients' examples in one array, as the engine takes them."""

    def __init__(
        self, sizes: list[int], x_of: Callable[[Any, int], Any], labels: tuple[int, ...], seed: int = 0
    ) -> None:
        generator = np.random.default_rng(seed)
        total = sum(sizes)
        self.x = x_of(generator, total)
        self.y = generator.integers(0, 3, (total, *labels))
        if labels:
            self.y[generator.random(self.y.shape) < 0.2] = IGNORED
            self.y[:, 0] = 0
        stops = np.cumsum(sizes)
        self.examples = ExampleTable(torch.from_numpy(self.x), torch.from_numpy(self.y), stops - sizes, stops)
        self.tasks = [
            SimulatedClient(f"c{row}", row, size, seed=2**70 + 100 * seed + row) for row, size in enumerate(sizes)
        ]

    def alone(self, rule: SGD, module: nn.Module, params_D: Any) -> tuple[Any, list[Any]]:
        """What each client comes to by itself, [N, D], and its loss."""
        with one_thread():
            found = [
                rule.train(module, params_D, self.x[start:stop], self.y[start:stop], task.seed)
                for task, start, stop in zip(self.tasks, self.examples.starts, self.examples.stops, strict=True)
            ]
        return np.stack([delta_D for delta_D, _ in found]), [loss for _, loss in found]


def floats(*shape: int) -> Callable[[Any, int], Any]:
    return lambda generator, total: generator.standard_normal((total, *shape)).astype(np.float32)


def tokens(generator: Any, total: int) -> Any:
    return generator.integers(0, 3, (total, 6))


def built(rule: ModelRule, input_shape: tuple[int, ...], output_shape: tuple[int, ...] = (3,)) -> nn.Module:
    return build_seeded(rule, input_shape, output_shape, seed=3)


# A model, what it takes, the shape of a row's labels, and the way in which many clients train it.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...], type | None]] = {
    "linears": (linears, floats(6), (), LayeredReplicas),
    "no-bias": (lambda: linears(bias=False), floats(6), (), LayeredReplicas),
    "dropout": (lambda: linears(dropout=0.4), floats(6), (), LayeredReplicas),
    "same-layer-twice": (twice, floats(6), (), LayeredReplicas),
    "tied": (tied, floats(6), (), LayeredReplicas),
    "frozen": (frozen, floats(6), (), LayeredReplicas),
    "wide": (
        lambda: nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 3)),
        floats(300),
        (),
        LayeredReplicas,
    ),
    "wide-same-layer-twice": (lambda: twice(150), floats(150), (), LayeredReplicas),
    "wide-tied": (lambda: tied(150), floats(150), (), LayeredReplicas),
    "folds-rows": (folding, floats(300), (), LayeredReplicas),
    "logistic": (lambda: built(LogisticRegression(), (2, 3)), floats(2, 3), (), LayeredReplicas),
    "mlp": (lambda: built(Mlp(hidden=(8,)), (6,)), floats(6), (), LayeredReplicas),
    "cnn": (lambda: built(Cnn(channels=(2, 3), hidden=8), (8, 8)), floats(8, 8), (), LayeredReplicas),
    "resnet": (
        lambda: built(ResNet(blocks=(1, 1), width=4, groups=2), (3, 8, 8)),
        floats(3, 8, 8),
        (),
        LayeredReplicas,
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, bias=False), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 3)),
        floats(2, 6),
        (),
        LayeredReplicas,
    ),
    "transformer": (
        lambda: built(Transformer(width=8, heads=2, layers=1, dropout=0.3), (6,), (6, 3)),
        tokens,
        (6,),
        LayeredReplicas,
    ),
    "transformer-last": (
        lambda: built(Transformer(width=8, heads=2, layers=1), (6,), (3,)),
        tokens,
        (),
        LayeredReplicas,
    ),
    "gru": (lambda: built(Gru(hidden=4), (6,), (6, 3)), tokens, (6,), VmapReplicas),
    "own-parameter": (Scaled, floats(6), (), VmapReplicas),
    "looks-at-numbers": (lambda: Peeking(6, 3), floats(6), (), None),
}


@pytest.mark.parametrize("case", CASES)
class TestManyAtOnce:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param(options, id="-".join(options), marks=[] if options in QUICK_OPTIONS else pytest.mark.ci)
            for options in OPTIONS
        ],
    )
    def test_it_is_what_each_comes_to_alone(self, case: str, options: dict[str, Any]) -> None:
        make, x_of, labels, way = CASES[case]
        module = make()
        data = Data([9, 4, 17, 1, 4], x_of, labels)
        params_D = flatten(module)
        rule = SGD.model_validate({"learning_rate": 0.1, "batch_size": 4, **options})
        engine = Engine(module, data.examples)
        assert type(engine._replicas) is (way or type(None))
        assert bool(engine.note) == (way is not LayeredReplicas)
        found_ND = np.empty((5, len(params_D)), np.float32)
        report = engine.train(rule, params_D, data.tasks, found_ND)
        expected_ND, losses = data.alone(rule, module, params_D)
        np.testing.assert_allclose(found_ND, expected_ND, rtol=1e-4, atol=1e-6)
        assert np.abs(expected_ND).max() > 1e-3
        assert report.client_ids == ("c0", "c1", "c2", "c3", "c4")
        assert [each.weight for each in report.losses] == [each.weight for each in losses]
        assert [each.mean for each in report.losses] == pytest.approx([each.mean for each in losses], rel=1e-5)
        assert report.rejected == {}

    def test_added_up_it_is_their_weighted_sum(self, case: str) -> None:
        make, x_of, labels, _ = CASES[case]
        module = make()
        data = Data([9, 4, 17, 1, 4], x_of, labels)
        params_D = flatten(module)
        rule = SGD(learning_rate=0.1, batch_size=4, epochs=1)
        expected_ND, _ = data.alone(rule, module, params_D)
        norms = np.linalg.norm(expected_ND.astype(np.float64), axis=1)
        limit = float(np.sort(norms)[-2:].mean())  # the longest one is refused
        total_D = np.empty(len(params_D), np.float32)
        report = Engine(module, data.examples).train(
            rule, params_D, data.tasks, total_D, StreamingSum(Mean(), RoundAdmission(Admission(max_update_norm=limit)))
        )
        longest = int(norms.argmax())
        reason = Admission(max_update_norm=limit).rejection(norms[longest])
        assert report.rejected == {f"c{longest}": reason}
        weights_N = np.array([task.num_examples for task in data.tasks], np.float64)
        weights_N[longest] = 0
        np.testing.assert_allclose(total_D, weights_N @ expected_ND, rtol=1e-4, atol=1e-5)
        assert (report.weight, report.count) == (weights_N.sum(), 4)


@pytest.mark.parametrize("case", ["linears", "wide", "cnn", "gru", "looks-at-numbers"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_contributions_added_up(case: str, per_layer: bool) -> None:
    """What clients come to alone, clipped by the definition, and how many were not clipped."""
    make, x_of, labels, _ = CASES[case]
    module = make()
    data = Data([9, 4, 17, 1, 4], x_of, labels)
    params_D = flatten(module)
    rule = SGD(learning_rate=0.1, batch_size=4, epochs=1)
    deltas_ND = data.alone(rule, module, params_D)[0].astype(np.float64)
    norms = np.linalg.norm(deltas_ND, axis=1)
    clip = Clip(float(np.median(norms)) * 1.01, per_layer)
    weights = Mean(max_examples=5)
    sum_D1 = np.full(len(params_D) + 1, np.nan)
    report = Engine(module, data.examples).train(
        rule, params_D, data.tasks, sum_D1, StreamingSum(weights, RoundAdmission(Admission(), clip))
    )
    assert (report.client_ids, report.rejected) == (tuple(task.client_id for task in data.tasks), {})
    expected_D, unclipped = np.zeros(len(params_D)), 0
    edges = np.cumsum([0, *(each.numel() for each in module.parameters())]) if per_layer else [0, len(params_D)]
    bound = clip.norm / np.sqrt(len(edges) - 1)
    for delta_D, task in zip(deltas_ND, data.tasks, strict=True):
        lengths = [np.linalg.norm(delta_D[start:stop]) for start, stop in pairwise(edges)]
        unclipped += all(length <= bound for length in lengths)
        for (start, stop), length in zip(pairwise(edges), lengths, strict=True):
            expected_D[start:stop] += delta_D[start:stop] * min(1.0, bound / length) * min(task.num_examples, 5) / 5
    assert sum_D1[-1] == unclipped - 5 / 2
    assert (sum_D1[:-1] == np.rint(sum_D1[:-1])).all()
    found_D = sum_D1[:-1] * clip.norm / clip_norm_in_units(len(params_D))
    np.testing.assert_allclose(found_D, expected_D, rtol=2e-3, atol=clip.norm * 2e-5)


def test_contributions_do_not_depend_on_the_order() -> None:
    """Nor on who is trained with whom: the sum is of whole numbers. (Which whole numbers, the last bits of a training
    say.)"""
    module = linears()
    data, rule = Data([5] * 40, floats(6), ()), SGD(learning_rate=0.1, batch_size=4, epochs=1)
    engine, params_D, clip = Engine(module, data.examples), flatten(module), Clip(0.05)
    deltas_ND = np.empty((40, len(params_D)), np.float32)
    engine.train(rule, params_D, data.tasks, deltas_ND)
    sums = set()
    for seed in range(5):
        sum_D1, order = np.zeros(len(params_D) + 1), np.random.default_rng(seed).permutation(40)
        for rows in np.array_split(order, seed + 1):
            deltas_CD = torch.from_numpy(deltas_ND[rows])
            add_contributions(sum_D1, [deltas_CD], torch.ones(len(rows)), clip)
        sums.add(sum_D1.tobytes())
    assert len(sums) == 1


@settings(max_examples=cases(60), deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    widths=st.lists(st.integers(1, 40), max_size=3),
    features=st.integers(1, 60),
    batch_size=st.none() | st.integers(1, 16),
    epochs=st.integers(1, 3),
    options=st.fixed_dictionaries(
        {},
        optional={
            "momentum": st.floats(0, 0.95),
            "weight_decay": st.floats(0, 0.1),
            "max_gradient_norm": st.floats(0.01, 10),
            "label_smoothing": st.floats(0, 0.5),
            "objective": st.one_of(st.just(LossAlone()), st.builds(Proximal, mu=st.floats(0.001, 1))),
        },
    ),
    seed=st.integers(0, 1000),
)
def test_any_network_any_sizes_any_options(
    sizes: list[int],
    widths: list[int],
    features: int,
    batch_size: int | None,
    epochs: int,
    options: dict[str, float],
    seed: int,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        edges = [features, *widths, 3]
        layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(edges)]
        module = nn.Sequential(*layers)
    data = Data(sizes, floats(features), (), seed)
    params_D = flatten(module)
    rule = SGD.model_validate({"learning_rate": 0.05, "batch_size": batch_size, "epochs": epochs, **options})
    engine = Engine(module, data.examples)
    assert isinstance(engine._replicas, LayeredReplicas), engine.note
    found_ND = np.empty((len(sizes), len(params_D)), np.float32)
    engine.train(rule, params_D, data.tasks, found_ND)
    expected_ND, _ = data.alone(rule, module, params_D)
    np.testing.assert_allclose(found_ND, expected_ND, rtol=0, atol=1e-6 + 1e-4 * np.abs(expected_ND).max())


def test_what_a_client_comes_to_does_not_depend_on_its_chunk() -> None:
    """Large enough that a shard is several chunks; which clients share one changes no more than the last bits."""
    module = nn.Sequential(nn.Linear(500, 700), nn.ReLU(), nn.Linear(700, 3))
    data = Data([5, 400, 5, 30, 400, 7, 400, 8, 9], floats(500), ())
    params_D = flatten(module)
    assert 2 * len(params_D) * 4 * 9 > CHUNK_BYTES
    rule = SGD(learning_rate=0.1, batch_size=50, epochs=1)
    engine = Engine(module, data.examples)
    chunks = [positions for positions, _, _ in engine._chunks(rule, torch.from_numpy(params_D), data.tasks)]
    assert [len(chunk) for chunk in chunks] == [3, 6]  # those with many examples have weights of their own
    found_ND = np.empty((9, len(params_D)), np.float32)
    engine.train(rule, params_D, data.tasks, found_ND)
    np.testing.assert_allclose(found_ND, data.alone(rule, module, params_D)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1, 1], [1, 2], [3, 1, 4, 2]], ids=str)
def test_clients_of_a_few_rows(sizes: list[int]) -> None:
    """The engine learns how many rows a layer sees from the batches that it has trained."""
    module, data = folding(), Data(sizes, floats(300), ())
    rule = SGD(learning_rate=0.1, batch_size=4, epochs=2)
    params_D, engine = flatten(module), Engine(module, data.examples)
    for _ in range(2):
        found_ND = np.empty((len(sizes), len(params_D)), np.float32)
        engine.train(rule, params_D, data.tasks, found_ND)
        np.testing.assert_allclose(found_ND, data.alone(rule, module, params_D)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("features", [6, 300])
def test_what_is_wrong_with_one_clients_data_does_not_reach_another(features: int) -> None:
    """Batches of different lengths are padded, and a gradient of zero times infinity is not zero."""
    module = nn.Sequential(nn.Linear(features, 200), nn.ReLU(), nn.Linear(200, 3))
    data = Data([17, 5, 17, 2, 6], floats(features), ())
    data.x[:17] = 3e38  # of the client whose rows come first in every batch
    params_D = flatten(module)
    rule = SGD(learning_rate=0.1, batch_size=4, epochs=2)
    found_ND = np.empty((5, len(params_D)), np.float32)
    Engine(module, data.examples).train(rule, params_D, data.tasks, found_ND)
    expected_ND, _ = data.alone(rule, module, params_D)
    assert not np.isfinite(found_ND[0]).all() and np.isfinite(expected_ND[1:]).all()
    np.testing.assert_allclose(found_ND[1:], expected_ND[1:], rtol=1e-4, atol=1e-6)


class TestDualForm:
    def steps(self, num_rows: list[int]) -> tuple[FactoredWeight, Tensor]:
        """A form that has seen these numbers of rows, step by step, and the clients' changes by the definition."""
        generator = torch.Generator().manual_seed(0)
        form = FactoredWeight(torch.randn(7, 5, generator=generator), 3, sum(num_rows), 0.1)
        deltas = torch.zeros(3, 7, 5)
        for rows in num_rows:
            x, g = (torch.randn(3, rows, width, generator=generator) for width in (5, 7))
            form.gradient(x, g, needs_input=False)
            deltas -= 0.1 * g.mT @ x
        return form, deltas

    def test_it_stands_for_each_clients_weight(self) -> None:
        form, deltas = self.steps([2, 4, 1])
        torch.testing.assert_close(form.deltas(), deltas)
        x = torch.randn(3, 6, 5)
        torch.testing.assert_close(form.multiply(x), x @ (form.weight + deltas).mT)
        total = torch.zeros(7, 5)
        form.add_weighted(total, torch.tensor([2.0, 0.0, 0.5]))
        torch.testing.assert_close(total, 2 * deltas[0] + 0.5 * deltas[2])

    def test_its_norms(self) -> None:
        form, deltas = self.steps([2, 4, 1])
        norms = deltas.double().flatten(1).norm(dim=1)
        torch.testing.assert_close(form.squared_norms().sqrt(), norms, rtol=1e-5, atol=0)
        assert (form.norm_bounds() > norms).all()

    def test_the_bound_on_a_norm_is_met_where_there_is_one_row(self) -> None:
        form, deltas = self.steps([1])
        norms = deltas.double().flatten(1).norm(dim=1)
        torch.testing.assert_close(form.norm_bounds(), norms, rtol=1e-5, atol=0)

    def test_more_rows_than_it_was_told_of(self) -> None:
        form, deltas = self.steps([3])
        x, g = torch.randn(3, 4, 5), torch.randn(3, 4, 7)
        form.gradient(x, g, needs_input=False)
        torch.testing.assert_close(form.deltas(), deltas - 0.1 * g.mT @ x)


def test_the_same_again_is_the_same_bits() -> None:
    data = Data([9, 4, 17], floats(6), ())
    rule = SGD(learning_rate=0.1, batch_size=4, epochs=2)
    bits = set()
    for _ in range(2):
        torch.manual_seed(0)
        module = linears(dropout=0.2)
        engine = Engine(module, data.examples)
        for _ in range(2):
            total_D = np.empty(num_parameters(module), np.float32)
            engine.train(rule, flatten(module), data.tasks, total_D, StreamingSum(Mean(), RoundAdmission(Admission())))
            bits.add(total_D.tobytes())
    assert len(bits) == 1


class TestRefused:
    def test_an_update_that_is_not_finite_leaves_the_others(self) -> None:
        """In the dual form and in each client's own weights."""
        for features in (6, 300):
            module = nn.Sequential(nn.Linear(features, 200), nn.ReLU(), nn.Linear(200, 3))
            data = Data([8, 8, 8], floats(features), ())
            data.x[8:16] = 1e30
            params_D = flatten(module)
            rule = SGD(learning_rate=0.1, batch_size=4, epochs=1)
            total_D = np.empty(num_parameters(module), np.float32)
            report = Engine(module, data.examples).train(
                rule, params_D, data.tasks, total_D, StreamingSum(Mean(), RoundAdmission(Admission()))
            )
            assert report.rejected == {"c1": Admission().rejection(float("nan"))}
            expected_ND, _ = data.alone(rule, module, params_D)
            assert not np.isfinite(expected_ND[1]).all()
            np.testing.assert_allclose(total_D, 8 * (expected_ND[0] + expected_ND[2]), rtol=1e-4, atol=1e-6)


def test_no_clients() -> None:
    data = Data([4], floats(6), ())
    module = linears()
    total_D = np.ones(53, np.float32)
    report = Engine(module, data.examples).train(
        SGD(learning_rate=0.1, epochs=1),
        flatten(module),
        [],
        total_D,
        StreamingSum(Mean(), RoundAdmission(Admission())),
    )
    assert (report.client_ids, report.weight, report.count) == ((), 0, 0)
    assert not total_D.any()


def test_a_model_that_fails_later_is_named_with_its_clients() -> None:
    class Tiring(nn.Linear):
        tired = False

        def forward(self, x: Tensor) -> Tensor:
            if self.tired:
                raise ValueError("forward\nbroke")
            return super().forward(x)

    data, module = Data([4, 4], floats(6), ()), Tiring(6, 3)
    engine = Engine(module, data.examples)
    Tiring.tired = True
    with pytest.raises(
        ModelError,
        match=r"the model failed while client c0 trained \(in the model, Tiring\): ValueError: forward broke",
    ):
        engine.train(SGD(learning_rate=0.1, epochs=1), flatten(module), data.tasks, np.empty((2, 21), np.float32))


def test_the_number_of_threads_comes_back() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data, module = Data([4], floats(6), ()), linears()
        engine = Engine(module, data.examples)
        engine.train(SGD(learning_rate=0.1, epochs=1), flatten(module), data.tasks, np.empty((1, 53), np.float32))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


class TestNotes:
    def test_why_it_goes_client_by_client(self) -> None:
        data = Data([4], floats(6), ())
        assert Engine(linears(), data.examples).note == ""
        note = Engine(Scaled(), data.examples).note
        assert note == "many clients at once: the model (Scaled) has parameters of its own and no form for many clients"
        note = Engine(Peeking(6, 3), data.examples).note
        assert "torch.func.vmap: RuntimeError" in note

    def test_a_model_in_which_rows_of_a_batch_meet_is_found_out(self) -> None:
        class Centred(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x - x.mean(0))

        engine = Engine(Centred(), Data([4], floats(6), ()).examples)
        assert isinstance(engine._replicas, VmapReplicas)  # none of its rows is another client's, nor padding
        assert engine.note.startswith(
            "many clients at once: the model (Centred) is not among the layers that are known"
        )

    def test_a_model_that_draws_random_numbers_of_its_own(self) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x + 1e-9 * torch.randn_like(x))  # too little to be seen in the updates

        data, module = Data([4, 4], floats(6), ()), Noisy()
        torch.manual_seed(7)
        before = torch.get_rng_state()
        engine = Engine(module, data.examples)
        assert torch.equal(torch.get_rng_state(), before)
        assert engine._replicas is None
        assert "torch.func.vmap: RuntimeError: vmap: called random operation" in engine.note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["linears", "cnn", "dropout", "own-parameter"])
def test_a_gpu_comes_to_the_same(case: str) -> None:
    make, x_of, labels, _ = CASES[case]
    module = make()
    data = Data([9, 4, 17, 1, 4], x_of, labels)
    params_D = flatten(module)
    rule = SGD(learning_rate=0.1, batch_size=4, epochs=2)
    expected_ND, _ = data.alone(rule, module, params_D)
    there = ExampleTable(data.examples.x.cuda(), data.examples.y.cuda(), data.examples.starts, data.examples.stops)
    found_ND = np.empty((5, len(params_D)), np.float32)
    Engine(module, there).train(rule, params_D, data.tasks, found_ND)
    np.testing.assert_allclose(found_ND, expected_ND, rtol=1e-3, atol=1e-5)
