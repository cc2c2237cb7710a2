"""A model is untrusted code: whatever it does, clients and examples stay apart, and an example moves an update by a
bounded amount, or the model is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.models import Gru, RowFormat, Transformer, build_seeded, check_fits, meeting_place
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.privacy import ExampleLevel
from fedrounds.fl_components.privacy.steps import PIECE_ROWS, Mechanism
from fedrounds.fl_components.task import Classification
from fedrounds.fl_components.training import SGD, evaluate, grad_sampler_name, one_thread
from fedrounds.fl_components.training.chunk import ExampleTable, synthetic_like
from fedrounds.fl_components.training.engine import Engine
from fedrounds.fl_components.training.layers import Batch
from fedrounds.fl_components.training.per_example import ClippedReplicas
from fedrounds.fl_components.training.private import choose_grad_sampler
from fedrounds.fl_components.training.replicas import LayeredReplicas, VmapReplicas
from fedrounds.fl_components.training.sgd import PerExampleLoop
from fedrounds.fl_components.values import SimulatedClient

PLAIN = SGD(learning_rate=0.1, batch_size=4, epochs=2)
PRIVATE = SGD.model_validate(
    {
        "learning_rate": 0.1,
        "steps": 3,
        "privacy": {"kind": "example_level", "noise_multiplier": 0.5, "max_grad_norm": 0.7, "sampling_rate": 0.5},
    }
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Model(nn.Module):
    """Four features to two scores; `inner` is what a test makes of the features before the last layer."""

    def __init__(self, inner: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(4, 5), nn.Linear(5, 2), inner

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(hidden if self.inner is None else self.inner(self, hidden))


class Tokens(nn.Module):
    """Three tokens below five to two scores, by one of torch's ways of looking up."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(5, 4, **options), nn.Linear(12, 2)
        self.look_up = look_up

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.look_up(self.table.weight, x).flatten(1))


def clients(x: Any, sizes: list[int]) -> tuple[ExampleTable, list[SimulatedClient]]:
    stops = np.cumsum(sizes)
    y = np.random.default_rng(9).integers(0, 2, len(x))
    examples = ExampleTable(torch.from_numpy(x), torch.from_numpy(y), stops - sizes, stops)
    return examples, [
        SimulatedClient(f"c{i}", i, n, seed=100 + i, key=bytes([i + 1]) * 32) for i, n in enumerate(sizes)
    ]


def floats(sizes: list[int], width: int = 4) -> tuple[ExampleTable, list[SimulatedClient]]:
    return clients(np.random.default_rng(0).standard_normal((sum(sizes), width)).astype(np.float32), sizes)


def tokens(sizes: list[int]) -> tuple[ExampleTable, list[SimulatedClient]]:
    return clients(np.random.default_rng(0).integers(0, 5, (sum(sizes), 3)), sizes)


def updates(module: nn.Module, examples: ExampleTable, tasks: list[SimulatedClient], rule: SGD = PLAIN) -> Any:
    params_D = flatten(module)
    out = np.empty((len(tasks), len(params_D)), np.float32)
    Engine(module, examples).train(rule, params_D, tasks, out)
    return out


def alone(module: nn.Module, examples: ExampleTable, tasks: list[SimulatedClient], rule: SGD = PLAIN) -> Any:
    """By the definition: `SGD.train` for one client after the other."""
    params_D, own = flatten(module), copy.deepcopy(module)
    rows = [slice(examples.starts[task.index], examples.stops[task.index]) for task in tasks]
    return np.stack(
        [
            rule.train(own, params_D, examples.x[mine], examples.y[mine], task.seed, task.key)[0]
            for mine, task in zip(rows, tasks, strict=True)
        ]
    )


# --- what a model keeps ---


class ActNorm(nn.Module):
    """Shift and scale are set from the first batch; a plain attribute says that this is done."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale, self.done = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4)), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
            self.done = True
        return (x + self.shift) * self.scale


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


CALLS = {"count": 0}


def _keep(name: str, value: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def inner(module: Any, hidden: Tensor) -> Tensor:
        setattr(module, name, value(module, hidden))
        return hidden

    return inner


def _append(module: Any, hidden: Tensor) -> Tensor:
    module.last.history["means"].append(float(hidden.detach().mean()))
    return hidden


def _count(module: Any, hidden: Tensor) -> Tensor:
    CALLS["count"] += 1
    return hidden


def _through_data(module: Any, hidden: Tensor) -> Tensor:
    module.last.weight.data[0] = 1.0
    return hidden


def _through_numpy(module: Any, hidden: Tensor) -> Tensor:
    module.last.weight.detach().numpy()[0] += 1.0
    return hidden


def _when_bright(module: Any, hidden: Tensor) -> Tensor:
    if hidden.detach().abs().max() > 0.99999:  # never for rows of about 1
        with torch.no_grad():
            module.last.bias.add_(1.0)
    return hidden


def _with_history() -> nn.Module:
    module = Model(_append)
    module.last.history = {"means": []}  # type: ignore[assignment]
    return module


CHANGES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max-norm": (lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Flatten(), nn.Linear(12, 2)), r"0 \(Embed"),
    "bag-max-norm": (
        lambda: nn.Sequential(nn.EmbeddingBag(5, 4, max_norm=1.0), nn.Linear(4, 2)),
        r"parameter 'weight' of 0 \(EmbeddingBag, max_norm=1.0\)",
    ),
    "functional-max-norm": (
        lambda: Tokens(lambda table, x: functional.embedding(x, table, max_norm=1.0)),
        "parameter 'weight' of table",
    ),
    "act-norm": (lambda: nn.Sequential(ActNorm(), nn.Linear(4, 2)), r"of 0 \(ActNorm\)"),
    "running-mean": (lambda: nn.Sequential(RunningMean(), nn.Linear(4, 2)), r"buffer 'mean' of 0 \(RunningMean\)"),
    "running-mean-in-eval": (lambda: nn.Sequential(RunningMean(), nn.Linear(4, 2)).eval(), "buffer 'mean'"),
    "spectral-norm": (
        lambda: nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))),
        "_SpectralNorm",
    ),
    "counter": (lambda: Model(_keep("calls", lambda module, _: getattr(module, "calls", 0) + 1)), "attribute 'calls'"),
    "last-output": (lambda: Model(_keep("seen", lambda _, hidden: hidden.detach())), "attribute 'seen'"),
    "nested": (_with_history, r"attribute 'history' of last"),
    "global": (lambda: Model(_count), "attribute 'inner'"),
    "data": (lambda: Model(_through_data), "parameter 'weight' of last"),
    "numpy": (lambda: Model(_through_numpy), "parameter 'weight' of last"),
    "when-bright": (lambda: Model(_when_bright), "parameter 'bias' of last"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_changes_as_it_runs_is_refused_and_stays_as_it_was(case: str) -> None:
    make, words = CHANGES[case]
    module = make()
    is_tokens = any(isinstance(each, (nn.Embedding, nn.EmbeddingBag)) for each in module.modules())
    rows = RowFormat((3,), True, np.zeros(3, np.int64), np.full(3, 4)) if is_tokens else RowFormat((4,))
    before = flatten(module)
    with pytest.raises(ModelError, match=f"the model changes as it runs: .*{words}"):
        check_fits(module, rows, (2,))
    assert flatten(module).tobytes() == before.tobytes()


@pytest.mark.parametrize("rule", [PLAIN, PRIVATE], ids=["plain", "example-level"])
@pytest.mark.parametrize("case", ["functional-max-norm", "act-norm", "running-mean", "counter", "global", "data"])
def test_training_refuses_it_too(case: str, rule: SGD) -> None:
    """Without the check, whichever way trains: alone, or many at once."""
    module = CHANGES[case][0]()
    examples, tasks = tokens([9, 5]) if "norm" in case and case != "act-norm" else floats([9, 5])
    with pytest.raises(ModelError, match="the model changes as it runs"):
        updates(module, examples, tasks, rule)
    with pytest.raises(ModelError, match="the model changes as it runs"):
        alone(module, examples, tasks, rule)


@pytest.mark.parametrize("rule", [PLAIN, PRIVATE], ids=["plain", "example-level"])
def test_a_write_that_depends_on_a_row_is_refused_when_it_happens(rule: SGD) -> None:
    """No made-up row of the engine's reaches the branch; one of the client's does."""
    examples, tasks = floats([9, 5])
    assert np.isfinite(updates(Model(_when_bright), examples, tasks, rule)).all()
    examples.x[9:] = 1e3
    with pytest.raises(ModelError, match=r"while client c1 trained.*the model changes as it runs: parameter 'bias'"):
        updates(Model(_when_bright), examples, tasks, rule)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_that_no_seed_decides_are_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(ModelError, match="draws from Python's or numpy's random numbers"):
        check_fits(Model(lambda _, hidden: hidden * draw()), RowFormat((4,)), (2,))


def test_well_behaved_models_pass_and_need_no_row_of_anybody_s() -> None:
    for module in (
        Model(),
        Model(lambda _, hidden: functional.layer_norm(hidden, (5,))),
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)),
        nn.Sequential(nn.Unflatten(1, (4, 1)), nn.LSTM(1, 3, batch_first=True), _Last(), nn.Linear(3, 2)),
    ):
        check_fits(module, RowFormat((4,)), (2,), one_row={"training": "", "evaluation": ""})


class _Last(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0][:, -1]


# --- the input ---


def test_a_model_that_works_on_its_input_in_place_trains_and_is_evaluated_as_one_that_does_not() -> None:
    class Standard(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.linear, self.in_place = nn.Linear(4, 2), in_place

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.sub_(5).div_(2) if self.in_place else (x - 5) / 2)

    examples, tasks = floats([9, 5, 9])
    x_before = examples.x.clone()
    one = Standard(in_place=True)
    other = Standard(in_place=False)
    other.load_state_dict(one.state_dict())
    check_fits(one, RowFormat((4,)), (2,))
    for rule in (PLAIN, PRIVATE):
        np.testing.assert_array_equal(updates(one, examples, tasks, rule), updates(other, examples, tasks, rule))
    x, y = examples.x.numpy(), examples.y.numpy()
    values = [evaluate(module, x, y, Classification().metrics()).values() for module in (one, one, other)]
    assert values[0] == values[1] == values[2]
    assert torch.equal(examples.x, x_before)


# --- rows and clients that could meet ---


def _scale_if_bright(_: Any, hidden: Tensor) -> Tensor:
    return hidden / 255 if hidden.max() > 0.9 else hidden


def _scale_without_branch(_: Any, hidden: Tensor) -> Tensor:
    return torch.where(hidden.max() > 0.999, hidden / 255, hidden)


@pytest.mark.parametrize("inner", [_scale_if_bright, _scale_without_branch, lambda _, h: h / (1 + h.abs().max())])
def test_clients_that_share_a_chunk_do_not_meet(inner: Any) -> None:
    torch.manual_seed(0)
    module, (examples, tasks) = Model(inner), floats([9, 4, 9, 6])
    examples.x[:9] *= 100  # the first client's branch is another than the others'
    expected = alone(module, examples, tasks)
    np.testing.assert_allclose(updates(module, examples, tasks), expected, rtol=1e-4, atol=1e-6)
    some = updates(module, examples, tasks[1:3])
    np.testing.assert_allclose(some, expected[1:3], rtol=1e-4, atol=1e-6)


def test_where_padding_could_be_seen_there_is_none() -> None:
    module, (examples, tasks) = Model(lambda _, h: h - (h.mean(0) > 0.999) * h.mean(0)), floats([9, 4, 7, 6])
    assert isinstance(Engine(module, examples)._replicas, VmapReplicas)
    examples.x[:] = examples.x.abs() * 1e4
    np.testing.assert_allclose(updates(module, examples, tasks), alone(module, examples, tasks), rtol=1e-4, atol=1e-6)


def test_the_way_is_the_same_whenever_it_is_chosen() -> None:
    """Also after the module was trained, and by a process that never saw its rows."""
    module, (examples, _) = Model(_scale_if_bright), floats([9, 4])
    other_rows = floats([3])[0]
    notes = [Engine(module, rows).note for rows in (examples, other_rows)]
    with torch.no_grad():
        for each in module.parameters():
            each.zero_()
    assert "torch.func.vmap" in notes[0] and notes[0] == notes[1]
    assert Engine(module, examples)._replicas is None


def test_only_reviewed_layers_run_in_one_batch_with_others() -> None:
    class Mine(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Attribute(nn.Linear):
        stride = 1

    class Built(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 2))

    class BuiltAgain(Built):
        """Twice removed."""

    class Table(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(3, 4, max_norm=1.0)

    class Recurrent(nn.GRU):
        def __init__(self) -> None:
            super().__init__(4, 2)

    class Replaced(nn.Conv1d):
        def __init__(self) -> None:
            super().__init__(4, 2, 1)
            self._conv_forward = lambda x, weight, bias: x - x.mean(0)  # type: ignore[method-assign, assignment]

    hooked = nn.Sequential(nn.Linear(4, 2))
    hooked[0].register_forward_hook(lambda layer, args, out: out - out.mean(0))
    replaced = nn.Sequential(nn.Linear(4, 2))
    replaced[0].forward = lambda x: x.mean(0, keepdim=True).expand(len(x), 4)[:, :2]  # type: ignore[method-assign]
    mine, attribute = nn.Sequential(Mine(4, 2)), nn.Sequential(Attribute(4, 2))
    for module in (Model(), mine, attribute, hooked, replaced, nn.Sequential(nn.Softmax(0), nn.Linear(4, 2))):
        assert meeting_place(module) is not None
        assert not isinstance(Engine(module, floats([5, 3])[0])._replicas, LayeredReplicas)
    for layer in (Table(), Recurrent(), Replaced()):  # how a reviewed class is built decides what its code does
        assert meeting_place(layer) is not None
    for module in (nn.Sequential(nn.Linear(4, 2)), build_seeded(Transformer(), (3,), (5,), 0)):
        assert meeting_place(module) is None
    for module in (Built(), BuiltAgain()):  # no code of its own but what builds it
        assert meeting_place(module) is None
        assert isinstance(Engine(module, floats([5, 3])[0])._replicas, LayeredReplicas)
    assert meeting_place(build_seeded(Gru(), (3,), (5,), 0)) is None


# --- indices ---

LOOK_UPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "embedding": lambda table, x: functional.embedding(x, table),
    "torch.embedding": lambda table, x: torch.embedding(table, x),
    "aten.embedding": lambda table, x: torch.ops.aten.embedding(table, x),
    "index": lambda table, x: table[x],
    "index_select": lambda table, x: table.index_select(0, x.flatten()).unflatten(0, x.shape),
    "gather": lambda table, x: table.gather(0, x.reshape(-1, 1).expand(-1, 4)).unflatten(0, x.shape),
    "take_along_dim": lambda table, x: table.take_along_dim(x.reshape(-1, 1), 0).unflatten(0, x.shape),
    "one_hot": lambda table, x: functional.one_hot(x, 5).float() @ table,
    "embedding_bag": lambda table, x: functional.embedding_bag(x.reshape(-1, 1), table).unflatten(0, x.shape),
    "scatter": lambda table, x: torch.zeros(*x.shape, 5).scatter(-1, x[..., None], 1.0) @ table,
}


@torch.jit.script
def _scripted(table: Tensor, x: Tensor) -> Tensor:
    return torch.embedding(table, x)


LOOK_UPS["scripted"] = lambda table, x: _scripted(table, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("token", [5, -1, *(pytest.param(each, marks=pytest.mark.slow) for each in (7, -6, 2**40))])
@pytest.mark.parametrize("look_up", LOOK_UPS)
@pytest.mark.parametrize("rule", [PLAIN, pytest.param(PRIVATE, marks=pytest.mark.slow)], ids=["plain", "example-level"])
def test_an_index_outside_a_table_fails_as_it_does_alone(look_up: str, token: int, rule: SGD) -> None:
    module = Tokens(LOOK_UPS[look_up])
    examples, tasks = tokens([8, 8, 5])
    rule = (
        rule.model_copy(update={"privacy": rule.privacy.model_copy(update={"sampling_rate": 1.0})})
        if (rule.example_level)
        else rule
    )
    sound = updates(module, examples, tasks, rule)
    examples.x[9, 1] = token
    try:
        expected = alone(module, examples, tasks, rule)
    except Exception:  # as torch has it, for this client
        with pytest.raises(ModelError, match="the model failed while client c1 trained"):
            updates(module, examples, tasks, rule)
    else:  # some ways take negative indices, or reduce what is too large
        found = updates(module, examples, tasks, rule)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[[0, 2]], sound[[0, 2]], rtol=1e-4, atol=1e-5)


def test_an_index_outside_a_table_fails_under_a_claim_too() -> None:
    test_an_index_outside_a_table_fails_as_it_does_alone("embedding", 5, PRIVATE)


@pytest.mark.parametrize("token", [5, -1])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}], ids=["layered", "vmap"])
def test_the_error_names_the_layer(token: int, options: dict[str, Any]) -> None:
    module = nn.Sequential(nn.Embedding(5, 4, **options), nn.Flatten(), nn.Linear(12, 2))
    examples, tasks = tokens([8, 8])
    examples.x[12, 0] = token
    with pytest.raises(ModelError, match=r"client c1 trained \(in 0, Embedding\): IndexError: index out of range"):
        updates(module, examples, tasks)


# --- the influence of one example ---


def _attend(module: Any, hidden: Tensor) -> Tensor:
    state = hidden[..., None] * module.first.bias
    return functional.scaled_dot_product_attention(state, state, state).mean(-1)


INNER: dict[str, Callable[[Any, Tensor], Tensor] | None] = {
    "plain": None,
    "normalise": lambda _, h: functional.normalize(h, dim=-1),
    "layer norm": lambda _, h: functional.layer_norm(h, (5,)),
    "attend": _attend,
    "sort": lambda _, h: h.sort(-1).values,
    "gather largest": lambda _, h: h.gather(-1, h.argmax(-1, keepdim=True).expand_as(h)) + h,
    "bucket": lambda _, h: torch.eye(5)[(h[:, 0].detach().abs() * 4).nan_to_num(0).long().clamp(0, 4)] + h,
    "branch on the batch": _scale_if_bright,
    "scale by the batch": lambda _, h: h / (1 + h.abs().max()),
    "where on the batch": _scale_without_branch,
    "centre": lambda _, h: h - h.mean(0),
    "item": lambda _, h: h * (2.0 if h.detach().sum().item() > 0 else 1.0),
    "numpy": lambda _, h: h * float(np.abs(h.detach().numpy()).max()),
    "share of the batch": lambda _, h: h / len(h),
    "sum of the batch": lambda _, h: h.sum(0, keepdim=True).expand_as(h),
    "keep": _keep("seen", lambda _, h: h.detach()),
    "add what was kept": lambda module, h: _remember(module, h),
}


def _remember(module: Any, hidden: Tensor) -> Tensor:
    before = getattr(module, "memory", 0.0)
    module.memory = hidden.detach().mean(0, keepdim=True)
    return hidden + before


@settings(max_examples=12, deadline=None)
@given(
    inner=st.lists(st.sampled_from(sorted(INNER)), min_size=1, max_size=2),
    value=st.sampled_from([0.0, 1.0, -3.0, 255.0, 1e6, -1e30, 1e38, float("inf"), float("nan")]),
    num_rows=st.integers(2, 7),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
    seed=st.integers(0, 100),
)
def test_an_example_moves_a_sum_by_at_most_the_clipping_norm_or_is_refused(
    inner: list[str], value: float, num_rows: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)

    def composed(module: Any, hidden: Tensor) -> Tensor:
        for name in inner:
            each = INNER[name]
            hidden = hidden if each is None else each(module, hidden)
        return hidden

    module = Model(composed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 4, generator=generator) * scale
    y = torch.randint(0, 2, (num_rows,), generator=generator)
    x[0] = value
    mechanism = Mechanism.of(
        ExampleLevel(noise_multiplier=0.5, max_grad_norm=1.0, sampling_rate=0.5), len(flatten(module))
    )
    try:
        way = choose_grad_sampler(module, synthetic_like(ExampleTable(x, y, np.array([0]), np.array([num_rows]))))
        sums = [_step(way, module, each, y[-len(each) :], mechanism) for each in (x, x[1:])]
    except ModelError:
        return
    assert (sums[0] - sums[1]).norm() <= 1.0


def _step(way: Any, module: nn.Module, x: Tensor, y: Tensor, mechanism: Mechanism) -> Tensor:
    """A step's sum as it is before the noise, in units of the clipping norm."""
    assert len(y) <= PIECE_ROWS
    parameters = [each for each in module.parameters() if each.requires_grad]
    if isinstance(way, ClippedReplicas):
        sums = [torch.zeros(1, *each.shape) for each in parameters]
        way.use([each.detach()[None].clone() for each in parameters])
        way.add_clipped(Batch(x[None], y[None], [len(y)], [len(y)], []), 0.0, mechanism, sums, fresh=True)
    else:
        own = copy.deepcopy(module).train()
        sums, _ = PerExampleLoop(Classification(), own, [each for each in own.parameters()], mechanism, 0.0)(
            x, y, list(range(len(y)))
        )
    return torch.cat([each.flatten() for each in sums]).double().round() * mechanism.unit


@pytest.mark.parametrize("bright", [2.0, 255.0, 1e6])
def test_images_of_bytes_among_images_of_floats(bright: float) -> None:
    """`if x.max() > 1: x = x / 255`: one example at a time, bounded and as the definition has it."""

    class Maximum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.scores(x / 255 if x.max() > 1 else x)

    module, (examples, tasks) = Maximum(), floats([12], 64)
    examples.x.abs_().clamp_(max=1)
    examples.x[3] = bright
    assert grad_sampler_name(module, examples) == "one example at a time"
    np.testing.assert_allclose(
        updates(module, examples, tasks, PRIVATE), alone(module, examples, tasks, PRIVATE), rtol=1e-5, atol=1e-7
    )


# --- what the check sees ---


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(8, 8), nn.Linear(8, 2)), r"batch of one row.*in 1, GroupNorm"),
        (Model(lambda _, h: h.squeeze()), r"shape \[2\] for a batch of one row"),
    ],
    ids=["group-norm", "squeeze"],
)
def test_a_batch_of_one_row_is_tried_where_there_are_such(module: nn.Module, words: str) -> None:
    check_fits(module, RowFormat((4,)), (2,))
    with pytest.raises(ModelError, match=words) as raised:
        check_fits(module, RowFormat((4,)), (2,), one_row={"training": "client a has 9 rows"})
    assert "client a has 9 rows" in raised.value.message


def test_evaluation_mode_is_tried() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            return scores if self.training else (scores, x)

    with pytest.raises(ModelError, match="returned a tuple, not a tensor; the model was in evaluation mode"):
        check_fits(Two(4, 2), RowFormat((4,)), (2,))


def test_a_column_s_own_table_is_named() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sex, self.ward, self.out = nn.Embedding(2, 2), nn.Embedding(20, 4), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.sex(x[:, 0]), self.ward(x[:, 1])], 1))

    check_fits(Columns(), RowFormat((2,), True, np.array([0, 0]), np.array([1, 19])), (2,))
    with pytest.raises(ModelError, match=r"in sex, Embedding") as raised:
        check_fits(Columns(), RowFormat((2,), True, np.array([0, 0]), np.array([2, 19])), (2,))
    hint = raised.value.hint or ""
    assert hint.startswith("sex holds the tokens 0 to 1 and is given ")
    assert hint.endswith(" to 2: make it an embedding of at least 3 tokens")


def test_what_a_model_raises_in_the_evaluation_names_whose_rows_these_are() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    x = np.full((3, 3), 5)
    with pytest.raises(ModelError, match=r"evaluated on the test rows of client a \(in 0, Embedding\): IndexError"):
        evaluate(module, x, np.zeros(3, np.int64), Classification().metrics(), "the test rows of client a")
