"""What every model rule promises, and the check that a model fits the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from fedrounds.fl_components.errors import ConfigError, ModelError
from fedrounds.fl_components.models import (
    Cnn,
    Gru,
    LogisticRegression,
    Mlp,
    Model,
    ModelRule,
    ModuleModel,
    ResNet,
    RowFormat,
    Transformer,
    build_seeded,
    check_fits,
)
from fedrounds.fl_components.parameters import flatten, load_into, num_parameters

NETS = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=3, fail=False):
        super().__init__()
        if fail:
            raise RuntimeError("out of cheese")
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3), torch.nn.GroupNorm(1, width), torch.nn.Dropout(), torch.nn.Flatten(),
            torch.nn.LazyLinear(5) if width == 99 else torch.nn.Linear(width * 4, 5))

    def forward(self, x):
        return self.layers(x)

def build(width):
    return Net(width)

def nothing():
    return 3

module = torch.nn.Linear(2, 2)  # draws at import
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ward_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ward_nets", raising=False)


def fits(module: nn.Module, x: np.ndarray, *output_shape: int) -> None:
    check_fits(module, RowFormat.of(x, ranges=True), output_shape)


CASES = [
    (Cnn(channels=(2, 3), hidden=4), 2 * 25 + 2 + 3 * 2 * 25 + 3 + 3 * 4 + 4 + 4 * 5 + 5),
    (
        ResNet(blocks=(1, 1), width=4, groups=2),
        36 + 8 + 2 * (144 + 8) + (288 + 16) + (576 + 16) + (32 + 16) + 8 * 5 + 5,
    ),
    (Mlp(hidden=(7,), freeze=("1.weight",)), 7 + 7 * 5 + 5),
    (LogisticRegression(), 16 * 5 + 5),
    (Mlp(hidden=(7,)), 16 * 7 + 7 + 7 * 5 + 5),
    (Mlp(hidden=(4, 3), start_from="latest"), 16 * 4 + 4 + 4 * 3 + 3 + 3 * 5 + 5),
    (ModuleModel(path="ward_nets:Net"), 3 * 9 + 3 + 6 + 12 * 5 + 5),
    (ModuleModel(path="ward_nets:build", arguments={"width": 2}, start_from="models:/ward/3"), 2 * 9 + 2 + 4 + 45),
]


@pytest.mark.parametrize(("rule", "size"), CASES, ids=repr)
class TestModelRule:
    input_shape, num_classes = (1, 4, 4), 5

    def test_the_same_seed_builds_the_same_bits(self, rule: ModelRule, size: int) -> None:
        first = flatten(build_seeded(rule, self.input_shape, (self.num_classes,), seed=1))
        torch.rand(3)
        assert np.array_equal(first, flatten(build_seeded(rule, self.input_shape, (self.num_classes,), seed=1)))
        other = flatten(build_seeded(rule, self.input_shape, (self.num_classes,), seed=2))
        assert np.array_equal(first, other) == isinstance(rule, LogisticRegression)

    def test_building_leaves_torchs_generator_alone(self, rule: ModelRule, size: int) -> None:
        before = torch.get_rng_state()
        module = build_seeded(rule, self.input_shape, (self.num_classes,), seed=1)
        fits(module, np.zeros((2, *self.input_shape), np.float32), self.num_classes)
        assert torch.equal(torch.get_rng_state(), before)

    def test_scores_have_a_column_for_each_class(self, rule: ModelRule, size: int) -> None:
        module = build_seeded(rule, self.input_shape, (self.num_classes,), seed=1)
        assert module(torch.zeros(3, *self.input_shape)).shape == (3, 5)
        for rows in (1, 2, 6):
            fits(module, np.ones((rows, *self.input_shape), np.float32), self.num_classes)

    def test_parameters_go_out_and_in(self, rule: ModelRule, size: int) -> None:
        module = build_seeded(rule, self.input_shape, (self.num_classes,), seed=1)
        params_D = np.arange(size, dtype=np.float32)
        load_into(module, params_D)
        assert num_parameters(module) == size
        assert np.array_equal(flatten(module), params_D)

    def test_written_and_read_again_it_is_the_same_rule(self, rule: ModelRule, size: int) -> None:
        assert TypeAdapter(Model).validate_python(rule.model_dump(mode="json")) == rule


def test_logistic_regression_starts_at_zero() -> None:
    assert not flatten(LogisticRegression().build((13,), (2,))).any()


@pytest.mark.parametrize("start_from", ["fresh", "latest", "models:/ward/3", "models:/ward@champion"])
def test_start_from(start_from: str) -> None:
    assert LogisticRegression(start_from=start_from).start_from == start_from


@pytest.mark.parametrize(
    "start_from",
    [
        *["", "newest", "models:/", "models:/ward", "models:/ward/", "models:/ward/latest", "models://w/1"],
        *["models:/m-" + "0a" * 16, "models:/ward@", "models:/ward@a b", "models:/ward/1@champion", "runs:/1/model"],
    ],
)
def test_start_from_refused(start_from: str) -> None:
    with pytest.raises(ValidationError, match="give fresh, latest, or an MLflow address"):
        LogisticRegression(start_from=start_from)


@pytest.mark.parametrize("hidden", [(), (0,), (10, -1), ("wide",)])
def test_hidden_layers_refused(hidden: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError, match="hidden"):
        Mlp(hidden=hidden)


@pytest.mark.parametrize("channels", [(0, 3), (2, -1), (2,), (2, 3, 4)])
def test_channels_refused(channels: Any) -> None:
    with pytest.raises(ValidationError, match="channels"):
        Cnn(channels=channels)


@pytest.mark.parametrize(
    ("path", "arguments", "error", "words"),
    [
        ("ward_nets:Nett", {}, ConfigError, r"model\.path"),
        ("ward_nets", {}, ConfigError, r"model\.path"),
        ("ward_nets:module", {}, ModelError, "is a Linear object"),
        ("math:pi", {}, ModelError, "is a float object"),
        ("ward_nets:nothing", {}, ModelError, "returned a int, not a torch module"),
        ("ward_nets:Net", {"depth": 3}, ModelError, r"model\.arguments \['depth'\]: TypeError.*depth"),
        ("ward_nets:Net", {"fail": True}, ModelError, "RuntimeError: out of cheese"),
        ("ward_nets:Net", {"width": 99}, ModelError, "lazy layer"),
        ("torch.nn:BatchNorm1d", {"num_features": 4}, ModelError, "running statistics"),
    ],
)
def test_a_module_that_cannot_be_built(path: str, arguments: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        build_seeded(ModuleModel(path=path, arguments=arguments), (4,), (2,), seed=0)
    assert caught.value.hint or error is ConfigError


class Scores(nn.Module):
    """Returns what it is told to, whatever comes in."""

    def __init__(self, scores: Any) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: torch.Tensor) -> Any:
        return self.scores


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize(
    ("module", "words", "mend"),
    [
        (nn.Linear(5, 2), r"cannot take rows of float32 \[4\] \(in the model, Linear\): RuntimeError", r"take [4]"),
        (nn.Linear(4, 1), r"1 scores a row, and the labels have 2 classes", "[rows, 2]"),
        (Scores(torch.zeros(2)), r"shape \[2\]", "[rows, 2]"),
        (Scores(torch.zeros(2, 2, 2)), r"shape \[2, 2, 2\]", "[rows, 2]"),
        (Scores(torch.zeros(3, 2)), r"shape \[3, 2\] for 2 rows", "[rows, 2]"),
        (Scores((torch.zeros(2, 2), None)), "returned a tuple", "[rows, 2]"),
        (Scores(torch.zeros(2, 2, dtype=torch.int64)), r"torch\.int64, not floats", "[rows, 2]"),
        (Scores(torch.tensor([[0.0, torch.nan], [0, 0]])), "not finite", "scale"),
        (CountsCalls(), r"changes as it runs: buffer 'calls' of the model \(CountsCalls\)", "running statistics"),
    ],
)
def test_a_model_that_does_not_fit(module: nn.Module, words: str, mend: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        fits(module, np.zeros((6, 4), np.float32), 2)
    assert mend in (caught.value.hint or "")


def test_tokens_need_an_embedding() -> None:
    tokens = np.zeros((6, 4), np.int64)
    with pytest.raises(ModelError, match="int64") as caught:
        fits(LogisticRegression().build((4,), (2,)), tokens, 2)
    assert "embedding" in (caught.value.hint or "")
    fits(nn.Sequential(nn.Embedding(3, 5), nn.Flatten(), nn.Linear(20, 2)), tokens, 2)


def test_more_scores_than_classes_do_not_fit() -> None:
    with pytest.raises(ModelError, match="3 scores a row, and the labels have 2 classes"):
        fits(nn.Linear(4, 3), np.zeros((6, 4), np.float32), 2)


# --- images ---


def test_the_sizes_of_the_papers() -> None:
    """McMahan et al. 2017 give 1,663,370 for the CNN; ResNet-18 has 11,173,962 with CIFAR's stem and 10 classes (the
    BatchNorm of He et al. 2016 has as many parameters as GroupNorm)."""
    assert num_parameters(Cnn().build((1, 28, 28), (10,))) == 1_663_370
    assert num_parameters(ResNet().build((3, 32, 32), (10,))) == 11_173_962


@pytest.mark.parametrize("rule", [Cnn(), ResNet(blocks=(1,), width=8)], ids=repr)
def test_images_without_an_axis_of_channels_have_one(rule: ModelRule) -> None:
    fits(build_seeded(rule, (8, 8), (3,), seed=0), np.zeros((2, 8, 8), np.float32), 3)


@pytest.mark.parametrize("rule", [Cnn(), ResNet()], ids=repr)
@pytest.mark.parametrize("shape", [(13,), (1, 2, 2), (1, 1, 8, 8), (28, 28, 1)])
def test_what_is_no_image_is_refused(rule: ModelRule, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=rf"model {rule.kind} takes images .* rows of \[{shape[0]}") as caught:
        build_seeded(rule, shape, (10,), seed=0)
    assert "[channels, height, width]" in (caught.value.hint or "")


# --- tokens ---

TOKENS = [
    Gru(embedding=3, hidden=6),
    Gru(hidden=6, layers=2, dropout=0.5),
    Transformer(width=8, heads=2, layers=1),
    Transformer(width=8, heads=2, layers=2, dropout=0.5),
]


@pytest.mark.parametrize("rule", TOKENS, ids=repr)
class TestTokens:
    @pytest.mark.parametrize("output_shape", [(5,), (7, 5)])
    def test_it_fits_tokens_with_one_label_or_one_each(self, rule: ModelRule, output_shape: tuple[int, ...]) -> None:
        module = build_seeded(rule, (7,), output_shape, seed=0)
        x = np.arange(14).reshape(2, 7) % 5
        fits(module, x, *output_shape)
        assert module(torch.from_numpy(x)).shape == (2, *output_shape)

    def test_a_position_does_not_see_what_follows(self, rule: ModelRule) -> None:
        module = build_seeded(rule, (7,), (7, 5), seed=0).eval()
        tokens = torch.arange(7)[None] % 5
        changed = tokens.clone()
        changed[0, 4:] = 0
        assert torch.equal(module(tokens)[0, :4], module(changed)[0, :4])
        assert not torch.equal(module(tokens)[0, 4:], module(changed)[0, 4:])

    def test_the_last_position_sees_all(self, rule: ModelRule) -> None:
        module = build_seeded(rule, (7,), (5,), seed=0).eval()
        tokens = torch.arange(7)[None] % 5
        changed = tokens.clone()
        changed[0, 0] = 3
        assert not torch.equal(module(tokens), module(changed))

    def test_a_token_beyond_the_vocabulary_is_refused_before_training(self, rule: ModelRule) -> None:
        module = build_seeded(rule, (7,), (5,), seed=0)
        x = np.zeros((30, 7), np.int64)
        x[17, 2] = 5
        with pytest.raises(ModelError) as caught:
            fits(module, x, 5)
        assert "an embedding of at least 6 tokens" in (caught.value.hint or "")
        larger = build_seeded(rule.model_copy(update={"vocabulary": 6}), (7,), (5,), seed=0)
        fits(larger, x, 5)

    def test_numbers_are_no_tokens(self, rule: ModelRule) -> None:
        with pytest.raises(ModelError, match=r"cannot take rows of float32 \[7\]") as caught:
            fits(build_seeded(rule, (7,), (5,), seed=0), np.zeros((2, 7), np.float32), 5)
        assert "which takes int64 tokens" in (caught.value.hint or "")

    @pytest.mark.parametrize(("input_shape", "output_shape"), [((1, 7), (5,)), ((7,), (6, 5))])
    def test_what_is_no_row_of_tokens_is_refused(self, rule: ModelRule, input_shape: Any, output_shape: Any) -> None:
        with pytest.raises(ModelError, match=f"model {rule.kind} takes rows of T tokens"):
            build_seeded(rule, input_shape, output_shape, seed=0)


# --- many clients in one call ---


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over torch's fused attention on CPU
@pytest.mark.parametrize(
    ("rule", "input_shape", "output_shape"),
    [
        (Cnn(channels=(2, 3), hidden=4), (8, 8), (3,)),
        (ResNet(blocks=(1, 1), width=4, groups=2), (3, 8, 8), (3,)),
        (Gru(embedding=3, hidden=4), (5,), (5, 6)),
        (Transformer(width=8, heads=2, layers=1), (5,), (5, 6)),
    ],
    ids=lambda each: getattr(each, "kind", ""),
)
def test_gradients_of_many_clients_can_be_traced_and_are_those_of_each(
    rule: ModelRule, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> None:
    module = build_seeded(rule, input_shape, output_shape, seed=0)
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(params: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(module, params, (x,)).flatten(0, -2), y.flatten())

    generator = torch.Generator().manual_seed(0)

    def clients(rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Three clients with parameters of their own."""
        x = torch.randint(0, 6, (3, rows, *input_shape), generator=generator)
        y = torch.randint(0, output_shape[-1], (3, rows, *output_shape[:-1]), generator=generator)
        scales = torch.tensor([0.5, 1.0, 1.5])
        stacked = {name: torch.stack([scale * each for scale in scales]) for name, each in params.items()}
        return stacked, x if len(output_shape) == 2 else x.float(), y

    traced = make_fx(vmap(grad(loss)))(*clients(4))
    stacked, x, y = clients(4)  # other examples than those of the trace
    together = traced(stacked, x, y)
    for client in range(3):
        alone = grad(loss)({name: each[client] for name, each in stacked.items()}, x[client], y[client])
        for name, gradient in alone.items():
            torch.testing.assert_close(together[name][client], gradient, rtol=1e-4, atol=1e-6)
            assert gradient.abs().sum() > 0


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(ValidationError, match=r"model\.heads is 3 and model\.width 8"):
        Transformer(width=8, heads=3)
    with pytest.raises(ValidationError, match=r"model\.groups is 3 and model\.width 8"):
        ResNet(width=8, groups=3)


# --- freezing ---


def test_frozen_parameters_do_not_travel() -> None:
    module = build_seeded(Cnn(freeze=("1.*", "4.weight")), (1, 8, 8), (3,), seed=0)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == ["1.weight", "1.bias", "4.weight"]


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ModelError, match=r"model\.freeze: 'conv\*' matches no parameter") as caught:
        build_seeded(Mlp(hidden=(3,), freeze=("conv*",)), (4,), (2,), seed=0)
    assert caught.value.hint == "its parameters are 1.weight, 1.bias, 3.weight, 3.bias"


def test_a_misspelt_pattern_is_told_the_nearest_names() -> None:
    with pytest.raises(ModelError, match=r"'scores\.wieght' matches no parameter") as caught:
        build_seeded(Transformer(freeze=("scores.wieght",)), (7,), (5,), seed=0)
    assert "did you mean scores.weight" in (caught.value.hint or "")


def test_nothing_left_to_train() -> None:
    with pytest.raises(ModelError, match="no trainable parameters"):
        build_seeded(Mlp(freeze=("*",)), (4,), (2,), seed=0)
