"""A run whose clients answer for each of their examples: what it costs each of them, and what it tells."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError, RunConflict, StoreError
from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled, SelfComposed, parse_event
from fedrounds.fl_components.reports.statement import in_short, markdown, statement
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.charging import charges_of_round, check_budget
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.server.simulation import simulated_clients
from fedrounds.fl_components.store import BudgetTerms, Store
from fedrounds.flows.round import walk
from tests.fl_components.server import wards
from tests.fl_components.server.wards import NUM_CLIENTS, WARDS, Begin

EXAMPLES = {"kind": "example_level", "noise_multiplier": 1.0, "max_grad_norm": 1.0, "sampling_rate": 0.5, "delta": 1e-3}
EVERYONE = {
    "data": WARDS,
    "selection": {"kind": "uniform"},
    "privacy": {"kind": "none"},
    "training": {"learning_rate": 0.5, "steps": 2, "privacy": EXAMPLES},
}
TERMS = BudgetTerms(
    epsilon=100.0, delta=1e-3, unit="example", neighbouring="zero_out", accountant="RDP", demonstration=False
)
STEP = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1.0))
ROUND = SelfComposed(event=STEP, count=2)


def privately(**changes: Any) -> dict[str, Any]:
    return EVERYONE | {"training": EVERYONE["training"] | {"privacy": EXAMPLES | changes}}


def budget(store: Store, whose: str = "wards/*", **changes: Any) -> None:
    store.ledger.set_budget(Account.parse(whose), replace(TERMS, **changes), reason="the board agreed", by="ada")


def epsilon_of(rounds: int) -> float:
    return rdp_epsilon({ROUND: rounds}, "zero_out", 1e-3)


def spent(store: Store, ward: int) -> int:
    found = store.ledger.budget(Account.parse(f"wards/ward-{ward}"))
    return sum(found.spent.values()) if found is not None else 0


def trained(run: Run) -> Any:
    state = stages.load(run, run.refresh().committed_round + 1)
    plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
    batch = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
    return batch.total.tensors["sum"]  # type: ignore[union-attr]


class TestWhosePatientsTheyAre:
    """A budget is the patients': they do not get another one by another name."""

    @pytest.mark.parametrize(
        ("path", "arguments", "whose"),
        [
            ("renamed_wards", {"names": {"ward-0": "annexe"}}, "client 'wards/annexe'.*'wards/ward-0'"),
            ("renamed_wards", {"names": {"ward-0": "ward-1", "ward-1": "ward-0"}}, "'wards/ward-[01]'"),
            (
                "redrawn_wards",
                {"given_away": 15},
                "client 'wards/ward-0' are for the most part those of 'wards/ward-8'",
            ),
        ],
    )
    def test_another_name_is_refused(
        self, begin: Begin, store: Store, path: str, arguments: dict[str, Any], whose: str
    ) -> None:
        budget(store)
        walk(stages, begin("a", **EVERYONE), 1)
        data = WARDS | {"path": f"{wards.HERE}:{path}", "arguments": arguments}
        with pytest.raises(ConfigError, match=whose) as refused:
            begin("b", **EVERYONE | {"data": data})
        assert refused.value.hint == "a client keeps its name, and its examples, in all runs on its population"
        assert store.find_run("b") is None

    def test_some_new_examples_are_not(self, begin: Begin, store: Store) -> None:
        budget(store)
        walk(stages, begin("a", **EVERYONE), 1)
        data = WARDS | {"path": f"{wards.HERE}:redrawn_wards", "arguments": {"given_away": 3}}  # fewer than LEAST_ROWS
        walk(stages, begin("b", **EVERYONE | {"data": data}), 1)
        store.verify_journal()
        assert spent(store, 0) == 2


class TestSpending:
    def test_each_client_is_charged_and_told(self, begin: Begin, store: Store) -> None:
        budget(store)
        run = begin(**EVERYONE)
        for round in (1, 2):
            metrics = walk(stages, run, round).metrics
            assert metrics["privacy/example/epsilon"] == pytest.approx(epsilon_of(round))
            assert metrics["privacy/example/epsilon_population"] == pytest.approx(epsilon_of(round))
            assert metrics["privacy/example/epsilon_remaining"] == pytest.approx(100 - epsilon_of(round))
            assert metrics["privacy/example/client/ward-3"] == pytest.approx(epsilon_of(round))
        assert [spent(store, ward) for ward in range(NUM_CLIENTS)] == [2] * NUM_CLIENTS
        assert store.ledger.budget(Account("wards")) is None and Account("wards") not in store.ledger.spent("r")
        store.verify_journal()

    def test_a_client_that_took_part_in_fewer_rounds_has_paid_for_fewer(self, begin: Begin, store: Store) -> None:
        budget(store)
        run = begin(**EVERYONE | {"selection": {"kind": "uniform", "cohort_size": 4}})
        walk(stages, run, 1), walk(stages, run, 2)
        paid = [spent(store, ward) for ward in range(NUM_CLIENTS)]
        assert sum(paid) == 8 and max(paid) <= 2
        metrics = walk(stages, run, 3).metrics
        most = max(spent(store, ward) for ward in range(NUM_CLIENTS))
        assert metrics["privacy/example/epsilon"] == pytest.approx(epsilon_of(most))

    def test_budgets_are_shared_by_runs(self, begin: Begin, store: Store) -> None:
        budget(store, epsilon=epsilon_of(3))
        first, second = begin("a", **EVERYONE), begin("b", **EVERYONE)
        walk(stages, first, 1), walk(stages, second, 1), walk(stages, second, 2)
        with pytest.raises(BudgetExhausted, match=r"examples of client 'wards/ward-\d' to an epsilon of .* limit is"):
            check_budget(first)
        with pytest.raises(BudgetExhausted):
            walk(stages, first, 2)
        assert spent(store, 0) == 3

    def test_without_who_cannot_pay_the_run_goes_on(self, begin: Begin, store: Store) -> None:
        budget(store)
        budget(store, "wards/ward-2", epsilon=epsilon_of(1))
        run, said = begin(**EVERYONE), []
        run.notify = said.append
        walk(stages, run, 1)
        check_budget(run)
        result = walk(stages, run, 2)
        assert result.rejected == {"budget_exhausted": 1} and result.left_out == ["ward-2"]
        assert said == [  # also on private data: who takes part is told under this claim
            "round 2 is made without client ward-2: budget_exhausted: the privacy budget of its examples is spent"
        ]
        assert run.committed(2) == result
        found = statement(store, store.run("r"))
        assert found["left_out"] == {"ward-2": 1}
        assert "| Left out | ward-2 (1 round): their budgets are spent |" in markdown(found)
        assert (result.metrics["clients/selected"], result.metrics["clients/received"]) == (9.0, 8.0)
        assert (spent(store, 2), spent(store, 3)) == (1, 2)

    def test_or_it_ends_if_it_is_told_to(self, begin: Begin, store: Store) -> None:
        budget(store)
        budget(store, "wards/ward-2", epsilon=epsilon_of(1))
        run = begin(**privately(on_exhausted="stop_run"))
        walk(stages, run, 1)
        for act in (lambda: check_budget(run), lambda: walk(stages, run, 2)):
            with pytest.raises(BudgetExhausted, match="client 'wards/ward-2'"):
                act()
        assert [spent(store, ward) for ward in range(NUM_CLIENTS)] == [1] * NUM_CLIENTS

    def test_a_cohort_that_cannot_pay_does_not_end_it_while_others_can(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Such a round moves nothing and charges nobody."""
        budget(store, epsilon=0.0)
        budget(store, "wards/ward-8", epsilon=epsilon_of(2))
        cohorts = [0, 8, 0, 8, 1]
        monkeypatch.setattr(Federation, "select", lambda self, round, *_: np.array([cohorts[round - 1]]))
        fields = EVERYONE | {"selection": {"kind": "uniform", "cohort_size": 1}, "rounds": 5}
        run = begin(**fields)
        for round, received in ((1, 0), (2, 1), (3, 0), (4, 1)):
            check_budget(run)
            before = run.state().params_digest
            stages.authorise(
                run, stages.select(run, stages.load(run, round), stages.broadcast(run, stages.load(run, round)))
            )
            run.close()
            run = begin(**fields)  # what was reserved for nobody is found again
            result = walk(stages, run, round)
            assert result.metrics["clients/received"] == received
            assert (result.params_digest == before) == (received == 0)
            assert result.left_out == ([] if received else ["ward-0"])
        assert [spent(store, 0), spent(store, 8)] == [0, 2]
        for act in (lambda: check_budget(run), lambda: walk(stages, run, 5)):
            with pytest.raises(BudgetExhausted):
                act()
        store.verify_journal()

    def test_all_who_cannot_pay_are_counted_and_the_first_are_named(self, begin: Begin, store: Store) -> None:
        budget(store, epsilon=0.01)
        with pytest.raises(BudgetExhausted) as refused:
            check_budget(begin(**EVERYONE))
        assert "client 'wards/ward-0' to an epsilon of" in str(refused.value)
        named = ", ".join(f"'wards/ward-{ward}'" for ward in range(1, 6))
        assert str(refused.value).endswith(f"; nor can 8 others pay: {named} and 3 more")

    def test_too_few_who_can_pay_end_it(self, begin: Begin, store: Store) -> None:
        budget(store)
        budget(store, "wards/ward-2", epsilon=0.0)
        run = begin(**EVERYONE | {"selection": {"kind": "uniform", "min_updates": 9}})
        with pytest.raises(BudgetExhausted):
            walk(stages, run, 1)
        assert spent(store, 1) == 0

    def test_the_noise_of_a_target_is_the_noise_that_is_charged(self, begin: Begin, store: Store) -> None:
        """Where no example is drawn what is released is noise alone: its deviation is that of the event."""
        budget(store)
        target = {name: value for name, value in EXAMPLES.items() if name != "noise_multiplier"} | {
            "target_epsilon": 2.0
        }
        training = {"learning_rate": 1.0, "steps": 1, "privacy": target | {"sampling_rate": 0.051}}
        run = begin(**EVERYONE | {"rounds": 40, "training": training, "model": {"kind": "mlp", "hidden": [200]}})
        (event,) = (parse_event(each) for each in charges_of_round(run, [0])[0].events.values())
        assert isinstance(event, SelfComposed) and isinstance(event.event, PoissonSampled)
        charged = event.event.event
        assert isinstance(charged, Gaussian)
        rule = run.config.training.resolve(1, 40)
        assert rule.example_level is not None and rule.example_level.noise_multiplier == charged.noise_multiplier
        module, start_D = run.federation.module, run.federation.initial_params_D
        key = next(
            bytes([each]) * 32 for each in range(250) if not len(rule.private_batches_of(20, bytes([each]) * 32)[0])
        )
        delta_D, _ = rule.train(module, start_D, *run.federation.simulated.data.train(0), 0, key)
        deviation = charged.noise_multiplier * 1.0 / (0.051 * 20)  # over the expected size of a batch
        assert float(delta_D.std()) == pytest.approx(deviation, rel=5 / len(delta_D) ** 0.5)

    def test_a_run_whose_cut_batches_leave_no_epsilon_is_refused(self, begin: Begin, store: Store) -> None:
        """With the size that would do, which does."""
        budget(store)
        with pytest.raises(
            ConfigError, match=r"max_batch_size is 10, .* no epsilon holds .* or leave it out"
        ) as refused:
            begin(**privately(max_batch_size=10))
        assert store.runs() == []
        least = int(str(refused.value).partition("at least ")[2].partition(",")[0])
        assert 10 < least <= 20
        run = begin(**privately(max_batch_size=least))
        for round in (1, 2, 3):
            assert np.isfinite(walk(stages, run, round).metrics["privacy/example/epsilon"])
        with pytest.raises(ConfigError, match="no epsilon holds"):
            begin("s", **privately(max_batch_size=least - 1))

    def test_nor_does_any_run_go_on_to_where_no_epsilon_holds(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even a demonstration, which nothing limits."""
        from fedrounds.fl_components.reports import privacy as reports

        run = begin(**EVERYONE | {"data": wards.FIELDS["data"]})
        walk(stages, run, 1)
        monkeypatch.setattr(reports, "rdp_epsilon", lambda *_: float("inf"))
        reports._cached_epsilon.cache_clear()
        for act in (lambda: check_budget(run), lambda: walk(stages, run, 2)):
            with pytest.raises(BudgetExhausted, match="no epsilon would hold for the examples of client") as refused:
                act()
            assert "max_batch_size" in str(refused.value.hint)
        reports._cached_epsilon.cache_clear()
        assert store.run("r").committed_round == 1

    @pytest.mark.ci
    def test_a_target_is_kept_by_all_rounds(self, begin: Begin, store: Store) -> None:
        budget(store)
        run = begin(**privately(noise_multiplier=None, target_epsilon=2.0))
        told = [walk(stages, run, round).metrics["privacy/example/epsilon"] for round in range(1, 6)]
        assert told == sorted(told) and 1.99 < told[-1] <= 2.0

    def test_a_run_goes_on_where_it_stopped_and_pays_once(self, begin: Begin, store: Store) -> None:
        budget(store)
        run = begin(**EVERYONE)
        first = trained(run)
        run.close()
        run = begin(**EVERYONE)
        np.testing.assert_array_equal(trained(run), first)  # what is sent again is the same, bit by bit
        walk(stages, run, 1)
        assert spent(store, 0) == 1
        assert not np.array_equal(trained(run), first)


class TestBothClaims:
    FIELDS = EVERYONE | {"privacy": wards.FIELDS["privacy"], "selection": wards.FIELDS["selection"]}

    def test_each_is_paid_from_its_own_ledger(self, begin: Begin, store: Store) -> None:
        """Who was selected must not be told, so every client pays for its examples in every round."""
        budget(store)
        store.ledger.set_budget(Account("wards"), wards.TERMS, reason="x", by="ada")
        run = begin(**self.FIELDS)
        for round in (1, 2):
            metrics = walk(stages, run, round).metrics
        assert metrics["privacy/epsilon"] == pytest.approx(rdp_epsilon({wards.EVENT: 2}, "add_or_remove", 1e-3))
        assert metrics["privacy/example/epsilon"] == pytest.approx(epsilon_of(2))
        assert [spent(store, ward) for ward in range(NUM_CLIENTS)] == [2] * NUM_CLIENTS
        assert "clients/received" not in metrics
        found = statement(store, store.run("r"))
        assert (found["unit"], found["examples"]["unit"]) == ("client", "example")
        text = markdown(found)
        assert "## About clients" in text and "## About their examples" in text
        assert in_short(found).count("epsilon") == 2
        store.verify_journal()

    def test_each_needs_its_budget(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards"), wards.TERMS, reason="x", by="ada")
        with pytest.raises(StoreError, match=r"population 'wards/\*' has no privacy budget"):
            begin(**self.FIELDS)

    def test_too_many_clients_cannot_all_pay(self) -> None:
        fields = wards.FIELDS | self.FIELDS
        data = {"kind": "function", "path": "x:y", "num_classes": 2}
        config = wards_config(fields | {"data": data})
        from fedrounds.fl_components.config import check_claims

        check_claims(config, 1000)
        with pytest.raises(ValueError, match="every client pays for every round, which at most 1000 can"):
            check_claims(config, 1001)


def wards_config(fields: dict[str, Any]) -> Any:
    from fedrounds.fl_components.config import parse_config

    return parse_config(fields)


class TestWhoseDataTheseAre:
    def test_private_data_need_a_budget(self, begin: Begin) -> None:
        with pytest.raises(StoreError, match=r"population 'wards/\*' has no privacy budget") as refused:
            begin(**EVERYONE)
        assert "--unit example" in str(refused.value.hint)

    def test_one_clients_budget_is_enough_to_ask_for_a_claim(self, begin: Begin, store: Store) -> None:
        budget(store, "wards/ward-3")
        with pytest.raises(ConfigError, match="population 'wards' has a privacy budget for each client's examples"):
            begin(**EVERYONE | {"training": {"learning_rate": 0.5, "steps": 2}})

    def test_public_data_register_a_demonstration(self, begin: Begin, store: Store) -> None:
        run = begin(**EVERYONE | {"data": wards.FIELDS["data"]})
        walk(stages, run, 1)
        found = store.ledger.budget(Account("wards").template)
        assert found is not None and found.demonstration and found.epsilon is None
        assert len(store.ledger.budgets().values()) == 1 + NUM_CLIENTS

    @pytest.mark.parametrize("privacy", [{"kind": "none"}, wards.FIELDS["privacy"]])
    def test_nobody_learns_from_them_without_paying(self, begin: Begin, store: Store, privacy: Any) -> None:
        budget(store)
        walk(stages, begin(**EVERYONE), 1)
        fields = {"data": WARDS, "population": "other", "privacy": privacy}
        if privacy["kind"] == "none":
            fields["selection"] = {"kind": "uniform"}
        else:
            store.ledger.set_budget(Account("other"), wards.TERMS, reason="x", by="ada")
        with pytest.raises(ConfigError, match=r"population 'wards' has a privacy budget for each client's examples"):
            begin("b", **fields)

    def test_terms_are_the_same(self, begin: Begin, store: Store) -> None:
        budget(store, delta=1e-4)
        with pytest.raises(ConfigError, match=r"'wards/\*' do not speak of the same epsilon: delta is 0.001"):
            begin(**EVERYONE)

    def test_a_clients_own_terms_are_the_same_too(self, begin: Begin, store: Store) -> None:
        budget(store)
        budget(store, "wards/ward-1", delta=1e-4)
        with pytest.raises(ConfigError, match="population 'wards/ward-1' do not speak of the same epsilon"):
            walk(stages, begin(**EVERYONE), 1)


class TestReleases:
    def test_the_population_s_epsilon_is_the_largest_of_any_client(self, begin: Begin, store: Store) -> None:
        """Whoever has spent most in other runs."""
        budget(store)
        one = EVERYONE | {"selection": {"kind": "uniform", "cohort_size": 1}}
        other = begin("other", **one)
        walk(stages, other, 1), walk(stages, other, 2)
        metrics = walk(stages, begin(**EVERYONE), 1).metrics
        most = max(spent(store, ward) for ward in range(NUM_CLIENTS))
        assert most > min(spent(store, ward) for ward in range(NUM_CLIENTS)) == 1
        assert metrics["privacy/example/epsilon"] == pytest.approx(epsilon_of(1))
        assert metrics["privacy/example/epsilon_population"] == pytest.approx(epsilon_of(most))

    def test_what_comes_of_rows_is_withheld_and_what_comes_of_updates_is_not(self, begin: Begin, store: Store) -> None:
        budget(store)
        result = walk(stages, begin(**EVERYONE), 1)
        assert {"clients/received", "clients/selected", "communication/upload_bytes"} <= result.metrics.keys()
        assert not {name for name in result.metrics if name.startswith(("train/", "eval/", "time/", "memory/"))}
        assert result.seconds == {} and "train/loss" in store.rounds("r")[0].withheld["metrics"]

    def test_clients_draw_from_secrets_of_their_own(self, begin: Begin, store: Store) -> None:
        budget(store)
        run = begin(**EVERYONE)
        state = stages.load(run, 1)
        plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
        keys = [task.key for task in simulated_clients(run, plan, plan.cohort)]
        assert len({*keys}) == NUM_CLIENTS and all(key is not None and len(key) == 32 for key in keys)
        assert run.key(1, "selection and training") not in keys
        again = replace(plan, collection=plan.collection + 1)  # after a reservation that was voided
        assert not {*keys} & {task.key for task in simulated_clients(run, again, again.cohort)}
        assert keys[0] is not None and keys[0].hex() not in repr(simulated_clients(run, plan, plan.cohort))

    def test_what_one_example_adds_is_bounded_whatever_it_is(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the noise taken away, as nobody can: one step moves by at most C over the expected batch."""
        budget(store, delta=0.5)
        from fedrounds.fl_components.privacy import steps

        class NoNoise:
            def __init__(self, *_: Any) -> None: ...

            def blocks(self, size: int) -> Any:
                import torch

                yield torch.zeros(size)

        monkeypatch.setattr(steps, "WholeNormals", NoNoise)
        monkeypatch.setattr(wards, "wards_with_an_outlier", outlier, raising=False)
        sums = []
        for index, path in enumerate(("wards", "wards_with_an_outlier")):
            data = WARDS | {"path": f"{wards.HERE}:{path}"}
            training = {
                "learning_rate": 1.0,
                "steps": 1,
                "privacy": EXAMPLES | {"sampling_rate": 1.0, "max_grad_norm": 0.1, "delta": 0.5},
            }
            with open_run(
                store, f"r{index}", config=wards_config(wards.FIELDS | EVERYONE | {"data": data, "training": training})
            ) as run:
                sums.append(trained(run))
        moved = np.linalg.norm(sums[1] - sums[0])
        assert 0 < moved <= 2 * 0.1 / 20 * (1 + 1e-6)  # exchanged, not zeroed: twice C over 20 examples


def outlier() -> dict[str, tuple[Any, ...]]:
    found = wards.wards()
    x_train, y_train, *rest = found["ward-4"]
    x_train = x_train.copy()
    x_train[3] = 1e6
    return found | {"ward-4": (x_train, ~y_train ^ (np.arange(len(y_train)) != 3), *rest)}


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"noise_multiplier": 0.0}, "training.privacy.noise_multiplier is 0.0: it must be greater than or equal"),
            ({"sampling_rate": 1.5}, "training.privacy.sampling_rate is 1.5: it must be less than or equal to 1"),
            ({"sampling_rate": 0.01}, "client 'ward-0' has 20 training examples .* less than one; make"),
            ({"min_examples": 21}, "client 'ward-0' has 20 training examples and .*min_examples is 21"),
            ({"seed": 1}, "training.privacy has no seed for its noise"),
            ({"noise_multiplier": None}, "neither is given"),
            ({"target_epsilon": 1.0}, "both are given"),
            (
                {"noise_multiplier": None, "target_epsilon": 1.0, "max_batch_size": 5},
                "max_batch_size and .*target_epsilon are both given",
            ),
        ],
    )
    def test_one_clear_sentence(self, begin: Begin, store: Store, changes: dict[str, Any], sentence: str) -> None:
        budget(store)
        with pytest.raises(ConfigError, match=sentence):
            begin(**privately(**changes))
        assert store.runs() == []

    @pytest.mark.parametrize(("name", "value"), [("batch_size", 16), ("max_gradient_norm", 1.0)])
    def test_fields_that_would_be_ignored(self, begin: Begin, name: str, value: Any) -> None:
        training = EVERYONE["training"] | {name: value}
        with pytest.raises(ConfigError, match=rf"training.privacy.kind is example_level and training.{name} is"):
            begin(**EVERYONE | {"training": training})

    def test_statistics_of_private_rows(self, begin: Begin) -> None:
        data = {"kind": "heart_disease", "normalisation": "per_client"}
        with pytest.raises(ConfigError, match=r"data.normalisation is per_client: one example moves all the others"):
            begin(**EVERYONE | {"data": data})

    def test_more_than_the_budget_pays_for(self, begin: Begin, store: Store) -> None:
        budget(store, epsilon=0.01)
        run = begin(**EVERYONE)
        with pytest.raises(BudgetExhausted, match=r"and the limit is 0\.01"):
            check_budget(run)

    def test_an_unchanged_way_of_gradients(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        budget(store)
        begin(**EVERYONE).close()
        assert store.run("r").engine["grad_sampler_name"] == "ghost norms"
        from fedrounds.fl_components.server import federation

        monkeypatch.setattr(federation, "grad_sampler_name", lambda *_: "opacus")
        with pytest.raises(RunConflict, match="grad sampler name ghost norms, now opacus"):
            begin(**EVERYONE)
