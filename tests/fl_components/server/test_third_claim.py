"""A further privacy claim is one file: the plug-in tests/plugins/local_claim.py passes configuration, authorisation,
the ledger, the report and the statement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support import ROOT

PLUGIN = ROOT / "tests" / "plugins" / "local_claim.py"

PROGRAM = """
import json, sys
from pathlib import Path
from fedrounds.fl_components.server.charging import check_budget
from fedrounds.deployments import privacy
from fedrounds.deployments.results import run_data
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError
from fedrounds.fl_components.reports import privacy_report
from fedrounds.fl_components.reports.statement import in_short, markdown, statement
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from tests.fl_components.server import wards

fields = wards.FIELDS | {"data": wards.WARDS, "population": "wards", "rounds": 3}
fields["privacy"] = {"kind": "local", "noise_multiplier": 2.0, "delta": 1e-3}
fields["selection"] = {"kind": "uniform", "cohort_size": 9}
found = {}
for changes in ({"compression": {"kind": "top_k", "fraction": 0.5, "error_feedback": True}}, {"rounds": 3}):
    try:
        config = parse_config(fields | changes)
    except ConfigError as error:
        found["refused"] = error.message
with Store.open() as store:
    try:
        open_run(store, "r", config=config)
    except Exception as error:
        found["no budget"] = [type(error).__name__, error.hint]
    privacy.set_budget("wards/*", unit="client", epsilon=2.5, delta=1e-3, reason="the board")
    with open_run(store, "r", config=config) as run:
        walk(stages, run, 1)
        found["metrics"] = walk(stages, run, 2).metrics
        for act in (lambda: check_budget(run), lambda: walk(stages, run, 3)):
            try:
                act()
            except BudgetExhausted as error:
                found.setdefault("exhausted", []).append(error.message)
    run = store.run("r")
    found["charges"] = [[str(each.account), each.round, each.state, each.event] for each in store.ledger.charges()]
    (report,) = privacy_report(store, run).claims
    found["report"] = [str(report.account), report.num_accounts, report.epsilon, report.total, report.remaining]
    found["statement"], told = markdown(statement(store, run)), statement(store, run)
    found["short"] = in_short(told)
    found["api"] = run_data(store, run)["privacy"]
    found["status"] = privacy.status("wards/ward-3")
    store.verify_journal()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process finds in which the plug-in is installed."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / PLUGIN.name).write_text(PLUGIN.read_text())
    metadata = folder / "local_claim-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: local-claim\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[fedrounds.privacy]\nlocal = local_claim:LocalPrivacy\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "FEDROUNDS_HOME": str(folder / "home"),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.ci
class TestAThirdClaim:
    def test_its_laws_are_checked(self, found: dict[str, Any]) -> None:
        assert "privacy.kind is local but compression.error_feedback is true" in found["refused"]

    def test_private_data_need_a_budget_for_each_client(self, found: dict[str, Any]) -> None:
        kind, hint = found["no budget"]
        assert kind == "BudgetNotSet" and "budget set 'wards/*' --unit client" in hint

    def test_each_client_is_charged_for_each_round(self, found: dict[str, Any]) -> None:
        event = {"kind": "gaussian", "noise_multiplier": 2.0}
        rounds = [[f"wards/ward-{ward}", round, "spent", event] for round in (1, 2) for ward in range(9)]
        assert found["charges"] == rounds

    def test_its_rounds_end_where_the_budgets_do(self, found: dict[str, Any]) -> None:
        first, second = found["exhausted"]
        assert first == second
        assert "the next round would bring client 'wards/ward-0' to an epsilon of" in first

    def test_the_report_and_all_that_renders_it_agree(self, found: dict[str, Any]) -> None:
        account, num_accounts, epsilon, total, remaining = found["report"]
        assert (account, num_accounts) == ("wards/*", 9)
        assert epsilon == total == pytest.approx(2.5 - remaining)
        assert found["metrics"]["privacy/epsilon"] == found["api"]["epsilon"] == epsilon
        assert found["metrics"]["privacy/client/ward-3"] == found["api"]["clients"]["ward-3"] == epsilon
        (status,) = found["status"]
        assert (status["epsilon"], status["unit"], status["runs"][0]["epsilon"]) == (epsilon, "client", epsilon)
        assert f"epsilon {epsilon:.4g} at delta 0.001 (client, zero_out)" in found["short"]

    def test_the_statement_has_its_words(self, found: dict[str, Any]) -> None:
        for words in (
            "a client: all that one client holds, against everybody else",
            "each client adds Gaussian noise of 2 times the clipping norm",
            "| Client ward-3 | this run",
            "limit 2.5",
        ):
            assert words in found["statement"]
