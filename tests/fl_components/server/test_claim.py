"""A run under a privacy claim: what it costs, and whose budget pays for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError, RunConflict, StoreError
from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled
from fedrounds.fl_components.reports.statement import markdown, statement
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.charging import check_budget
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from tests.fl_components.server.wards import (
    EVENT,
    FIELDS,
    HERE,
    TERMS,
    WARDS,
    Begin,
    wards,
)


class TestSpending:
    def test_each_round_is_charged_and_told(self, begin: Begin, store: Store) -> None:
        run = begin()
        for round in (1, 2, 3):
            result = walk(stages, run, round)
            expected = rdp_epsilon({EVENT: round}, "add_or_remove", 1e-3)
            assert result.metrics["privacy/epsilon"] == pytest.approx(expected)
        assert [charge.state for charge in store.ledger.charges(Account("wards"))] == ["spent"] * 3
        assert all(charge.event == EVENT.model_dump() for charge in store.ledger.charges())
        store.verify_journal()

    def test_a_population_ends_where_its_budget_does(self, begin: Begin, store: Store) -> None:
        epsilon = rdp_epsilon({EVENT: 3}, "add_or_remove", 1e-3)
        store.ledger.set_budget(Account("wards"), replace(TERMS, epsilon=epsilon), reason="x", by="ada")
        first, second = begin("a", data=WARDS), begin("b", data=WARDS)
        walk(stages, first, 1), walk(stages, first, 2), walk(stages, second, 1)
        for run, round in ((first, 3), (second, 2)):
            with pytest.raises(BudgetExhausted, match="the next round would bring population 'wards' to an epsilon of"):
                walk(stages, run, round)
        budget = store.ledger.budget(Account("wards"))
        assert budget is not None and sum(budget.spent.values()) == 3

    def test_the_limit_is_exact(self, begin: Begin, store: Store) -> None:
        """A hair below what two rounds come to is the end after one; it is told before the round is begun."""
        epsilon = rdp_epsilon({EVENT: 2}, "add_or_remove", 1e-3)
        run = begin(privacy=FIELDS["privacy"] | {"epsilon": epsilon * (1 - 1e-9)})
        check_budget(run)
        walk(stages, run, 1)
        with pytest.raises(BudgetExhausted):
            check_budget(run)
        with pytest.raises(BudgetExhausted):
            walk(stages, run, 2)

    def test_no_noise_to_speak_of_is_no_way_around_a_budget(self, begin: Begin) -> None:
        """Where the accountant's arithmetic ends, epsilon is beyond every limit, not nothing."""
        for noise in (1e-154, 1e-200, 1e-4, 1e13):
            with pytest.raises(ConfigError, match="noise_multiplier"):
                begin(privacy=FIELDS["privacy"] | {"noise_multiplier": noise})
        tiny = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1e-154))
        assert rdp_epsilon({EVENT: 1000, tiny: 1}, "add_or_remove", 1e-3) > 1e300

    def test_a_run_ends_where_its_own_limit_does(self, begin: Begin) -> None:
        epsilon = rdp_epsilon({EVENT: 2}, "add_or_remove", 1e-3)
        run = begin(privacy=FIELDS["privacy"] | {"epsilon": epsilon})
        walk(stages, run, 1), walk(stages, run, 2)
        with pytest.raises(BudgetExhausted, match="would bring this run to an epsilon of"):
            walk(stages, run, 3)

    def test_nothing_is_trained_when_it_is_refused(self, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
        run = begin(privacy=FIELDS["privacy"] | {"epsilon": 1e-6})
        monkeypatch.setattr(stages, "train", None)
        with pytest.raises(BudgetExhausted):
            walk(stages, run, 1)

    def test_a_simulated_cohort_is_in_no_ledger(self, begin: Begin, store: Store) -> None:
        run = begin(privacy=FIELDS["privacy"] | {"simulate_noise_cohort": 450})
        result = walk(stages, run, 1)
        assert store.ledger.budgets() == {} and store.ledger.spent("r") == {}
        assert "privacy/epsilon" not in result.metrics
        assert result.metrics["privacy/epsilon_simulated"] == pytest.approx(
            rdp_epsilon({EVENT: 1}, "add_or_remove", 1e-3)
        )


class TestPopulations:
    def test_private_data_need_a_budget_that_somebody_has_set(self, begin: Begin, store: Store) -> None:
        with pytest.raises(StoreError, match="population 'wards' has no privacy budget"):
            begin(data=WARDS)
        assert store.runs() == []
        store.ledger.set_budget(Account("wards"), TERMS, reason="the board agreed", by="ada")
        begin(data=WARDS)

    def test_public_data_register_a_demonstration(self, begin: Begin, store: Store) -> None:
        begin()
        budget = store.ledger.budget(Account("wards"))
        assert budget is not None and budget.demonstration and budget.epsilon is None

    def test_private_data_never_hide_behind_a_demonstration(self, begin: Begin) -> None:
        begin().close()
        with pytest.raises(ConfigError, match="is a demonstration on public data, and data function are private"):
            begin("s", data=WARDS)

    def test_a_client_has_one_budget(self, begin: Begin, store: Store) -> None:
        """Also beside others: eight of these nine wards have spent already."""
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        store.ledger.set_budget(Account("other"), TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        with pytest.raises(ConfigError, match="data of population 'other' belong to population 'wards'"):
            begin("b", data=WARDS | {"path": f"{HERE}:other_wards"}, population="other")

    def test_a_population_may_get_new_data(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        walk(stages, begin("a", data=WARDS), 1)
        walk(stages, begin("b", data=WARDS | {"path": f"{HERE}:other_wards"}), 1)
        assert sum(store.ledger.budget(Account("wards")).spent.values()) == 2  # type: ignore[union-attr]

    @pytest.mark.parametrize("population", ["wards", "elsewhere"])
    @pytest.mark.parametrize(
        ("privacy", "why"),
        [
            ({"kind": "none"}, "privacy.kind is none"),
            (FIELDS["privacy"] | {"simulate_noise_cohort": 450}, "privacy.simulate_noise_cohort is set"),
        ],
    )
    def test_nobody_learns_from_its_clients_without_being_charged(
        self, begin: Begin, store: Store, privacy: dict[str, Any], why: str, population: str
    ) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        with pytest.raises(ConfigError, match=f"population 'wards' has a privacy budget .* not be charged .*{why}"):
            begin("b", data=WARDS, privacy=privacy, population=population)

    @pytest.mark.parametrize("population", ["wards", "elsewhere"])
    @pytest.mark.parametrize("privacy", [{"kind": "none"}, FIELDS["privacy"]], ids=["no claim", "claim"])
    def test_what_has_a_budget_is_not_declared_public(
        self, begin: Begin, store: Store, privacy: dict[str, Any], population: str
    ) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        with pytest.raises(ConfigError, match="are declared public, and belong to population 'wards'"):
            begin("b", data=WARDS | {"public": True}, privacy=privacy, population=population)

    def test_what_is_refused_binds_nothing(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else the population that the data do belong to could not have them any more."""
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        for run_id, changes in (("bad id !", {}), ("r", {"rounds": 2, "selection": {"kind": "uniform"}})):
            with pytest.raises(ConfigError):
                begin(run_id, data=WARDS, **changes)
        assert store.memberships.is_empty()
        begin(data=WARDS).close()
        twice = {f"{name}{n}": (x + n, *rest) for name, (x, *rest) in wards().items() for n in (0, 1)}
        monkeypatch.setattr("tests.fl_components.server.wards.wards", lambda: twice)
        before = list(store.journal())
        with pytest.raises(RunConflict, match="began with clients 9, now 18"):
            open_run(store, "r")
        assert [row.kind for row in store.journal()] == [row.kind for row in before]

    def test_a_run_that_is_over_may_be_opened_to_repair_what_is_shown_of_it(self, begin: Begin, store: Store) -> None:
        run = begin(data=WARDS, privacy={"kind": "none"}, rounds=1)
        walk(stages, run, 1)
        run.close()
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        open_run(store, "r").close()
        with pytest.raises(ConfigError, match="would not be charged"):
            begin("s", data=WARDS, privacy={"kind": "none"})

    def test_public_data_draw_on_no_private_budget(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        with pytest.raises(ConfigError, match="population 'wards' is private, and data digits are public"):
            begin()

    def test_a_resume_is_held_to_the_same(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """The function gives the data of other clients now, who have a budget of their own."""
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        store.ledger.set_budget(Account("other"), TERMS, reason="x", by="ada")
        begin(data=WARDS).close()
        draw = np.random.default_rng(99)
        others = {
            name: (draw.normal(size=x_train.shape), y_train, draw.normal(size=x_test.shape), y_test)
            for name, (x_train, y_train, x_test, y_test) in wards().items()
        }
        monkeypatch.setattr("tests.fl_components.server.wards.other_wards", lambda: others)
        begin("o", data=WARDS | {"path": f"{HERE}:other_wards"}, population="other").close()
        monkeypatch.setattr("tests.fl_components.server.wards.wards", lambda: others)
        with pytest.raises(ConfigError, match="data of population 'wards' belong to population 'other'"):
            open_run(store, "r")

    def test_a_resume_on_other_terms_is_refused(self, begin: Begin, store: Store) -> None:
        """Nothing was spent, so an administrator could change them in between."""
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        begin(data=WARDS).close()
        store.ledger.set_budget(Account("wards"), replace(TERMS, neighbouring="replace_one"), reason="x", by="ada")
        with pytest.raises(ConfigError, match="neighbouring is add_or_remove, its budget's is replace_one"):
            open_run(store, "r")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"privacy": FIELDS["privacy"] | {"delta": 1e-4}}, "delta is 0.0001, its budget's is 0.001"),
            ({"selection": {"kind": "uniform"}}, "neighbouring is zero_out, its budget's is add_or_remove"),
        ],
    )
    def test_other_terms_are_refused(self, begin: Begin, store: Store, changes: dict[str, Any], words: str) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        with pytest.raises(ConfigError, match=words):
            begin(data=WARDS, **changes)

    def test_a_delta_that_promises_little_is_remarked_on(self, store: Store) -> None:
        """As the run begins, and in its statement."""
        heard: list[str] = []
        config = parse_config(FIELDS | {"privacy": FIELDS["privacy"] | {"delta": 0.2}})
        with open_run(store, "r", config=config, notify=heard.append) as run:
            walk(stages, run, 1)
        warning = "privacy.delta is 0.2, more than one in 9 clients"
        assert any(warning in said for said in heard)
        found = statement(store, store.run("r"))
        assert [each.startswith(warning) for each in found["warnings"]] == [True]
        assert f"**Warning:** {warning}" in markdown(found)


def test_what_is_refused_when_the_clients_are_counted(begin: Begin, store: Store) -> None:
    """Of data whose number of clients the configuration does not tell: nine, of whom half are drawn."""
    store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
    with pytest.raises(ConfigError, match="or select more than 15 clients a round"):
        begin(data=WARDS, privacy=FIELDS["privacy"] | {"clipping": {"kind": "adaptive"}})
    assert store.runs() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": {"weights": "num_examples"}}, "num_examples without a cap"),
        ({"selection": {"kind": "poisson", "sampling_rate": 0.5, "min_updates": 1}}, "tells who came"),
        ({"selection": {"kind": "fair", "cohort_size": 3}}, "no privacy accounting is known"),
        ({"selection": {"kind": "fair", "cohort_size": 3}, "data": WARDS}, "no privacy accounting is known"),
        (
            {
                "selection": {"cohort_size": 3},
                "simulation": {"availability": {"kind": "bernoulli", "probability": 0.5}},
            },
            "no privacy accounting is known",
        ),
        (
            {"privacy": {"kind": "central", "noise_multiplier": 1.0, "clipping": {"kind": "adaptive"}}},
            "select more than 10 clients a round",
        ),
        (
            {
                "privacy": {
                    "kind": "central",
                    "noise_multiplier": 1.0,
                    "clipping": {"kind": "fixed", "norm": 1},
                    "seed": 3,
                }
            },
            "privacy has no seed for its noise",
        ),
    ],
)
def test_what_is_refused_when_it_is_read(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(FIELDS | changes)
    parse_config(FIELDS | {"aggregation": {"max_examples": 50}})
