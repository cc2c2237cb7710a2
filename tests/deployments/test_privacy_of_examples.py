"""`fedrounds privacy` where clients answer for their examples, on a real store."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.deployments import planning, privacy
from fedrounds.deployments.api import check_config
from fedrounds.deployments.cli import main
from fedrounds.deployments.results import run_data
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError, RunNotFound, StoreError
from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled, SelfComposed
from fedrounds.fl_components.reports.statement import in_short
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server import reproducibility, stages
from fedrounds.fl_components.server.claim import check_limits
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Charges, Store
from fedrounds.fl_components.training import CanaryClient
from fedrounds.flows.round import walk
from fedrounds.tasks.audit import audit_mechanism, auditable_run
from tests.fl_components.server import wards
from tests.support import PRIVATE, use_home

EXAMPLES: dict[str, Any] = {
    "kind": "example_level",
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "sampling_rate": 0.5,
    "delta": 1e-3,
}
FIELDS: dict[str, Any] = {
    "name": "heart",
    "rounds": 4,
    "data": {"kind": "heart_disease"},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.5, "epochs": 1, "privacy": EXAMPLES},
}
ROUND = SelfComposed(event=PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1.0)), count=2)


def epsilon(rounds: int) -> float:
    return rdp_epsilon({ROUND: rounds}, "zero_out", 1e-3)


@pytest.fixture(scope="module")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in whose store two runs have committed two rounds and one, the second of them with two of the clients."""
    home = tmp_path_factory.mktemp("trained") / "home"
    with pytest.MonkeyPatch.context() as environment:
        use_home(home, environment)
        two = {"selection": {"kind": "uniform", "cohort_size": 2}}
        with Store.open() as store:
            for run_id, rounds, changes in (("a", 2, {}), ("b", 1, two)):
                with open_run(store, run_id, config=parse_config(FIELDS | changes)) as run:
                    for round in range(1, rounds + 1):
                        walk(stages, run, round)
    return home


@pytest.fixture
def trained(home: Path, trained_home: Path) -> Iterator[Store]:
    """The store in a copy of `trained_home`."""
    shutil.copytree(trained_home, home)
    with Store.open() as store:
        yield store


class TestStatus:
    def test_all_clients_are_one_line(self, trained: Store) -> None:
        (found,) = privacy.status()
        assert (found["population"], found["unit"], found["clients"]) == ("heart/*", "example", 4)
        assert found["epsilon"] == pytest.approx(epsilon(3))
        assert (found["epsilon_limit"], found["epsilon_remaining"]) == (None, None)

    def test_or_one_each(self, trained: Store) -> None:
        _, *clients = privacy.status("heart/*")
        assert [each["population"] for each in clients] == [
            f"heart/{name}" for name in ("cleveland", "hungarian", "switzerland", "va")
        ]
        assert sorted(each["epsilon"] for each in clients) == pytest.approx(
            [epsilon(2), epsilon(2), epsilon(3), epsilon(3)]
        )
        busy = next(each for each in clients if len(each["runs"]) == 2)
        assert {run["run_id"]: run["epsilon"] for run in busy["runs"]} == {
            "a": pytest.approx(epsilon(2)),
            "b": pytest.approx(epsilon(1)),
        }
        (named,) = privacy.status(busy["population"])
        assert all(0 < run["epsilon_tightest"] <= run["epsilon"] for run in named["runs"])
        assert len(privacy.ledger(busy["population"])) == 3

    @pytest.mark.parametrize("ask", [privacy.status, privacy.ledger])
    @pytest.mark.parametrize("name", ["heart/nowhere", "heart"])
    def test_nobody_of_that_name(self, trained: Store, ask: Any, name: str) -> None:
        with pytest.raises(StoreError, match=f"population '{name}' has no privacy budget") as refused:
            ask(name)
        assert "`fedrounds privacy status 'heart/*'` lists the clients" in str(refused.value.hint)

    def test_all_clients_have_no_ledger_together(self, trained: Store) -> None:
        with pytest.raises(ConfigError, match="each has a ledger of its own") as refused:
            privacy.ledger("heart/*")
        assert "`fedrounds privacy ledger heart/CLIENT`" in str(refused.value.hint)

    def test_each_number_of_all_clients_is_said_of_whom_it_is_true(
        self, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The one that has spent most need not be the one that has the least left."""
        privacy.set_budget("heart/*", epsilon=9.0, delta=1e-3, reason="x")
        with Store.open() as store:
            store.ledger.register([Account("heart", "va"), Account("heart", "cleveland")])
            charges = Charges({Account("heart", "cleveland"): ROUND.model_dump()}, lambda *_: None)
            with store.acquire(_some_run(store)) as lease:
                lease.reserve(1, [charges])
        privacy.set_budget("heart/va", epsilon=1.0, reason="x")
        found = next(each for each in privacy.status() if each["population"] == "heart/*")
        assert (found["epsilon"], found["epsilon_limit"]) == (pytest.approx(epsilon(1)), 9.0)
        assert found["epsilon_remaining"] == 1.0 < 9 - epsilon(1)
        assert found["least_left"] == {
            "population": "heart/va",
            "epsilon": 0.0,
            "epsilon_limit": 1.0,
            "epsilon_remaining": 1.0,
        }
        assert main(["privacy", "status"]) == 0
        out = capsys.readouterr().out
        assert f"heart/*  epsilon {epsilon(1):.3f}, the largest of 2 clients," in out
        assert "a limit of 9 for each client that has none of its own" in out
        assert "least left: heart/va" in out and "1.000 of 1 left" in out


class TestRun:
    def test_the_largest_and_each(self, trained: Store) -> None:
        found = run_data(trained, trained.run("a"))["privacy"]
        assert (found["unit"], found["neighbouring"], found["delta"]) == ("example", "zero_out", 1e-3)
        assert found["epsilon"] == pytest.approx(epsilon(2))
        assert found["clients"] == dict.fromkeys(
            ("cleveland", "hungarian", "switzerland", "va"), pytest.approx(epsilon(2))
        )
        assert found["examples"] is None

    def test_a_statement_says_whose_and_what_an_example_is(self, trained: Store) -> None:
        found = privacy.statement("a")
        assert found["epsilon"]["run"] == found["epsilon"]["lineage"] == pytest.approx(epsilon(2))
        assert found["epsilon"]["population"] == pytest.approx(epsilon(3))
        assert 0 < found["epsilon"]["run_tightest"] <= found["epsilon"]["run"]
        for words in (
            "not a patient, where a patient has several rows",
            "only if nobody is in two of them",
            "| Client va | this run",
            "2 steps a round",
            "Gradients of single examples by ghost norms",
            "how many training examples each client has",
        ):
            assert words in found["markdown"]
        assert in_short(found).startswith(f"epsilon {epsilon(2):.4g} at delta 0.001 (example, zero_out)")
        assert found["withheld"] is None and "withheld" not in found["markdown"]  # the data are public
        assert "by an independent coin" in found["sampling"]

    def test_where_all_examples_are_in_each_batch_no_coin_is_spoken_of(self, home: Path) -> None:
        training = FIELDS["training"] | {"privacy": EXAMPLES | {"sampling_rate": 1.0}}
        with Store.open() as store, open_run(store, "r", config=parse_config(FIELDS | {"training": training})) as run:
            walk(stages, run, 1)
        found = privacy.statement("r")
        assert "coin" not in found["markdown"] and "all of a client's examples are in each" in found["sampling"]
        assert "1 step a round" in found["mechanism"]

    def test_people_are_told_whose_it_is(self, trained: Store, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["show", "a"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        told = f"{epsilon(2):.3f}"
        assert f"epsilon {told} (delta 0.001, example, zero_out, RDP), the largest of any client: " in out
        assert f"cleveland {told}, hungarian {told}" in out and "a demonstration on public data" in out

    def test_the_ledger_has_short_words(self, trained: Store, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["privacy", "ledger", "heart/va"]) == 0
        out = capsys.readouterr().out
        assert "2 times noise 1 at rate 0.5" in out and "{" not in out

    def test_a_model_answers_for_its_ancestors(self, trained: Store) -> None:
        with trained.acquire("a") as lease:
            lease.finish(RunState.COMPLETED)
        model = FIELDS["model"] | {"start_from": "latest"}
        with open_run(trained, "c", config=parse_config(FIELDS | {"model": model})) as run:
            walk(stages, run, 1)
        found = privacy.statement("c")
        assert (found["lineage"], found["epsilon"]["lineage"]) == (["c", "a"], pytest.approx(epsilon(3)))

    def test_an_honest_step_is_not_accused_and_half_the_noise_is(
        self, trained: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert auditable_run(trained, "heart", 1000).run_id == "b"
        before = privacy.status("heart/*"), sorted(each for each in trained.home.rglob("*"))
        honest = audit_mechanism(trained, trained.run("a"), 1000)
        assert (privacy.status("heart/*"), sorted(each for each in trained.home.rglob("*"))) == before
        assert honest.clients is None and honest.examples is not None and not honest.claim_violated
        assert honest.examples.num_parameters == 28 + 1000

        from fedrounds.fl_components.privacy import noise

        draw = noise.WholeNormals._draw
        monkeypatch.setattr(noise.WholeNormals, "_draw", lambda self, pairs: (draw(self, pairs) / 2).round())
        half = audit_mechanism(trained, trained.run("a"), 1000)
        assert half.claim_violated and half.as_data()["epsilon_lower_bound"] > half.as_data()["claimed_epsilon"]

    def test_gradients_that_are_not_clipped_are_accused(self, trained: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        from fedrounds.fl_components.privacy.steps import Mechanism

        factors = Mechanism.factors
        monkeypatch.setattr(Mechanism, "factors", lambda self, squares: factors(self, squares) * 3)
        assert audit_mechanism(trained, trained.run("a"), 1000).claim_violated


class TestBudget:
    def test_of_each_client_and_of_one(self, home: Path) -> None:
        found = privacy.set_budget("heart/*", epsilon=3.0, delta=1e-3, reason="the board")
        assert (found["unit"], found["neighbouring"]) == ("example", "zero_out")
        with Store.open() as store:
            store.ledger.register([Account("heart", "va"), Account("heart", "cleveland")])
        privacy.set_budget("heart/va", epsilon=1.0, reason="as the hospital asks")
        limits = {each["population"]: each["epsilon_limit"] for each in privacy.status("heart/*")}
        assert limits == {"heart/*": 3.0, "heart/va": 1.0, "heart/cleveland": 3.0}

    def test_one_client_s_is_on_the_terms_of_each(self, home: Path) -> None:
        with pytest.raises(ConfigError, match="is new and delta is not given") as refused:
            privacy.set_budget("heart/va", epsilon=1.0, reason="x")
        assert str(refused.value.hint).endswith("its number of examples")
        privacy.set_budget("heart/*", epsilon=3.0, delta=1e-3, reason="the board")
        found = privacy.set_budget("heart/va", epsilon=1.0, reason="as the hospital asks")
        assert (found["delta"], found["epsilon_limit"]) == (1e-3, 1.0)

    @pytest.mark.parametrize("name", ["wards/", "/*", "wards/*/*", "wards/a/b", "", "wa rds", "wards\n", "wards/ a"])
    def test_names_that_match_nothing(self, home: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be a"):
            privacy.set_budget(name, epsilon=1.0, delta=1e-3, reason="x")

    def test_a_client_s_name_is_quoted_for_the_shell(self, home: Path) -> None:
        privacy.set_budget("heart/long beach", epsilon=0.0, delta=1e-3, reason="x")
        with Store.open() as store:
            budget = store.ledger.budget(Account("heart", "long beach"))
        assert budget is not None
        with pytest.raises(BudgetExhausted) as refused:
            check_limits(budget, {canonical_json(ROUND.model_dump()): 1}, {})
        assert "budget set 'heart/long beach' --epsilon" in str(refused.value.hint)

    @pytest.mark.parametrize(
        ("population", "options", "sentence"),
        [
            ("heart", {"unit": "example"}, "unit of population 'heart' cannot be example"),
            ("heart/va", {"neighbouring": "add_or_remove"}, "neighbouring is add_or_remove for examples"),
        ],
    )
    def test_what_makes_no_sense(self, home: Path, population: str, options: dict[str, str], sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            privacy.set_budget(population, epsilon=1.0, delta=1e-3, reason="x", **options)


class TestPlan:
    @pytest.fixture
    def config(self, tmp_path: Path) -> str:
        file = tmp_path / "heart.yaml"
        file.write_text(json.dumps(FIELDS))
        return str(file)

    @pytest.mark.ci
    def test_a_small_hospital_pays_more(self, config: str, home: Path) -> None:
        found = planning.plan(config, unit="example", epsilon=2.0)
        assert [(each["client"], each["examples"]) for each in found["clients"]] == [
            ("switzerland", 30),
            ("va", 85),
            ("hungarian", 172),
            ("cleveland", 199),
        ]
        on_the_mean = [each["noise_on_the_mean"] for each in found["clients"]]
        assert on_the_mean == sorted(on_the_mean, reverse=True)
        assert all(each["configured_epsilon"] == pytest.approx(epsilon(4)) for each in found["clients"])
        for each in found["clients"]:
            rule = ROUND.model_copy(
                update={
                    "event": PoissonSampled(
                        sampling_rate=0.5, event=Gaussian(noise_multiplier=each["noise_multiplier"])
                    )
                }
            )
            assert 0.99 * 2 < rdp_epsilon({rule: 4}, "zero_out", 1e-3) <= 2
            assert epsilon(each["configured_rounds"]) <= 2 < epsilon(each["configured_rounds"] + 1)

    @pytest.mark.ci
    def test_cut_batches_are_paid_for(self, config: str, home: Path) -> None:
        plain = planning.plan(config, unit="example", epsilon=2.0)["clients"]
        cut = planning.plan(config, ["training.privacy.max_batch_size=130"], unit="example", epsilon=2.0)["clients"]
        assert cut[0]["noise_multiplier"] == plain[0]["noise_multiplier"]  # 30 rows are never cut
        assert cut[-1]["noise_multiplier"] > plain[-1]["noise_multiplier"]

    @pytest.mark.ci
    def test_batches_that_are_cut_too_often_name_the_size_that_would_do(self, config: str, home: Path) -> None:
        cut = "training.privacy.max_batch_size="
        with pytest.raises(
            ConfigError, match=r"no noise keeps an epsilon of 2 at a delta of 0\.001: .*cut too"
        ) as refused:
            planning.plan(config, [f"{cut}100"], unit="example", epsilon=2.0)
        hint = str(refused.value.hint)
        assert "or leave it out" in hint
        least = int(hint.partition("at least ")[2].partition(",")[0])
        assert 100 < least < 199 and planning.plan(config, [f"{cut}{least}"], unit="example", epsilon=2.0)["clients"]
        with pytest.raises(ConfigError, match="no noise keeps"):
            planning.plan(config, [f"{cut}{least - 1}"], unit="example", epsilon=2.0)

    @pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), 0.0, -1.0])
    def test_what_no_plan_can_keep(self, config: str, home: Path, epsilon: float) -> None:
        for plan in (planning.plan, partial(planning.plan, unit="example")):
            with pytest.raises(ConfigError, match=f"epsilon is {epsilon:g}"):
                plan(config, epsilon=epsilon)

    @pytest.mark.ci
    def test_people_see_a_table(
        self, config: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        one = ["--set", "training.epochs=null", "--set", "training.steps=1", "--set", "rounds=1"]
        assert main(["privacy", "plan", config, "--epsilon", "2", "--example-level", *one]) == 0
        out = capsys.readouterr().out
        assert "by 1 round of 1 step at" in out
        assert out.rstrip().endswith("fewer rows a client has")
        assert "what keeps epsilon 2 at delta 0.001 for each example" in out and "switzerland" in out

    def test_without_a_claim_there_is_nothing_to_plan(self, config: str, home: Path) -> None:
        with pytest.raises(ConfigError, match="nothing to plan for the examples"):
            planning.plan(config, ["training.privacy={kind: none}"], unit="example", epsilon=1.0)
        with pytest.raises(ConfigError, match=r"privacy\.kind is none") as refused:
            planning.plan(config, epsilon=1.0)
        assert "--example-level" in str(refused.value.hint)


@pytest.mark.parametrize(
    "line", ["privacy status", "privacy status heart/*", "privacy ledger heart/va", "privacy statement a", "show a"]
)
def test_each_command_says_something_to_people_and_one_object_to_programs(
    line: str, trained: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 0
    assert len(capfd.readouterr().out.splitlines()) >= 1
    assert main([*line.split(), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["schema"], found["status"]) == (1, "ok")


class TestPrivateRows:
    """Of wards whose data are private, before any training."""

    @pytest.fixture(autouse=True)
    def _no_second_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process, which takes seconds; test_changed_data.py is about it."""
        monkeypatch.setattr(reproducibility, "second_load", lambda *_: nullcontext(lambda federation: []))

    @pytest.fixture
    def config(self, tmp_path: Path, home: Path) -> str:
        file = tmp_path / "wards.yaml"
        file.write_text(json.dumps(FIELDS | {"data": wards.WARDS}))
        return str(file)

    @pytest.mark.parametrize("as_json", [[], ["--json"]])
    def test_a_check_tells_nothing_of_their_labels(
        self, config: str, as_json: list[str], capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["config", "check", config, "--data", *as_json]) == 0
        out = capfd.readouterr().out
        assert "what the clients' labels and test rows tell" in out and "ward-3" in out
        assert not {"baselines", "partition", "majority", "label"} & {*re.findall(r"\w+", out)}

    def test_nor_how_many_rows_a_client_has_where_clients_are_protected(self, config: str) -> None:
        changes = [
            "training={learning_rate: 0.5, epochs: 1, batch_size: 10}",
            f"privacy={json.dumps(PRIVATE['privacy'])}",
            f"selection={json.dumps(PRIVATE['selection'])}",
            "aggregation.weights=uniform",
        ]
        found = check_config(config, changes, data=True)
        assert found["num_clients"] == wards.NUM_CLIENTS and "how many rows each has" in found["withheld"]
        assert not {"clients", "baselines", "partition"} & found.keys()

    def test_nor_draws_them(self, config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(["config", "check", config, "--data", "--plot", str(tmp_path / "p.png")]) == 2
        assert "--plot draws what the privacy claim withholds" in capfd.readouterr().err

    def test_without_a_claim_all_is_told(self, config: str) -> None:
        found = check_config(config, ["training={learning_rate: 0.5, epochs: 1, batch_size: 10}"], data=True)
        assert {"clients", "baselines", "partition"} <= found.keys() and "withheld" not in found


def _some_run(store: Store) -> str:
    with open_run(store, "r", config=parse_config(FIELDS | {"population": "other"})):
        return "r"


def test_an_audit_of_private_data_touches_none_of_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shadow holds rows that are made up; the clients' own could be anything."""
    fields = FIELDS | {"data": wards.WARDS, "population": "wards"}
    with Store.open() as store:
        privacy.set_budget("wards/*", epsilon=100, delta=1e-3, reason="a test")
        with open_run(store, "r", config=parse_config(fields)) as run:
            walk(stages, run, 1)
        spent = {account: each.spent for account, each in store.ledger.budgets().items()}
        shown = []
        monkeypatch.setattr(
            "fedrounds.tasks.audit.CanaryClient", lambda *given: shown.append(given[1]) or CanaryClient(*given)
        )
        found = audit_mechanism(store, store.run("r"), 1000)
        assert found.examples is not None and found.examples.num_canaries == 1000 and not found.claim_violated
        (rows,) = shown
        own = {row.tobytes() for ward in wards.wards().values() for row in np.concatenate([ward[0], ward[2]])}
        assert len(rows.x) == 300 and not own & {row.numpy().tobytes() for row in rows.x}
        assert {account: each.spent for account, each in store.ledger.budgets().items()} == spent


def test_nothing_is_audited_that_does_not_exist(home: Path) -> None:
    with Store.open() as store, pytest.raises(RunNotFound):
        auditable_run(store, "nowhere", 1000)
