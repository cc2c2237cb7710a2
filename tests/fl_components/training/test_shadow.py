"""The shadow of a silo: its canaries are what an audit needs, and faults of the training path are found by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrounds.fl_components.errors import ModelError
from fedrounds.fl_components.models import LogisticRegression, build_seeded
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.privacy.audit import AuditReport, audit_releases, violates_claim
from fedrounds.fl_components.privacy.noise import WholeNormals
from fedrounds.fl_components.privacy.steps import Mechanism
from fedrounds.fl_components.training import SGD, CanaryClient, ExampleTable, one_thread
from fedrounds.fl_components.training.objectives import Proximal
from fedrounds.fl_components.training.opacus_sampler import OneAtATime, OpacusGradSampler
from fedrounds.fl_components.training.per_example import GhostNorms, VmapExamples
from tests.fl_components.training.test_example_level import CASES, Data, floats, rule

CANARIES, ROWS = 40, 7
JOINED_M = np.arange(CANARIES) % 3 > 0
KEY = bytes(range(32))
WAYS = {
    "ghost norms": GhostNorms,
    "vmap": VmapExamples,
    "opacus": OpacusGradSampler,
    "one example at a time": OneAtATime,
}
ONE_OF_EACH_WAY = ("mlp", *(pytest.param(case, marks=pytest.mark.slow) for case in ("cnn", "careful")))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of zeros: what is released is the sum."""
    draw = WholeNormals._draw
    monkeypatch.setattr(WholeNormals, "_draw", lambda self, pairs: draw(self, pairs) * 0)


def shadow_of(
    module: nn.Module, x_of: Any, labels: tuple[int, ...], trained_by: SGD, canaries: int = CANARIES, rows: int = ROWS
) -> CanaryClient:
    return CanaryClient(module, Data([rows], x_of, labels).examples, trained_by, canaries)


def sum_of(shadow: CanaryClient, trained_by: SGD, joined_M: Any, key: bytes = KEY) -> Any:
    """The sum of the clipped gradients that an update came from, float64 [D], where there is no noise."""
    num_examples = ROWS + int(joined_M.sum())
    return -shadow.step(joined_M, key).astype(np.float64) * num_examples / trained_by.learning_rate


def audited(shadow: CanaryClient, claimed: float, canaries: int, seed: int = 0) -> AuditReport:
    def key_of(purpose: str) -> bytes:
        return f"{seed} {purpose}".encode().ljust(32)

    return audit_releases(
        lambda joined_M, number: shadow.step(joined_M, key_of(f"step {number}"))[-canaries:],
        key_of,
        noise_multiplier=claimed,
        delta=1e-5,
        num_parameters=shadow.num_parameters,
        num_canaries=canaries,
    )


def assert_dirac(shadow: CanaryClient, trained_by: SGD, norm: float, *, draws: bool = False) -> None:
    sum_D = sum_of(shadow, trained_by, JOINED_M)
    np.testing.assert_allclose(sum_D[-CANARIES:], np.where(JOINED_M, -norm, 0), rtol=1e-3, atol=1e-12)
    if draws:  # others for the public rows, as soon as one canary less joins
        return
    for left_out in (1, 2):
        alone_D = sum_D - sum_of(shadow, trained_by, JOINED_M & (np.arange(CANARIES) != left_out))
        assert alone_D[left_out - CANARIES] == pytest.approx(-norm, rel=1e-3)
        assert np.abs(np.delete(alone_D, left_out - CANARIES)).max() < 1e-3 * norm
        assert np.linalg.norm(alone_D) <= norm


@pytest.mark.usefixtures("silent")
class TestCanaries:
    @pytest.mark.parametrize("case", CASES)
    def test_each_is_as_long_as_clipping_allows_in_a_coordinate_of_its_own(self, case: str) -> None:
        make, x_of, labels, way = CASES[case]
        module, trained_by = make(), rule(learning_rate=100.0)
        before = flatten(module).tobytes()
        shadow = shadow_of(module, x_of, labels, trained_by)
        assert isinstance(shadow._way, WAYS[way])
        assert shadow.num_parameters == len(flatten(module)) + CANARIES
        assert_dirac(shadow, trained_by, 0.7, draws=case in ("dropout", "careful", "layer-norm-and-dropout"))
        assert flatten(module).tobytes() == before

    @pytest.mark.parametrize("case", ["mlp", "sequences", "careful"])
    def test_whatever_else_the_run_asks_for(self, case: str) -> None:
        options = {
            "momentum": 0.9,
            "weight_decay": 0.01,
            "objective": Proximal(mu=0.1),
            "label_smoothing": 0.95,
            "epochs": 3,
            "learning_rate": 100.0,
        }
        trained_by = rule({"sampling_rate": 0.01, "max_batch_size": 3, "max_grad_norm": 20.0}, **options)
        make, x_of, labels, _ = CASES[case]
        shadow = shadow_of(make(), x_of, labels, trained_by)
        sum_D = sum_of(shadow, trained_by, JOINED_M)
        np.testing.assert_allclose(sum_D[-CANARIES:], np.where(JOINED_M, -20, 0), rtol=1e-3, atol=1e-12)

    @pytest.mark.parametrize("favourite", [0, 1, 2])
    def test_a_model_that_is_sure_of_itself(self, favourite: int) -> None:
        module, trained_by = CASES["mlp"][0](), rule(learning_rate=100.0)
        with torch.no_grad():
            list(module.parameters())[-1][favourite] = 100.0
        assert_dirac(shadow_of(module, floats(6), (), trained_by), trained_by, 0.7)

    def test_two_classes(self) -> None:
        module, trained_by = build_seeded(LogisticRegression(), (6,), (2,), seed=0), rule(learning_rate=100.0)
        rows = ExampleTable(torch.randn(ROWS, 6), torch.arange(ROWS) % 2, np.array([0]), np.array([ROWS]))
        assert_dirac(CanaryClient(module, rows, trained_by, CANARIES), trained_by, 0.7)

    def test_the_public_rows_are_trained_on_as_they_are(self) -> None:
        """Without a canary, a step is the client's own on these rows."""
        make, x_of, labels, _ = CASES["mlp"]
        module, trained_by = make(), rule({"sampling_rate": 1.0}, steps=1)
        data, params_D = Data([ROWS], x_of, labels), flatten(module)
        expected_D, _ = trained_by.train(module, params_D, data.x, data.y, 0, KEY)
        found_D = shadow_of(make(), x_of, labels, trained_by).step(np.zeros(CANARIES, bool), KEY)
        np.testing.assert_allclose(found_D[:-CANARIES], expected_D, rtol=0, atol=3e-6 * np.abs(expected_D).max())
        assert (found_D[-CANARIES:] == 0).all() and np.abs(expected_D).max() > 1e-3


class TestStep:
    def test_the_same_key_gives_the_same_bits_and_draws_nothing_else(self) -> None:
        make, x_of, labels, _ = CASES["dropout"]
        module, before = make(), torch.get_rng_state()
        shadow = shadow_of(module, x_of, labels, rule())
        one, again, other = (shadow.step(JOINED_M, key).tobytes() for key in (KEY, KEY, KEY[::-1]))
        assert one == again != other
        assert torch.equal(before, torch.get_rng_state())

    def test_what_is_not_finite(self) -> None:
        make, x_of, labels, _ = CASES["mlp"]
        with pytest.raises(ModelError, match="the update of a step over canaries is not finite"):
            shadow_of(make(), x_of, labels, rule({"noise_multiplier": 1e3}, learning_rate=1e38)).step(JOINED_M, KEY)


# What goes wrong in a training path, by replacing a part of it.
Fault = Callable[[pytest.MonkeyPatch], None]


def clips_to_twice_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Mechanism.of

    def wrong(rule: Any, num_parameters: int) -> Mechanism:
        mechanism = of(rule, num_parameters)
        return replace(mechanism, kept=2 * mechanism.kept)

    monkeypatch.setattr(Mechanism, "of", wrong)


def clips_by_the_norm_of_another_example(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = Mechanism.factors
    monkeypatch.setattr(Mechanism, "factors", lambda self, squares: factors(self, squares.roll(1, -1)))


def takes_examples_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    batches_of = SGD.private_batches_of

    def wrong(self: SGD, *args: Any) -> list[Any]:
        return [np.repeat(rows, 2) for rows in batches_of(self, *args)]

    monkeypatch.setattr(SGD, "private_batches_of", wrong)


def adds_half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = WholeNormals._draw
    monkeypatch.setattr(WholeNormals, "_draw", lambda self, pairs: (draw(self, pairs) / 2).round())


def adds_no_noise_to_the_last_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Mechanism.release

    def wrong(self: Mechanism, sums: Any, noise: Any, into: Any, alpha: float, *, fresh: bool = False) -> None:
        last = alpha * sums[-1].round()
        if not fresh:  # where it is, nothing has been written to `into`
            last += into[-1]
        release(self, sums, noise, into, alpha, fresh=fresh)
        into[-1].copy_(last)

    monkeypatch.setattr(Mechanism, "release", wrong)


class TestAudit:
    @pytest.mark.parametrize("case", ONE_OF_EACH_WAY)
    def test_an_honest_step_is_not_accused(self, case: str) -> None:
        make, x_of, labels, _ = CASES[case]
        shadow = shadow_of(make(), x_of, labels, rule({"noise_multiplier": 1.0}), 200)
        report = audited(shadow, 1.0, 200)
        assert not violates_claim(report) and 0 < report.epsilon_lower_bound < report.claimed_epsilon
        assert report.num_parameters == shadow.num_parameters

    @pytest.mark.parametrize("case", ONE_OF_EACH_WAY)
    def test_one_with_half_the_noise_is(self, case: str) -> None:
        make, x_of, labels, _ = CASES[case]
        report = audited(shadow_of(make(), x_of, labels, rule({"noise_multiplier": 0.5}), 200), 1.0, 200)
        assert violates_claim(report) and report.epsilon_lower_bound > report.claimed_epsilon

    @pytest.mark.parametrize("case", ONE_OF_EACH_WAY)
    @pytest.mark.parametrize(
        "fault",
        [
            clips_to_twice_the_norm,
            clips_by_the_norm_of_another_example,
            takes_examples_twice,
            adds_half_the_noise,
            adds_no_noise_to_the_last_parameter,
        ],
    )
    def test_faults_of_the_training_path_are(self, case: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        make, x_of, labels, _ = CASES[case]
        shadow = shadow_of(make(), x_of, labels, rule({"noise_multiplier": 1.0}), 200, rows=100)
        fault(monkeypatch)
        # One example at a time: no other example's norm is there to be taken.
        immune = case == "careful" and fault is clips_by_the_norm_of_another_example
        assert violates_claim(audited(shadow, 1.0, 200)) != immune


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_half_the_noise_is_caught_and_nobody_else_over_many_keys() -> None:
    """The usual 1,000 canaries in ten steps, with a model of MNIST's size."""
    module = build_seeded(LogisticRegression(), (28, 28), (10,), seed=0)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 28, 28, generator=generator), torch.randint(0, 10, (300,), generator=generator)
    rows = ExampleTable(x, y, np.array([0]), np.array([300]))
    for true, expected in ((1.0, 0), (0.5, 50)):
        shadow = CanaryClient(module, rows, rule({"noise_multiplier": true, "max_grad_norm": 1.0}), 1000)
        reports = [audited(shadow, 1.0, 1000, seed) for seed in range(50)]
        assert sum(map(violates_claim, reports)) == expected
