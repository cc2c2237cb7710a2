"""What every server optimiser promises; a new rule is one line in CASES, with its steps written out in plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedrounds.fl_components.errors import Diverged
from fedrounds.fl_components.server_optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
    ServerOptimizerRule,
)
from fedrounds.fl_components.values import ServerState


def fedavg_by_hand(rule: Any, x: float, deltas: list[float]) -> list[float]:
    steps = []
    for delta in deltas:
        x = x + rule.learning_rate * delta
        steps.append(x)
    return steps


def fedadam_by_hand(rule: Any, x: float, deltas: list[float]) -> list[float]:
    """Reddi et al. 2021, algorithm 2, with FedAdam's v_t, on the mean client update Delta_t."""
    m, v, steps = 0.0, rule.tau**2, []
    for delta in deltas:
        m = rule.beta1 * m + (1 - rule.beta1) * delta
        v = rule.beta2 * v + (1 - rule.beta2) * delta**2
        x = x + rule.learning_rate * m / (math.sqrt(v) + rule.tau)
        steps.append(x)
    return steps


def fedavgm_by_hand(rule: Any, x: float, deltas: list[float]) -> list[float]:
    """Hsu et al. 2019, FedAvgM: v <- beta v + Delta w, w <- w - v, with a learning rate."""
    v, steps = 0.0, []
    for delta in deltas:
        v = rule.momentum * v - delta
        x = x - rule.learning_rate * v
        steps.append(x)
    return steps


def fedadagrad_by_hand(rule: Any, x: float, deltas: list[float]) -> list[float]:
    """Reddi et al. 2021, algorithm 2, with FedAdagrad's v_t."""
    m, v, steps = 0.0, rule.tau**2, []
    for delta in deltas:
        m = rule.beta1 * m + (1 - rule.beta1) * delta
        v = v + delta**2
        x = x + rule.learning_rate * m / (math.sqrt(v) + rule.tau)
        steps.append(x)
    return steps


def fedyogi_by_hand(rule: Any, x: float, deltas: list[float]) -> list[float]:
    """Reddi et al. 2021, algorithm 2, with FedYogi's v_t."""
    m, v, steps = 0.0, rule.tau**2, []
    for delta in deltas:
        m = rule.beta1 * m + (1 - rule.beta1) * delta
        sign = (v > delta**2) - (v < delta**2)
        v = v - (1 - rule.beta2) * delta**2 * sign
        x = x + rule.learning_rate * m / (math.sqrt(v) + rule.tau)
        steps.append(x)
    return steps


CASES: list[tuple[ServerOptimizerRule, Callable[..., list[float]]]] = [
    (FedAvg(), fedavg_by_hand),
    (FedAvg(learning_rate=0.5), fedavg_by_hand),
    (FedAdam(), fedadam_by_hand),
    (FedAdam(learning_rate=0.1, beta1=0.5, beta2=0.0, tau=0.1), fedadam_by_hand),
    (FedAdam(learning_rate=1.0, beta1=0.0, beta2=0.9, tau=1e-8), fedadam_by_hand),
    (FedAvgM(), fedavgm_by_hand),
    (FedAvgM(learning_rate=0.5, momentum=0.0), fedavgm_by_hand),
    (FedAdagrad(), fedadagrad_by_hand),
    (FedAdagrad(learning_rate=0.5, beta1=0.9, tau=0.1), fedadagrad_by_hand),
    (FedYogi(), fedyogi_by_hand),
    (FedYogi(learning_rate=0.1, beta1=0.5, beta2=0.5, tau=1.0), fedyogi_by_hand),
]


def pseudo_gradients(num_rounds: int, num_parameters: int) -> Any:
    return np.random.default_rng(0).standard_normal((num_rounds, num_parameters))


def run(rule: ServerOptimizerRule, params_D: Any, gradients: Any, through_bytes: bool = False) -> list[Any]:
    state, history = rule.init(len(params_D)), []
    for gradient_D in gradients:
        params_D, state = rule.update(params_D, gradient_D, state)
        if through_bytes:
            kept = ServerState.from_bytes(ServerState(1, params_D, state, "").to_bytes())
            params_D, state = kept.params_D, kept.server_optimizer
        history.append(params_D)
    return history


@pytest.mark.parametrize(("rule", "by_hand"), CASES, ids=lambda case: repr(case) if isinstance(case, FedAvg) else None)
class TestServerOptimizerRule:
    def test_the_paper_s_steps(self, rule: ServerOptimizerRule, by_hand: Callable[..., list[float]]) -> None:
        start_D, gradients = np.array([0.5, -2.0, 0.0], np.float32), pseudo_gradients(6, 3)
        found = run(rule, start_D, gradients)
        for index in range(3):
            expected = by_hand(rule, float(start_D[index]), (-gradients[:, index]).tolist())
            np.testing.assert_allclose([params_D[index] for params_D in found], expected, rtol=2e-6, atol=2e-6)

    def test_no_gradient_no_step_at_first(self, rule: ServerOptimizerRule, by_hand: Any) -> None:
        params_D = np.array([1.5, -0.25], np.float32)
        assert run(rule, params_D, np.zeros((1, 2)))[0].tobytes() == params_D.tobytes()

    def test_it_goes_against_the_pseudo_gradient(self, rule: ServerOptimizerRule, by_hand: Any) -> None:
        assert (run(rule, np.zeros(2, np.float32), np.array([[1.0, -1.0]]))[0] * [1, -1] < 0).all()

    def test_state_and_parameters_are_float32_of_length_d(self, rule: ServerOptimizerRule, by_hand: Any) -> None:
        state = rule.init(3)
        params_D, after = rule.update(np.zeros(3, np.float32), np.ones(3), state)
        assert state.keys() == after.keys()
        for tensor in (params_D, *state.values(), *after.values()):
            assert (tensor.dtype, tensor.shape) == (np.float32, (3,))

    def test_kept_and_read_again_it_goes_on_with_the_same_bits(self, rule: ServerOptimizerRule, by_hand: Any) -> None:
        start_D, gradients = np.zeros(50, np.float32), pseudo_gradients(5, 50)
        straight, resumed = run(rule, start_D, gradients), run(rule, start_D, gradients, through_bytes=True)
        assert straight[-1].tobytes() == resumed[-1].tobytes()

    def test_an_update_changes_no_argument(self, rule: ServerOptimizerRule, by_hand: Any) -> None:
        params_D, gradient_D, state = np.ones(3, np.float32), np.ones(3), rule.init(3)
        before = [params_D.tobytes(), gradient_D.tobytes(), *(tensor.tobytes() for tensor in state.values())]
        rule.update(params_D, gradient_D, state)
        assert [params_D.tobytes(), gradient_D.tobytes(), *(tensor.tobytes() for tensor in state.values())] == before

    def test_written_and_read_again_it_is_the_same_rule(self, rule: ServerOptimizerRule, by_hand: Any) -> None:
        adapter: TypeAdapter[Any] = TypeAdapter(ServerOptimizer)
        assert adapter.validate_json(rule.model_dump_json()) == rule

    @pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
    def test_rates_that_are_refused(self, rule: ServerOptimizerRule, by_hand: Any, rate: float) -> None:
        with pytest.raises(ValidationError, match="learning_rate"):
            type(rule).model_validate({"learning_rate": rate})


def test_fedavg_at_a_rate_of_one_is_the_mean_of_the_clients_models() -> None:
    generator = np.random.default_rng(1)
    params_D = generator.standard_normal(30).astype(np.float32)
    clients_ND = generator.standard_normal((5, 30))
    weights_N = np.array([1, 2, 3, 4, 90.0])
    delta_D = np.average(clients_ND - params_D, axis=0, weights=weights_N)
    found_D, _ = FedAvg().update(params_D, -delta_D, {})
    np.testing.assert_allclose(found_D, np.average(clients_ND, axis=0, weights=weights_N), rtol=1e-6, atol=1e-6)


def test_fedadam_starts_from_the_paper_s_smallest_second_moment() -> None:
    assert FedAdam(tau=0.1).init(2)["v"].tolist() == pytest.approx([0.01, 0.01])
    assert FedAdam(tau=0.1).init(2)["m"].tolist() == [0, 0]


@pytest.mark.parametrize("fields", [{"beta1": 1}, {"beta1": -0.1}, {"beta2": 1}, {"tau": 0}, {"tau": -1}])
def test_what_fedadam_refuses(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        FedAdam.model_validate(fields)


def test_fedavgm_without_momentum_is_fedavg() -> None:
    start_D, gradients = np.ones(20, np.float32), pseudo_gradients(4, 20)
    for one, other in zip(
        run(FedAvgM(momentum=0.0), start_D, gradients), run(FedAvg(), start_D, gradients), strict=True
    ):
        assert one.tobytes() == other.tobytes()


def test_yogi_s_second_moment_moves_by_no_more_than_the_new_square() -> None:
    """Zaheer et al. 2018: v comes down from a burst linearly in Yogi and exponentially in Adam."""
    burst, rest = np.array([10.0]), np.array([0.1])
    second_moments = {}
    for rule in (FedYogi(beta2=0.9), FedAdam(beta2=0.9)):
        _, state = rule.update(np.zeros(1, np.float32), burst, rule.init(1))
        _, after = rule.update(np.zeros(1, np.float32), rest, state)
        second_moments[rule.kind] = float(after["v"][0]) / float(state["v"][0])
    assert second_moments["fedadam"] == pytest.approx(0.9, abs=1e-3)
    assert second_moments["fedyogi"] == pytest.approx(1.0, abs=1e-3)


class TestOverflow:
    """State is kept as float32: what would be infinite there is refused, and nothing before it."""

    @pytest.mark.parametrize(
        ("rule", "name", "gradient"),
        [
            (FedAdam(learning_rate=0.1), "v", 2e20),
            (FedYogi(learning_rate=0.1), "v", 2e20),
            (FedAdagrad(learning_rate=0.1), "v", 2e19),
            (FedAdam(learning_rate=0.1), "m", 1e200),
            (FedYogi(learning_rate=0.1), "m", 1e200),
            (FedAvgM(learning_rate=1e-10), "v", 1e39),
        ],
        ids=lambda value: getattr(value, "kind", None),
    )
    def test_a_state_beyond_float32(self, rule: ServerOptimizerRule, name: str, gradient: float) -> None:
        words = rf"server_optimizer\.kind {rule.kind}: state {name} exceeds float32 for 1 of 3 parameters"  # type: ignore[attr-defined]
        with pytest.raises(Diverged, match=words) as caught:
            rule.update(np.zeros(3, np.float32), np.array([0.0, gradient, 1.0]), rule.init(3))
        assert "max_update_norm" in (caught.value.hint or "")

    @pytest.mark.parametrize("rule", [FedAdam(learning_rate=0.1), FedYogi(learning_rate=0.1)], ids=repr)
    def test_a_large_state_still_moves(self, rule: ServerOptimizerRule) -> None:
        """Just below the largest float32 a parameter moves, in this round and in the next."""
        params_1, state = rule.update(np.zeros(1, np.float32), np.array([1.8e20]), rule.init(1))
        assert np.isfinite(state["v"]).all() and state["v"] > 3e38
        assert params_1 == pytest.approx(-0.1, rel=1e-6)
        params_2, _ = rule.update(params_1, np.array([1e19]), state)
        assert params_2 < params_1 - 0.05
