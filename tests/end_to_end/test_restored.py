"""A home that is put back from a backup, while MLflow lies elsewhere and knows better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from tests.end_to_end.test_private import FIELDS, WARDS
from tests.fl_components.server.wards import EVENT
from tests.support import Fedrounds, data_of, server_is_up, wait_until


def epsilon(rounds: int) -> float:
    return rdp_epsilon({EVENT: rounds}, "add_or_remove", 1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_restored_home_is_noticed_and_pays_for_what_was_released(
    fedrounds: Fedrounds, home: Path, tmp_path: Path
) -> None:
    """Secret and database lie in the backup together; only MLflow has seen rounds 3 and 4."""
    (tmp_path / "our_wards.py").write_text(WARDS)
    config = tmp_path / "wards.yaml"
    config.write_text(json.dumps(FIELDS | {"rounds": 4}))
    elsewhere = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}

    def allow(limit: float) -> None:
        options = ["--epsilon", f"{limit}", "--delta", "1e-3", "--reason", "a test"]
        data_of(fedrounds("privacy", "budget", "set", "hospital", *options, "--json"))

    allow(epsilon(2) + 1e-6)
    assert fedrounds("train", config, "--run-id", "r", "--json", **elsewhere).returncode == 5
    wait_until(lambda: not server_is_up(home), "Prefect's server has left")
    shutil.copytree(home, tmp_path / "backup", symlinks=True)

    allow(100.0)
    released = data_of(fedrounds("resume", "r", "--json", **elsewhere))
    assert released["committed_round"] == 4
    wait_until(lambda: not server_is_up(home), "Prefect's server has left")
    shutil.rmtree(home)
    shutil.copytree(tmp_path / "backup", home, symlinks=True)

    allow(100.0)
    refused = fedrounds("resume", "r", "--json", **elsewhere)
    assert refused.returncode == 1, refused.stderr
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "store" and "the database is older than what was seen of run r" in error["message"]
    assert "MLflow (run" in error["message"] and "shows its round 4" in error["message"]
    assert "`fedrounds resume r --fresh-collection`" in error["hint"]

    afresh = data_of(fedrounds("resume", "r", "--fresh-collection", "--json", **elsewhere))
    assert afresh["committed_round"] == 4 and afresh["params_digest"] != released["params_digest"]
    ledger = data_of(fedrounds("privacy", "ledger", "hospital", "--json"))
    charges = [(each["round"], each["collection"], each["state"]) for each in ledger]
    assert charges == [
        (1, 1, "spent"),
        (2, 1, "spent"),
        (3, 1, "spent"),
        (3, 2, "spent"),
        (3, 3, "spent"),
        (4, 1, "spent"),
    ]
    (status,) = data_of(fedrounds("privacy", "status", "--json"))
    assert status["epsilon"] == pytest.approx(epsilon(6))
    data_of(fedrounds("journal", "verify", "--json", **elsewhere))
