"""The functions behind `fedrounds privacy`, on a real store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedrounds.deployments import api, planning, privacy
from fedrounds.deployments.cli import main
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, DataError, RunNotFound, StoreError
from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled
from fedrounds.fl_components.reports.statement import in_short
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Charges, Store
from fedrounds.flows.round import walk
from tests.fl_components.server import wards
from tests.fl_components.server.test_example_claim import EVERYONE
from tests.fl_components.server.wards import WARDS
from tests.support import PRIVATE, ROOT, use_home

FIELDS = PRIVATE | {"rounds": 4}
EVENT = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1.5))


@pytest.fixture(scope="module")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in whose store two runs of one population have committed two rounds and one."""
    home = tmp_path_factory.mktemp("trained") / "home"
    with pytest.MonkeyPatch.context() as environment:
        use_home(home, environment)
        with Store.open() as store:
            for run_id, rounds in (("a", 2), ("b", 1)):
                with open_run(store, run_id, config=parse_config(FIELDS)) as run:
                    for round in range(1, rounds + 1):
                        walk(stages, run, round)
    return home


@pytest.fixture
def trained(home: Path, trained_home: Path) -> Iterator[Store]:
    """The store in a copy of `trained_home`."""
    shutil.copytree(trained_home, home)
    with Store.open() as store:
        yield store


def epsilon(rounds: int) -> float:
    return rdp_epsilon({EVENT: rounds}, "add_or_remove", 1e-3)


class TestStatus:
    def test_what_is_spent_by_whom(self, trained: Store) -> None:
        (found,) = privacy.status()
        assert found["population"] == "wards" and found["demonstration"]
        assert found["epsilon"] == pytest.approx(epsilon(3))
        assert (found["epsilon_limit"], found["epsilon_remaining"]) == (None, None)
        assert {run["run_id"]: run["epsilon"] for run in found["runs"]} == {
            "a": pytest.approx(epsilon(2)),
            "b": pytest.approx(epsilon(1)),
        }
        (named,) = privacy.status("wards")
        for run in named["runs"]:
            assert 0 < run["epsilon_tightest"] <= run["epsilon"]
            run["epsilon_tightest"] = None
        assert named == found

    def test_nobody_has_a_budget(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert privacy.status() == []
        with pytest.raises(StoreError, match="population 'nowhere' has no privacy budget"):
            privacy.status("nowhere")
        for command in ("status", "ledger"):
            assert main(["privacy", command, "nowhere"]) == 2
        capsys.readouterr()
        assert main(["privacy", "status"]) == 0
        assert "No population has a budget yet" in capsys.readouterr().out

    def test_a_large_ledger_is_told_quickly(self, trained: Store) -> None:
        """By its totals: whatever the number of charges, each different event is looked at once."""
        with trained._transaction() as connection:
            from sqlalchemy import text

            spent = json.dumps([[json.dumps(EVENT.model_dump(), sort_keys=True, separators=(",", ":")), 100_000]])
            connection.execute(text("UPDATE totals SET spent = :spent"), {"spent": spent})
        assert privacy.status()[0]["epsilon"] == pytest.approx(epsilon(100_000))


class TestBudget:
    def test_it_is_set_raised_and_journalled(self, home: Path) -> None:
        first = privacy.set_budget("icu", epsilon=2.0, delta=1e-6, reason="the board agreed")
        assert (first["epsilon"], first["epsilon_limit"], first["epsilon_remaining"]) == (0.0, 2.0, 2.0)
        raised = privacy.set_budget("icu", epsilon=3.0, reason="again")
        assert (raised["epsilon_limit"], raised["delta"]) == (3.0, 1e-6)
        with Store.open() as store:
            assert [row.content["reason"] for row in store.journal()] == ["the board agreed", "again"]

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"epsilon": 1.0, "delta": 1e-6, "reason": " "}, "no reason is given"),
            ({"epsilon": -1.0, "delta": 1e-6, "reason": "x"}, "epsilon is -1"),
            ({"epsilon": float("nan"), "delta": 1e-6, "reason": "x"}, "epsilon is nan"),
            ({"epsilon": float("inf"), "delta": 1e-6, "reason": "x"}, "epsilon is inf"),
            ({"epsilon": 1.0, "reason": "x"}, "is new and delta is not given"),
            ({"epsilon": 1.0, "delta": 2.0, "reason": "x"}, "delta is 2"),
            ({"epsilon": 1.0, "delta": 1e-6, "reason": "x", "unit": "ward"}, "unit is 'ward'; known are client"),
            ({"epsilon": 1.0, "delta": 1e-6, "reason": "x", "neighbouring": "any"}, "neighbouring is 'any'"),
        ],
    )
    def test_what_is_refused(self, home: Path, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            privacy.set_budget("icu", **fields)
        assert privacy.status() == []


def test_the_ledger_is_in_order(trained: Store) -> None:
    rows = privacy.ledger("wards")
    assert [(row["run_id"], row["round"], row["state"]) for row in rows] == [
        ("a", 1, "spent"),
        ("a", 2, "spent"),
        ("b", 1, "spent"),
    ]
    assert rows[0]["event"] == EVENT.model_dump()
    with pytest.raises(StoreError, match="population 'nowhere' has no privacy budget"):
        privacy.ledger("nowhere")


class TestVoid:
    def test_what_a_run_reserved_and_never_used_is_given_back(self, trained: Store) -> None:
        with trained.acquire("b") as lease:
            lease.reserve(2, [Charges({Account("wards"): EVENT.model_dump()}, lambda *_: None)])
        assert privacy.status()[0]["epsilon"] == pytest.approx(epsilon(4))
        found = privacy.void("b", reason="the ward left before anything was trained")
        assert found == {"run_id": "b", "round": 2, "population": "wards"}
        assert privacy.status()[0]["epsilon"] == pytest.approx(epsilon(3))
        assert [row["state"] for row in privacy.ledger("wards")] == ["spent"] * 3 + ["voided"]
        anchor = json.loads((trained.home / "secrets" / "journal.anchor").read_text())
        assert anchor["head"] == trained.journal_head().head
        trained.verify_journal()

    def test_the_run_goes_on_with_another_collection(self, trained: Store) -> None:
        """So the noise of the round has another key than any that the voided one could have had."""
        with open_run(trained, "b") as run:
            stages.authorise(run, stages.select(run, stages.load(run, 2), stages.broadcast(run, stages.load(run, 2))))
        privacy.void("b", reason="x")
        with open_run(trained, "b") as run:
            walk(stages, run, 2)
        assert [(row["collection"], row["state"]) for row in privacy.ledger("wards")][3:] == [
            (1, "voided"),
            (2, "spent"),
        ]
        assert privacy.status()[0]["epsilon"] == pytest.approx(epsilon(4))

    def test_what_is_refused(self, trained: Store) -> None:
        with pytest.raises(ConfigError, match="run b has nothing reserved"):
            privacy.void("b", reason="x")
        with pytest.raises(ConfigError, match="no reason is given"):
            privacy.void("b", reason=" ")
        with pytest.raises(RunNotFound):
            privacy.void("nobody", reason="x")


class TestStatement:
    def test_three_numbers_and_what_they_rest_on(self, trained: Store) -> None:
        found = privacy.statement("a")
        assert found["epsilon"]["run"] == found["epsilon"]["lineage"] == pytest.approx(epsilon(2))
        assert found["epsilon"]["population"] == pytest.approx(epsilon(3))
        assert 0 < found["epsilon"]["run_tightest"] <= found["epsilon"]["run"]
        assert (found["unit"], found["neighbouring"], found["delta"]) == ("client", "add_or_remove", 1e-3)
        for words in (
            "# Privacy statement of run a (ward)",
            "A demonstration: the data are public",
            "with or without one client (add_or_remove)",
            "a fixed L2 norm of 0.5, each with the same weight",
            "an independent coin for each client",
            "Not covered",
        ):
            assert words in found["markdown"]

    def test_a_model_answers_for_its_ancestors(self, trained: Store) -> None:
        with trained.acquire("a") as lease:
            lease.finish(RunState.COMPLETED)
        model = FIELDS["model"] | {"start_from": "latest"}
        with open_run(trained, "c", config=parse_config(FIELDS | {"model": model})) as run:
            walk(stages, run, 1)
        found = privacy.statement("c")
        assert found["lineage"] == ["c", "a"]
        assert found["epsilon"]["run"] == pytest.approx(epsilon(1))
        assert found["epsilon"]["lineage"] == pytest.approx(epsilon(3))
        assert found["epsilon"]["population"] == pytest.approx(epsilon(4))

    def test_ancestors_under_no_claim_or_of_another_population_are_not_counted_as_nothing(self, trained: Store) -> None:
        for run_id, changes in (("open", {"privacy": {"kind": "none"}}), ("other", {"population": "others"})):
            with open_run(trained, run_id, config=parse_config(FIELDS | {"name": run_id} | changes)) as run:
                walk(stages, run, 1)
                run.lease.finish(RunState.COMPLETED)
            model = FIELDS["model"] | {"start_from": "latest"}
            later = parse_config(FIELDS | {"name": run_id, "model": model})
            with open_run(trained, f"after-{run_id}", config=later) as run:
                walk(stages, run, 1)
            found = privacy.statement(f"after-{run_id}")
            assert found["lineage"] == [f"after-{run_id}", run_id] and found["epsilon"]["lineage"] is None
            assert in_short(found).startswith(f"epsilon {epsilon(1):.4g} at delta 0.001")
            assert "with its ancestors not known" in in_short(found)

    @pytest.mark.parametrize(
        ("rule", "words"),
        [
            ({"kind": "none"}, "Nothing is claimed."),
            (FIELDS["privacy"] | {"simulate_noise_cohort": 900}, "larger cohort"),
        ],
    )
    def test_no_claim(self, home: Path, rule: dict[str, Any], words: str) -> None:
        with Store.open() as store, open_run(store, "r", config=parse_config(FIELDS | {"privacy": rule})) as run:
            walk(stages, run, 1)
        found = privacy.statement("r")
        assert found["claim"] is False and words in found["markdown"]


class TestPlan:
    @pytest.fixture
    def config(self, tmp_path: Path) -> str:
        file = tmp_path / "ward.yaml"
        file.write_text(json.dumps(FIELDS | {"rounds": 50}))
        return str(file)

    @pytest.mark.ci
    def test_each_choice_keeps_what_was_asked(self, config: str, home: Path, tmp_path: Path) -> None:
        found = planning.plan(config, epsilon=4.0, plot=tmp_path / "plan.png")
        configured, noise, rounds, cohort = found["choices"]
        assert configured["epsilon"] == pytest.approx(epsilon(50)) and configured["epsilon"] > 4
        for choice in (noise, rounds, cohort):
            assert 0.9 * 4 < choice["epsilon"] <= 4
        assert (noise["rounds"], noise["cohort_size"]) == (50, 10) and noise["noise_multiplier"] > 1.5
        assert (rounds["noise_multiplier"], rounds["cohort_size"]) == (1.5, 10) and rounds["rounds"] < 50
        assert (cohort["noise_multiplier"], cohort["rounds"]) == (1.5, 50) and cohort["cohort_size"] < 10
        for choice in found["choices"]:
            assert [each for _, each in choice["curve"]] == sorted(each for _, each in choice["curve"])
        assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.ci
    @pytest.mark.parametrize("asked", [1e-9, 1e9])
    def test_what_no_run_can_keep_is_not_proposed(self, config: str, home: Path, asked: float) -> None:
        _, *choices = planning.plan(config, epsilon=asked)["choices"]
        for choice in choices:
            assert choice["rounds"] >= 1 and choice["cohort_size"] >= 1 and choice["noise_multiplier"] >= 0.001
            assert choice["epsilon"] <= asked

    def test_a_check_says_that_delta_promises_little(self, config: str, home: Path) -> None:
        (warning,) = api.check_config(config, ["privacy.delta=0.5"], data=True)["warnings"]
        assert warning.startswith("privacy.delta is 0.5, more than one in 20 clients")

    @pytest.mark.ci
    def test_people_see_a_table_and_a_curve(self, config: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["privacy", "plan", config, "--epsilon", "4"]) == 0
        out = capsys.readouterr().out
        assert "what keeps epsilon 4 at delta 0.001 (add_or_remove)" in out
        assert "as configured" in out and "└" in out

    def test_without_a_claim_there_is_nothing_to_plan(self, config: str, home: Path) -> None:
        with pytest.raises(ConfigError, match="there is nothing to plan"):
            planning.plan(config, ["privacy={kind: none}"], epsilon=1.0)


@pytest.mark.parametrize(
    "line",
    [
        "privacy status",
        "privacy status wards",
        "privacy ledger wards",
        "privacy statement a",
        "journal verify",
        "journal key",
    ],
)
def test_each_command_says_something_to_people_and_one_object_to_programs(
    line: str, trained: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 0
    assert len(capfd.readouterr().out.splitlines()) >= 1
    assert main([*line.split(), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["schema"], found["status"]) == (1, "ok")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("audit a --canaries 0", "0 canaries are too few for an audit"),
        ("audit a --canaries -5", "-5 canaries are too few for an audit"),
        ("audit open", "run open claims nothing"),
        ("audit unprotected", "no run of experiment 'unprotected' was charged for a privacy claim"),
        ("audit nope", "there is no run 'nope'"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_a_flow_run_starts(
    line: str, words: str, trained: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**FIELDS, "name": "unprotected", "population": "others", "privacy": {"kind": "none"}}
    with open_run(trained, "open", config=parse_config(fields)):
        pass
    monkeypatch.setattr("fedrounds.deployments.stack.connection.connect", None)  # would fail: nothing is connected to
    assert main(line.split()) == 2
    assert words in capsys.readouterr().err


def test_runs_are_listed_with_duration_and_data(trained: Store) -> None:
    folder = str(ROOT / "fl_components" / "data" / "heart_disease")
    fields = {**FIELDS, "population": "hearts", "data": {"kind": "heart_disease", "folder": folder}}
    with open_run(trained, "c", config=parse_config({**fields, "privacy": {"kind": "none"}})):
        pass
    (newest,) = api.runs(1)
    assert (newest["data"], newest["duration_s"]) == ({"kind": "heart_disease", "source": folder}, None)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_that_lists_nothing_is_refused(limit: int, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--limit", str(limit)]) == 2
    assert f"limit is {limit}" in capsys.readouterr().err


@pytest.mark.parametrize("look", ["check", "plan", "plan for examples"])
def test_no_look_at_private_data_shows_a_cell(home: Path, tmp_path: Path, look: str) -> None:
    """What `train` withholds of data that cannot be loaded, these withhold as well; an administrator finds it."""
    fields = FIELDS | {"data": WARDS | {"path": f"{wards.HERE}:broken_wards"}}
    if look == "plan for examples":
        fields |= EVERYONE | {"data": fields["data"]}
    file = tmp_path / "broken.yaml"
    file.write_text(json.dumps(fields))  # which is YAML as well
    looks: dict[str, Callable[[], Any]] = {
        "check": lambda: api.check_config(str(file), data=True),
        "plan": lambda: planning.plan(str(file), epsilon=5.0),
        "plan for examples": lambda: planning.plan(str(file), unit="example", epsilon=5.0),
    }
    with pytest.raises(DataError) as caught:
        looks[look]()
    assert caught.value.message == "loading the clients' data failed; why is withheld under the privacy claim"
    assert caught.value.__cause__ is None
    withheld = (home / "withheld" / "ward.log").read_text()
    assert "42" in withheld and "ward-7" in withheld


class TestRunsWithoutAClaim:
    def test_status_ledger_and_statement_name_them(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """They were trained on the same wards before anybody set a budget; deleting one does not delete its record."""
        fields = FIELDS | {"data": wards.WARDS}
        with Store.open() as store:
            without = fields | {"privacy": {"kind": "none"}, "selection": {"kind": "uniform"}, "seed": 4}
            with open_run(store, "q1", config=parse_config(without)) as run:
                walk(stages, run, 1)
            privacy.set_budget("wards", epsilon=6.0, delta=1e-3, reason="the board")
            assert [run["run_id"] for run in privacy.status("wards")[0]["unclaimed_runs"]] == ["q1"]
            with open_run(store, "wp", config=parse_config(fields)) as run:
                walk(stages, run, 1)
        (found,) = privacy.status("wards")
        (unclaimed,) = found["unclaimed_runs"]
        assert (unclaimed["run_id"], unclaimed["rounds"], unclaimed["deleted"]) == ("q1", 1, False)
        first, charge = privacy.ledger("wards")
        assert (first["run_id"], first["state"], first["round"], first["event"]) == ("q1", "unclaimed", 1, None)
        assert (charge["run_id"], charge["state"]) == ("wp", "spent")
        assert privacy.statement("wp")["unclaimed_runs"] == found["unclaimed_runs"]
        assert "q1 (ward, begun" in privacy.statement("wp")["markdown"]
        for line, words in (
            ("privacy status", "not covered by this epsilon: 1 run on these data without this claim"),
            ("privacy ledger wards", "unclaimed"),
        ):
            assert main(line.split()) == 0
            assert words in " ".join(capsys.readouterr().out.split())


class TestNames:
    def test_a_demonstration_becomes_private(self, trained: Store) -> None:
        found = privacy.set_budget("wards", epsilon=6.0, reason="the board")
        assert (found["demonstration"], found["epsilon_limit"]) == (False, 6.0)
        assert found["epsilon"] == pytest.approx(epsilon(3))  # what it spent stays on its account
        with pytest.raises(ConfigError, match="has spent under other terms: delta"):
            privacy.set_budget("wards", epsilon=6.0, delta=1e-9, reason="the board")
        trained.verify_journal()

    def test_a_client_that_there_is_not(self, home: Path) -> None:
        privacy.set_budget("heart/*", epsilon=3.0, delta=1e-3, reason="the board")
        privacy.set_budget("heart/first", epsilon=1.0, reason="before any run")
        with Store.open() as store:
            store.ledger.register([Account("heart", "va"), Account("heart", "cleveland")])
        privacy.set_budget("heart/va", epsilon=1.0, reason="x")
        for name, close in (("VA", "close names are va"), ("clevland", "close names are cleveland")):
            with pytest.raises(ConfigError, match=f"population 'heart' has no client '{name}'") as refused:
                privacy.set_budget(f"heart/{name}", epsilon=1.0, reason="x")
            assert close in str(refused.value.hint)
