"""What programs may rely on: the one object on stdout, the exit codes, and which stream words go to.

The Python interface behind the commands is replaced here; its own tests are beside it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fedrounds.deployments
from fedrounds.deployments.cli import main
from fedrounds.fl_components.errors import ConfigError, FedroundsError, RunNotFound, TooFewClients, UpdateRejected
from fedrounds.tasks.progress import Progress

RUN: dict[str, Any] = {
    "run_id": "k3f9",
    "name": "heart-disease",
    "state": "Completed",
    "rounds": 2,
    "committed_round": 2,
    "params_digest": "3fa9c2e1d0b4" + 52 * "0",
    "primary_metric": "accuracy",
    "metrics": {
        "eval/accuracy": 0.795,
        "eval/client/cleveland/accuracy": 0.812,
        "eval/client/va/accuracy": 0.671,
        "train/loss": 0.41,
    },
    "privacy": {
        "epsilon": None,
        "epsilon_tightest": None,
        "delta": None,
        "unit": None,
        "neighbouring": None,
        "accountant": None,
    },
    "communication": {"upload_bytes": 8432, "download_bytes": 10240},
    "seconds": {"train": 12.34, "evaluate": 1.2, "commit": 0.9, "aggregate": 0.5, "admit": 0.1},
    "mlflow_run_id": "0123456789abcdef0123456789abcdef",
    "prefect_flow_run_id": "01998c5a-93f9-7d5e-8b30-2f7e8a1c0d11",
    "prefect_flow_run_url": "http://127.0.0.1:24680/runs/flow-run/01998c5a-93f9-7d5e-8b30-2f7e8a1c0d11",
    "baselines": {"pooled_majority": 0.516, "client_majority": 0.638},
    "error": None,
    "data": {"kind": "tables", "source": "/srv/wards/"},
    "duration_s": 7380.4,
    "updated_at": 1_790_000_000.0,
}
SWEEP: dict[str, Any] = {
    "sweep_id": "s",
    "name": "heart-disease",
    "state": "Failed",
    "over": {"model.hidden": [[64, 32], [128]], "server_optimizer.kind": ["fedavg"]},
    "cells": [
        {
            "run_id": f"s-00{number}",
            "values": {"model.hidden": hidden, "server_optimizer.kind": "fedavg"},
            "state": state,
            "metrics": metrics,
            "params_digest": 64 * "a",
            "error": error,
        }
        for number, hidden, state, metrics, error in (
            (1, [64, 32], "Completed", {"eval/accuracy": 0.795}, None),
            (2, [128], "TooFewClients", {}, {"message": "round 1: 0 of 4 updates could be used"}),
        )
    ],
    "primary_metric": "accuracy",
    "best": "s-001",
    "mlflow_run_id": "0123456789abcdef0123456789abcdef",
    "compare_url": "http://127.0.0.1:5000/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%221%22%5D",
    "prefect_flow_run_id": "01998c5a-93f9-7d5e-8b30-2f7e8a1c0d11",
    "prefect_flow_run_url": "http://127.0.0.1:24680/runs/flow-run/01998c5a-93f9-7d5e-8b30-2f7e8a1c0d11",
}
SHOWN = RUN | {"history": [{"round": 1, "metrics": {"train/loss": 0.5}, "seconds": {"train": 6.2}}]}
JOURNAL = {"rows": 120, "head": "abc123", "anchors": 2, "not_reached": []}
CHECKED = {
    "name": "heart-disease",
    "population": "heart-disease",
    "rounds": 2,
    "config_digest": 64 * "a",
    "num_clients": 1,
    "num_parameters": 14,
    "communication": {"upload_bytes": 42_800, "download_bytes": 35_200},
    "cohort_size": 1,
    "clients": [{"id": "cleveland", "train": 199, "test": 104}],
}


class FakeInterface(ModuleType):
    """`fedrounds.deployments.api` with fixed answers; `calls` keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__("fedrounds.deployments.api")
        self.calls: list[tuple[Any, ...]] = []
        self.during_training: Callable[[], None] = lambda: None
        self.data = RUN

    def _run(self, on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        on_progress(Progress(kind="run", run_id="k3f9", rounds=2, round=0, text="heart-disease"))
        self.during_training()
        on_progress(Progress(kind="round", run_id="k3f9", rounds=2, round=1, metrics={"train/loss": 0.5}, seconds={}))
        return self.data

    def train(self, config, *, overrides=(), run_id=None, on_progress=None, profile=None):  # type: ignore[no-untyped-def]
        self.calls.append((config, tuple(overrides), run_id))
        return self._run(on_progress)

    def sweep(self, config, over, *, overrides=(), sweep_id=None, on_progress=None):  # type: ignore[no-untyped-def]
        self.calls.append((config, tuple(over), tuple(overrides), sweep_id))
        self._run(on_progress)
        return SWEEP

    def resume(self, run=None, *, fresh_collection, accept_changed_data, on_progress=None):  # type: ignore[no-untyped-def]
        self.calls.append((run, fresh_collection, accept_changed_data))
        return SWEEP if run == "s" else self._run(on_progress)

    def runs(self, limit=50, *, deleted=False):  # type: ignore[no-untyped-def]
        self.calls.append((limit, deleted))
        return [RUN]

    def show(self, run):  # type: ignore[no-untyped-def]
        if run == "s":
            return SWEEP
        if run != "k3f9":
            raise RunNotFound(f"there is no run {run!r}", hint="list them with: fedrounds runs")
        return SHOWN

    def check_config(self, config, overrides=(), *, data=False):  # type: ignore[no-untyped-def]
        self.calls.append((config, tuple(overrides), data))
        return CHECKED

    def resolve_config(self, config, overrides=()):  # type: ignore[no-untyped-def]
        return {"name": "heart-disease", "data": {"kind": "heart_disease"}}

    def config_schema(self):  # type: ignore[no-untyped-def]
        return {"type": "object"}

    def verify(self):  # type: ignore[no-untyped-def]
        return JOURNAL

    def key(self):  # type: ignore[no-untyped-def]
        return {"key": "aa" * 32, "key_id": "bb" * 8}

    def trust(self, key):  # type: ignore[no-untyped-def]
        return {"key_id": "bb" * 8}


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeInterface:
    fake = FakeInterface()
    for module in ("api", "journal"):
        monkeypatch.setitem(sys.modules, f"fedrounds.deployments.{module}", fake)
        monkeypatch.setattr(fedrounds.deployments, module, fake, raising=False)
    monkeypatch.setenv("FEDROUNDS_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def one_object(out: str) -> dict[str, Any]:
    """The object that is all of stdout."""
    found = json.loads(out)
    assert isinstance(found, dict)
    assert found["schema"] == 1
    assert out.endswith("}\n")
    return found


@pytest.mark.parametrize(
    ("line", "data"),
    [
        ("train heart.yaml", RUN),
        ("sweep heart.yaml --over seed=1,2", SWEEP),
        ("resume", RUN),
        ("resume k3f9", RUN),
        ("runs", [RUN]),
        ("resume s", SWEEP),
        ("show k3f9", SHOWN),
        ("show s", SWEEP),
        ("config check heart.yaml", CHECKED),
        ("config show heart.yaml", {"name": "heart-disease", "data": {"kind": "heart_disease"}}),
        ("config schema", {"type": "object"}),
        ("journal verify", JOURNAL),
        ("journal key", {"key": "aa" * 32, "key_id": "bb" * 8}),
        ("journal trust aa", {"key_id": "bb" * 8}),
    ],
)
def test_every_command_gives_one_object(
    line: str, data: object, interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*line.split(), "--json"]) == 0
    assert one_object(capfd.readouterr().out) == {"schema": 1, "status": "ok", "data": data}


def test_the_flag_may_stand_first(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "runs"]) == 0
    assert one_object(capfd.readouterr().out)["data"] == [RUN]


def test_options_reach_the_interface(interface: FakeInterface) -> None:
    main(["train", "heart.yaml", "--set", "rounds=5", "--run-id", "mine", "--set", "model.width=-1"])
    main(["sweep", "heart.yaml", "--over", "seed=1,2", "--over", "a=[1, 2],[3]", "--set", "b=1", "--sweep-id", "s"])
    main(["resume"])
    main(["resume", "k3f9", "--fresh-collection"])
    main(["resume", "k3f9", "--accept-changed-data"])
    main(["runs", "--limit", "3"])
    main(["runs", "--all"])
    main(["config", "check", "heart.yaml", "--set", "seed=2", "--data"])
    assert interface.calls == [
        ("heart.yaml", ("rounds=5", "model.width=-1"), "mine"),
        ("heart.yaml", ("seed=1,2", "a=[1, 2],[3]"), ("b=1",), "s"),
        (None, False, False),
        ("k3f9", True, False),
        ("k3f9", False, True),
        (3, False),
        (50, True),
        ("heart.yaml", ("seed=2",), True),
    ]


def test_whatever_prints_while_training_goes_to_stderr_under_json(
    interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    def noise() -> None:
        print("a data function prints")
        subprocess.run([sys.executable, "-c", "print('a child process prints')"], check=True)
        os.write(1, b"a C library prints\n")

    interface.during_training = noise
    assert main(["train", "heart.yaml", "--json"]) == 0
    out, err = capfd.readouterr()
    assert one_object(out)["data"] == RUN
    for words in ("a data function prints", "a child process prints", "a C library prints", "round 1/2"):
        assert words in err
    print("and stdout is what it was")
    assert capfd.readouterr().out == "and stdout is what it was\n"


def test_people_get_the_result_on_stdout(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "heart.yaml"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert [line.rstrip() for line in out.splitlines()] == [
        "heart-disease: run k3f9, 2 rounds",
        "round 1/2  train loss 0.500  eval loss -  accuracy -  upload -  time -",
        "Completed  heart-disease, 2 of 2 rounds, run k3f9",
        "",
        "  test accuracy",
        "  all clients pooled                                  0.795",
        "    cleveland                                         0.812",
        "    va                                                0.671",
        "  without a model: the majority label for all         0.516",
        "  without a model: each client's own majority label   0.638",
        "",
        "  communication   8.4 kB up, 10.2 kB down",
        "  privacy         no privacy claim",
        "  seconds         train 12.3, evaluate 1.2, commit 0.9, all others 0.6",
        "  parameters      sha256 3fa9c2e1d0b4",
        "",
        "Where to look next",
        "  Prefect       http://127.0.0.1:24680/runs/flow-run/01998c5a-93f9-7d5e-8b30-2f7e8a1c0d11",
        "  MLflow        experiment heart-disease, run k3f9",
        "  rounds        fedrounds show k3f9",
        "  both pages    fedrounds ui",
    ]


def test_a_privacy_claim_is_named_in_full(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    privacy = {"epsilon": 1.234, "delta": 1e-5, "unit": "client", "neighbouring": "add-or-remove", "accountant": "RDP"}
    interface.data = RUN | {"privacy": privacy, "seconds": None, "metrics": {}, "baselines": {}}
    assert main(["train", "heart.yaml"]) == 0
    out = capfd.readouterr().out
    assert "epsilon 1.234 (delta 1e-05, client, add-or-remove, RDP)" in out
    assert "seconds" not in out


def test_many_clients_are_summed_up(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    interface.data = RUN | {"metrics": {f"eval/client/c{i:03d}/accuracy": i / 100 for i in range(101)}}
    assert main(["train", "heart.yaml"]) == 0
    out = capfd.readouterr().out
    assert "c007" not in out
    for words in ("lowest of 101 clients", "median of 101 clients", "highest of 101 clients", "0.500", "1.000"):
        assert words in out


def test_the_primary_metric_leads_and_the_others_follow(
    interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = {
        "eval/loss": 0.4,
        "eval/accuracy": 0.75,
        "eval/auroc": 0.875,
        "eval/auroc/clients/median": 0.8,
        "eval/client/va/accuracy": 0.5,
        "eval/client/va/auroc": 0.625,
        "eval/confusion_matrix/a/b/a/b": 7,
        "eval/confusion_matrix/a/b/c": 2,
        "eval/confusion_matrix/c/a/b": 1,
        "eval/confusion_matrix/c/c": 1234,
    }
    interface.data = RUN | {"primary_metric": "auroc", "metrics": metrics}
    assert main(["train", "heart.yaml"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    first = lines.index(["test", "auroc"])
    assert lines[first + 1 : first + 4] == [
        ["all", "clients", "pooled", "0.875"],
        ["va", "0.625"],
        ["accuracy,", "pooled", "0.750"],
    ]
    assert ["accuracy", "without", "a", "model:", "the", "majority", "label", "for", "all", "0.516"] in lines
    matrix = lines.index(["class", "as", "a/b", "as", "c"])
    assert lines[matrix + 1 : matrix + 3] == [["a/b", "7", "2"], ["c", "1", "1,234"]]


def test_runs_and_show_are_tables(
    interface: FakeInterface, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["runs"]) == 0
    header, row = capfd.readouterr().out.splitlines()
    assert header.split() == ["run", "experiment", "data", "state", "rounds", "accuracy", "duration", "when"]
    values = ["k3f9", "heart-disease", "tables", "wards", "Completed", "2/2", "0.795", "2", "h", "03", "min"]
    assert row.split()[: len(values)] == values
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["runs"]) == 0
    header, row, *below = capfd.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "rounds", "accuracy", "duration", "when"]
    assert row.split()[:2] == ["k3f9", "Completed"]
    assert " ".join(below).split() == ["heart-disease", "on", "tables", "wards"]
    assert main(["show", "k3f9"]) == 0
    out = capfd.readouterr().out
    assert "train loss" in out
    assert "6.20 s" in out


@pytest.mark.parametrize("line", ["sweep heart.yaml --over seed=1,2", "show s", "resume s"])
def test_a_sweep_is_a_table_of_its_cells_with_the_best_marked(
    line: str, interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 0
    out = capfd.readouterr().out
    rows = [row.split() for row in out[out.index("Failed  heart-disease, 1 of 2 cells, sweep s") :].splitlines()]
    assert ["model.hidden", "server_optimizer.kind", "accuracy", "run", "state"] in rows
    assert ["[64,", "32]", "fedavg", "0.795", "best", "s-001", "Completed"] in rows
    assert ["[128]", "fedavg", "-", "s-002", "TooFewClients"] in rows
    for words in (SWEEP["compare_url"], "s-002: round 1: 0 of 4 updates", "fedrounds show s-001", "fedrounds resume s"):
        assert words in out


def test_config_check_says_what_would_run(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "heart.yaml", "--data"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    for words in (["rounds", "2"], ["cohort", "1"], ["parameters", "14"], ["cleveland", "199", "104"]):
        assert words in lines
    assert ["communication", "about", "42.8", "kB", "up,", "35.2", "kB", "down"] in lines


def test_config_show_is_yaml_and_schema_is_json(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "heart.yaml"]) == 0
    assert capfd.readouterr().out == "name: heart-disease\ndata:\n  kind: heart_disease\n"
    assert main(["config", "schema"]) == 0
    assert json.loads(capfd.readouterr().out) == {"type": "object"}


def all_errors() -> list[type[FedroundsError]]:
    found, pending = [], [FedroundsError]
    while pending:
        found.append(pending.pop())
        pending.extend(found[-1].__subclasses__())
    ours = [cls for cls in found if cls.__module__ == "fedrounds.fl_components.errors"]
    return [cls for cls in ours if cls is not UpdateRejected]  # which is made from a rejection, and ends no command


@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("as_json", [False, True], ids=["people", "json"])
def test_an_error_has_its_exit_code_and_its_mend(
    cls: type[FedroundsError], as_json: bool, interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise cls("what is wrong with [client 3]", hint="what would mend it")

    interface.during_training = fail
    assert main(["train", "heart.yaml", *(["--json"] if as_json else [])]) == cls.exit_code
    out, err = capfd.readouterr()
    assert "Error: what is wrong with [client 3]\nHint:  what would mend it\n" in err
    if as_json:
        error = {"code": cls.code, "message": "what is wrong with [client 3]", "hint": "what would mend it"}
        assert one_object(out) == {"schema": 1, "status": "error", "error": error}
    else:
        assert "what is wrong" not in out


def test_the_exit_codes_are_those_that_are_promised() -> None:
    promised = {
        "configuration": 2,
        "run_not_found": 2,
        "unreachable": 3,
        "not_installed": 3,
        "too_few_clients": 4,
        "budget_exhausted": 5,
        "run_failed": 1,
        "cancelled": 1,
        "lease_held": 1,
    }
    assert promised.items() <= {cls.code: cls.exit_code for cls in all_errors()}.items()


def test_an_error_without_a_mend_says_how_to_resume(
    interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise TooFewClients("2 clients, 3 are needed")

    interface.during_training = fail
    assert main(["train", "heart.yaml", "--json"]) == 4
    assert one_object(capfd.readouterr().out)["error"]["hint"] == "resume it with: fedrounds resume k3f9"


def test_show_tells_how_a_run_ended(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    error = {"code": "too_few_clients", "message": "2 clients, 3 are needed", "hint": "wait for them"}
    failed = SHOWN | {"state": "TooFewClients", "committed_round": 1, "attempt": 2, "error": error}
    interface.show = lambda run: failed  # type: ignore[method-assign]
    assert main(["show", "k3f9"]) == 0
    out = capfd.readouterr().out
    for words in ("TooFewClients  heart-disease, 1 of 2 rounds", error["message"], error["hint"]):
        assert words in out
    assert "fedrounds resume k3f9" in out
    assert re.search(r"attempts +2", out)


@pytest.mark.parametrize(
    "line", ["nothing", "train", "train a b", "train a --bogus", "runs --limit many", "train a --set", "show"]
)
def test_a_usage_error_is_2_and_json_too(
    line: str, interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "--help" in err
    assert main([*line.split(), "--json"]) == 2
    error = one_object(capfd.readouterr().out)["error"]
    assert error["code"] == "usage"
    assert error["message"]
    assert error["hint"].startswith("see fedrounds")
    assert interface.calls == []


def test_a_usage_error_shows_no_password(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--limit", "http://admin:hunter2@host", "--json"]) == 2
    out, err = capfd.readouterr()
    assert "http://***@host" in out and "hunter2" not in out + err


def test_a_bug_is_70_and_its_traceback_is_in_a_file(
    interface: FakeInterface, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a surprise")

    interface.during_training = fail
    assert main(["train", "heart.yaml", "--json"]) == 70
    out, err = capfd.readouterr()
    error = one_object(out)["error"]
    assert error["code"] == "bug"
    assert "bug" in error["message"]
    assert "ZeroDivisionError: a surprise" in error["message"]
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in error["hint"]
    assert "in fail" in log.read_text()
    assert "Traceback" not in err


def test_a_bug_is_reported_when_the_home_folder_is_broken(
    interface: FakeInterface, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDROUNDS_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    interface.runs = lambda limit, deleted: 1 / 0  # type: ignore[method-assign]
    assert main(["runs"]) == 70
    (log,) = tmp_path.glob("fedrounds-*/bug-*.log")
    assert str(log) in capfd.readouterr().err


@pytest.mark.parametrize("as_json", [False, True], ids=["people", "json"])
def test_ctrl_c_is_130_and_says_how_to_resume(
    as_json: bool, interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    interface.during_training = interrupt
    assert main(["train", "heart.yaml", *(["--json"] if as_json else [])]) == 130
    out, err = capfd.readouterr()
    assert "fedrounds resume k3f9" in err
    if as_json:
        error = one_object(out)["error"]
        assert error["code"] == "interrupted"
        assert error["hint"] == "resume it with: fedrounds resume k3f9"


def test_deploy_gives_what_was_registered(
    interface: FakeInterface, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    registered = {
        "name": "federated-training/nightly",
        "deployment_id": "0193f7a2",
        "url": "http://127.0.0.1:24680/deployments/deployment/0193f7a2",
        "work_pool": "fedrounds",
        "cron": "0 4 * * *",
        "active": True,
        "config": "/home/me/heart.yaml",
        "overrides": ["model.start_from=latest", "rounds=5"],
        "audit": {
            "name": "privacy-audit/nightly",
            "run": "heart",
            "cron": "0 5 * * 1",
            "url": "http://127.0.0.1/audit",
        },
    }

    def deploy(config: str, *, say: Callable[[str], None], **options: Any) -> dict[str, Any]:
        say("starting the local Prefect server")
        asked.update(options, config=config)
        return registered

    monkeypatch.setattr("fedrounds.deployments.stack.deploy.deploy", deploy)
    line = ["deploy", "heart.yaml", "--set", "rounds=5", "--cron", "0 4 * * *", "--active", "--name", "nightly"]
    line += ["--audit", "0 5 * * 1"]
    assert main([*line, "--json"]) == 0
    out, err = capfd.readouterr()
    assert one_object(out)["data"] == registered
    assert err == "starting the local Prefect server\n"
    options = {"overrides": ["rounds=5"], "cron": "0 4 * * *", "active": True, "name": "nightly", "audit": "0 5 * * 1"}
    assert asked == {"config": "heart.yaml", **options}
    assert main(line) == 0
    out = capfd.readouterr().out
    for words in ("federated-training/nightly trains /home/me/heart.yaml", "0 4 * * * (UTC), on", registered["url"]):
        assert words in out
    for words in ("privacy-audit/nightly audits the newest run of heart", "0 5 * * 1 (UTC)", "http://127.0.0.1/audit"):
        assert words in out


def test_people_get_the_simulated_time(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    reached = {"0.5": 1.5, "0.8": 12.0, "0.9": 40.25, "0.95": 1234.5}
    communication = {**RUN["communication"], "simulated_s": 2000.0, "simulated_s_to_primary": reached}
    interface.data = RUN | {"communication": communication}
    assert main(["train", "heart.yaml"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    told = "accuracy 0.8 after 12.0 s; accuracy 0.9 after 40.2 s; accuracy 0.95 after 1,234.5 s"
    assert f"network 2,000.0 s simulated ({told})" in out


def test_what_is_withheld_is_named_and_not_shown_as_nothing(
    interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    privacy = {"epsilon": 1.25, "delta": 1e-5, "unit": "client", "neighbouring": "add_or_remove", "accountant": "RDP"}
    metrics = {"privacy/epsilon": 1.25, "privacy/signal_to_noise": 0.5}
    private = {"privacy": privacy, "seconds": None, "metrics": metrics, "baselines": {}}
    interface.data = RUN | private | {"communication": {"upload_bytes": None, "download_bytes": None}}
    assert main(["train", "heart.yaml"]) == 0
    out = capfd.readouterr().out
    assert "losses, test results, traffic, times" in out and "epsilon 1.25" in out
    assert "all clients pooled" not in out and "communication" not in out
    interface.data = RUN | private  # where examples alone are protected, bytes are told
    assert main(["train", "heart.yaml"]) == 0
    out = capfd.readouterr().out
    assert "losses, test results, times" in out and "communication   8.4 kB up" in out


def test_who_was_left_out_is_named(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    privacy = {"epsilon": 1.25, "delta": 1e-5, "unit": "example", "neighbouring": "zero_out", "accountant": "RDP"}
    told = {"clients": {"va": 1.0, "cleveland": 1.25}, "left_out": {"va": 3}, "demonstration": False}
    interface.data = RUN | {"privacy": privacy | told, "metrics": {"privacy/example/epsilon": 1.25}}
    assert main(["train", "heart.yaml"]) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "the largest of any client: va 1.000, cleveland 1.250" in out and "demonstration" not in out
    assert "left out va (3 rounds): their budgets are spent" in out


@pytest.mark.parametrize("command", ["up", "ui"])
def test_the_stack_says_where_its_pages_are(
    command: str, interface: FakeInterface, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        f"fedrounds.deployments.stack.up.{command}", lambda say: say("Prefect   http://127.0.0.1:24680")
    )
    assert main([command]) == 0
    assert capfd.readouterr().out == "Prefect   http://127.0.0.1:24680\nStopped.\n"


def test_numbers_that_json_lacks_become_null(interface: FakeInterface, capfd: pytest.CaptureFixture[str]) -> None:
    interface.data = RUN | {"metrics": {"train/loss": float("nan"), "eval/loss": float("inf")}}
    assert main(["train", "heart.yaml", "--json"]) == 0
    metrics = one_object(capfd.readouterr().out)["data"]["metrics"]
    assert metrics == {"train/loss": None, "eval/loss": None}


@pytest.mark.parametrize("line", ["train heart.yaml", "resume", "up", "ui", "deploy heart.yaml"])
def test_a_server_command_on_a_base_install_names_the_extra(
    line: str, interface: FakeInterface, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedrounds.deployments.cli.parameters.find_spec", lambda name: None)
    assert main([*line.split(), "--json"]) == 3
    error = one_object(capfd.readouterr().out)["error"]
    assert error["code"] == "not_installed"
    assert "fedrounds[server]" in error["hint"]
    assert interface.calls == []
    assert main(["runs"]) == 0


def test_an_error_before_a_run_began_leaves_nothing_else(
    interface: FakeInterface, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(config, **_):  # type: ignore[no-untyped-def]
        raise ConfigError("rounds is 0")

    interface.train = refuse  # type: ignore[method-assign]
    assert main(["train", "heart.yaml"]) == 2
    assert capfd.readouterr() == ("", "Error: rounds is 0\n")
