"""What every privacy rule promises; a new rule is one line in CASES."""

from __future__ import annotations

import json
import math
import tomllib
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.privacy import (
    AdaptiveClipping,
    CentralPrivacy,
    Claim,
    ClaimContext,
    ExampleLevel,
    FixedClipping,
    neighbouring_of,
)
from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.central import ClippingRule
from fedrounds.fl_components.privacy.claim import ClaimRound, StatementFacts
from fedrounds.fl_components.privacy.clipping import UNITS, clip_norm_in_units
from fedrounds.fl_components.privacy.events import (
    Gaussian,
    PoissonSampled,
    SampledWithoutReplacement,
    parse_event,
)
from fedrounds.fl_components.values import Sampling

CENTRAL = CentralPrivacy(noise_multiplier=1.0, clipping=FixedClipping(norm=0.5))

CASES: list[Claim] = [
    CENTRAL,
    CentralPrivacy(noise_multiplier=0.8, clipping=AdaptiveClipping(), delta=1e-6),
    ExampleLevel(noise_multiplier=1.0, max_grad_norm=0.5, sampling_rate=0.1),
    ExampleLevel(target_epsilon=3.0, max_grad_norm=0.5, sampling_rate=1.0),
]

POISSON = Sampling("poisson", 1000, 100.0, 0.1)
FIXED_SIZE = Sampling("fixed_size", 1000, 100, 0.1)
EVERYONE = Sampling("everyone", 1000, 1000, 1.0)


def in_cohort(size: float) -> ClaimContext:
    """A configuration whose rounds expect so many clients."""
    return ClaimContext(1000, Sampling("poisson", 1000, size, size / 1000))


@pytest.mark.parametrize("rule", CASES, ids=repr)
@pytest.mark.parametrize("sampling", [POISSON, FIXED_SIZE, EVERYONE], ids=lambda sampling: sampling.kind)
class TestClaim:
    """What holds for every claim."""

    def round_of(self, sampling: Sampling) -> ClaimRound:
        return ClaimRound("wards", sampling, {"a": 20, "b": 40}, steps=3, rounds=5)

    def test_its_charges_can_be_kept_and_read_back(self, rule: Claim, sampling: Sampling) -> None:
        charges = rule.charges(self.round_of(sampling))
        for event in charges.values():
            assert parse_event(json.loads(json.dumps(event.model_dump()))) == event
        assert rule.charges(self.round_of(sampling)) == charges

    def test_it_charges_the_accounts_whose_terms_it_names(self, rule: Claim, sampling: Sampling) -> None:
        """A claim that trusts the server charges the population; one that trusts the clients alone charges each."""
        accounts = set(rule.charges(self.round_of(sampling)))
        if rule.trust == "server":
            assert accounts == {rule.account("wards")} == {Account("wards")}
        else:
            assert accounts == {Account("wards", "a"), Account("wards", "b")}
            assert {each.template for each in accounts} == {rule.account("wards")}

    def test_its_epsilon_is_known_under_its_relation(self, rule: Claim, sampling: Sampling) -> None:
        for event in rule.charges(self.round_of(sampling)).values():
            assert 0 < rdp_epsilon({event: 1}, rule.neighbouring(sampling), rule.delta) < math.inf

    def test_its_wording_names_only_values_that_it_has(self, rule: Claim, sampling: Sampling) -> None:
        wording = tomllib.loads(rule.statement_template())
        values = rule.statement_values(StatementFacts(5, 3, True, ("loss", "accuracy"), "ghost norms"))
        for name in ("about", "protects", "withheld", "mechanism", "releases"):
            assert "{" not in wording[name].format_map(values)
        assert wording["not_covered"] and all(isinstance(each, str) for each in wording["not_covered"])
        for name, key in (("neighbours", rule.neighbouring(sampling)), ("sampling", rule.neighbouring(sampling))):
            text = wording[name]
            assert isinstance(text, str) or text[values.get("draw", key) if name == "sampling" else key]

    def test_its_state_can_be_kept(self, rule: Claim, sampling: Sampling) -> None:
        rule.check(ClaimContext(sampling.population_size, sampling))
        assert all(isinstance(tensor, np.ndarray) for tensor in rule.init().values())


@pytest.mark.parametrize(
    ("sampling", "event", "neighbouring"),
    [
        (POISSON, PoissonSampled(sampling_rate=0.1, event=Gaussian(noise_multiplier=1.0)), "add_or_remove"),
        (
            FIXED_SIZE,
            SampledWithoutReplacement(population_size=1000, sample_size=100, event=Gaussian(noise_multiplier=1.0)),
            "replace_one",
        ),
        (EVERYONE, Gaussian(noise_multiplier=1.0), "zero_out"),
    ],
    ids=lambda each: getattr(each, "kind", None),
)
def test_each_way_to_draw_has_its_event_and_relation(sampling: Sampling, event: Any, neighbouring: str) -> None:
    assert CENTRAL.event(sampling) == event
    assert neighbouring_of(sampling) == neighbouring


def test_a_draw_that_no_claim_leans_on() -> None:
    with pytest.raises(ValueError, match=r"no privacy accounting is known; use selection\.kind poisson"):
        CENTRAL.event(Sampling("other", 1000, 100, 0.1))


class TestAdaptiveClipping:
    def test_the_norm_follows_the_quantile(self) -> None:
        """Andrew et al. 2021, section 2.1: C <- C exp(-eta (b - gamma))."""
        rule = AdaptiveClipping(initial_norm=0.1, quantile=0.5, learning_rate=0.2)
        state = rule.update(rule.init(), 0.8)
        assert state["norm"][0] == pytest.approx(0.1 * np.exp(-0.2 * 0.3))
        assert state["unclipped_fraction"][0] == 0.8

    def test_it_settles_at_the_median(self) -> None:
        norms, rule = np.random.default_rng(0).lognormal(0, 1, 10_000), AdaptiveClipping(initial_norm=50.0)
        state = rule.init()
        for _ in range(200):
            state = rule.update(state, float((norms <= state["norm"][0]).mean()))
        assert state["norm"][0] == pytest.approx(np.median(norms), rel=0.02)

    def test_the_two_releases_together_cost_what_one_costs(self) -> None:
        """Andrew et al. 2021, theorem 1, with their default of n / 20."""
        rule = CentralPrivacy(noise_multiplier=1.0, clipping=AdaptiveClipping())
        assert rule.sum_noise_multiplier(100) ** -2 + (2 * 100 / 20) ** -2 == pytest.approx(1.0)
        fixed = CentralPrivacy(noise_multiplier=1.0, clipping=FixedClipping(norm=1.0))
        assert fixed.sum_noise_multiplier(100) == 1.0

    @pytest.mark.parametrize("fraction", [-1e9, -50.0, 0.0, 1.0, 50.0, 1e9])
    def test_the_norm_stays_where_its_arithmetic_holds(self, fraction: float) -> None:
        rule = AdaptiveClipping(learning_rate=20.0)
        state = rule.init()
        for _ in range(50):
            state = rule.update(state, fraction)
        assert 1e-6 <= state["norm"][0] <= 1e6

    @pytest.mark.parametrize(("noise", "cohort"), [(1.0, 10), (2.0, 20), (10.0, 99)])
    def test_a_cohort_that_is_too_small_for_the_default(self, noise: float, cohort: int) -> None:
        """n <= 10 z: the count alone would cost more than the round may."""
        rule = CentralPrivacy(noise_multiplier=noise, clipping=AdaptiveClipping())
        with pytest.raises(ValueError, match=r"set privacy\.clipping\.count_noise above .*, or select more than"):
            rule.check(in_cohort(cohort))
        rule.check(in_cohort(10 * noise + 1))
        CentralPrivacy(noise_multiplier=noise, clipping=AdaptiveClipping(count_noise=noise)).check(in_cohort(cohort))

    def test_an_audit_draws_the_count_s_noise_of_the_cohort_it_is_about(self) -> None:
        rule = CentralPrivacy(noise_multiplier=1.0, clipping=AdaptiveClipping())
        assert rule.resolve_count_noise(100).sum_noise_multiplier(50) == rule.sum_noise_multiplier(100)
        fixed = CENTRAL
        assert isinstance(fixed, CentralPrivacy) and fixed.resolve_count_noise(100) == fixed


class TestRelease:
    def sums(self, num_parameters: int = 20_000) -> Any:
        sum_D1 = np.zeros(num_parameters + 1)
        sum_D1[:100] = 40 * UNITS / 10
        sum_D1[-1] = 12.5
        return sum_D1

    def test_the_mean_over_the_expected_cohort_with_noise(self) -> None:
        rule = CentralPrivacy(noise_multiplier=2.0, clipping=FixedClipping(norm=0.5))
        mean_D, state = rule.release(self.sums(), rule.init(), POISSON, lambda purpose: purpose.encode().ljust(32))
        deviation = 2.0 * 0.5 / 100  # of the noise on the sum, over the expected cohort
        assert deviation <= state["noise"][0] <= deviation * 1.001
        assert mean_D[100:].std() == pytest.approx(deviation, rel=0.03)
        assert mean_D[:100].mean() == pytest.approx(4 * 0.5 / 100, abs=5 * deviation / 10)
        units = mean_D * 100 / 0.5 * clip_norm_in_units(20_000)
        np.testing.assert_allclose(units, np.rint(units), atol=1e-3)  # whole units: on the grid, like the sum

    def test_the_count_has_noise_of_its_own(self) -> None:
        rule = CentralPrivacy(noise_multiplier=1.0, clipping=AdaptiveClipping(initial_norm=0.5))
        fractions = []
        for seed in range(400):
            key_of = lambda purpose, seed=seed: f"{seed} {purpose}".encode().ljust(32)[:32]  # noqa: E731
            _, state = rule.release(self.sums(10), rule.init(), POISSON, key_of)
            fractions.append(float(state["unclipped_fraction"][0]))
        assert np.mean(fractions) == pytest.approx(12.5 / 100 + 0.5, abs=0.01)
        assert np.std(fractions) == pytest.approx(5 / 100, rel=0.15)

    def test_the_same_keys_are_the_same_noise_and_each_purpose_has_its_own(self) -> None:
        rule, purposes = CentralPrivacy(noise_multiplier=1.0, clipping=AdaptiveClipping()), []

        def key_of(purpose: str) -> bytes:
            purposes.append(purpose)
            return purpose.encode().ljust(32)

        first, again = (rule.release(self.sums(), rule.init(), POISSON, key_of)[0].tobytes() for _ in range(2))
        assert first == again
        assert len(purposes) == 4 and len(set(purposes)) == 2

    def test_nobody_came_is_noise_alone(self) -> None:
        rule = CentralPrivacy(noise_multiplier=1.0, clipping=FixedClipping(norm=1.0))
        mean_D, state = rule.release(np.zeros(1001), rule.init(), POISSON, lambda _: bytes(32))
        assert np.abs(mean_D).max() > 0
        assert rule.metrics(state, 1.0, 1000)["privacy/signal_to_noise"].value < 0.3

    @pytest.mark.parametrize("clipping", [FixedClipping(norm=1.0), AdaptiveClipping(initial_norm=1.0)], ids=repr)
    def test_a_simulated_cohort_has_the_signal_to_noise_of_the_large_one(self, clipping: ClippingRule) -> None:
        small = CentralPrivacy(noise_multiplier=1.0, clipping=clipping, simulate_noise_cohort=1000)
        large = CentralPrivacy(noise_multiplier=1.0, clipping=clipping)
        small.check(in_cohort(5))  # a cohort that would be too small to count in, if it were not for a large one
        _, simulated = small.release(np.zeros(11), small.init(), POISSON, lambda _: bytes(32))
        _, real = large.release(
            np.zeros(11), large.init(), Sampling("poisson", 10_000, 1000.0, 0.1), lambda _: bytes(32)
        )
        assert simulated["noise"][0] == pytest.approx(real["noise"][0])
        assert simulated["norm"][0] == pytest.approx(real["norm"][0])  # the count's noise, of the same key, as well


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"noise_seed": 1}, "privacy has no seed for its noise"),
        ({"seed": 1}, "privacy has no seed for its noise"),
        ({"clipping": {"kind": "adaptive"}, "per_layer": True}, "one count cannot steer the norms of several layers"),
        ({"noise_multiplier": 0}, "noise_multiplier"),
        ({"noise_multiplier": 1e-154}, "noise_multiplier"),
        ({"noise_multiplier": 1e13}, "noise_multiplier"),
        ({"clipping": {"kind": "fixed", "norm": 1e-21}}, "norm"),
        ({"clipping": {"kind": "adaptive", "initial_norm": 1e30}}, "initial_norm"),
        ({"delta": 0}, "delta"),
        ({"delta": 1}, "delta"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CentralPrivacy.model_validate({"noise_multiplier": 1.0, "clipping": {"kind": "fixed", "norm": 1.0}} | fields)
