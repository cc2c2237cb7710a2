"""What goes wrong around a training: each is said in one sentence, nothing is lost, and a resume ends as planned."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.store.keys import KeyRing
from tests.support import missing

Stack = Any  # conftest.py's
FEDERATION = str(Path(__file__).with_name("federation.yaml"))
ROUNDS = 12
TRAIN = ("train", FEDERATION, "--set", f"rounds={ROUNDS}", "--run-id")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def committed(stack: Stack, command: Any, run_id: str, round: int) -> None:
    """Waits until the run has committed that round."""
    with stack.store() as store:
        stack.wait(
            command,
            lambda: (run := store.find_run(run_id)) is not None and run.committed_round >= round,
            f"round {round} is committed",
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MiB, of which Prefect's pages take 17."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        missing("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("on_it", ["the store", "the home"])
def test_a_disk_that_fills_up(
    on_it: str, small_disk: Path, stack: Stack, undisturbed: Callable[[int], str], tmp_path: Path
) -> None:
    """The store's alone, or with it also Prefect's server and MLflow."""
    places = {}
    if on_it == "the store":
        places["FEDROUNDS_DATABASE_URL"] = f"sqlite:///{small_disk}/fedrounds.db"
        places["FEDROUNDS_BLOBS_URL"] = f"{small_disk}/blobs"
    small = type(stack)(tmp_path, home=small_disk)
    elsewhere = {} if on_it == "the home" else {"home": stack.home, "variables": places}
    try:
        command = small.start(*TRAIN, "full", **elsewhere)
        committed(small, command, "full", 2)
        with open(small_disk / "filler", "wb", buffering=0) as filler:
            while command.running:
                try:
                    filler.write(b"x" * 4096)
                except OSError:
                    time.sleep(0.001)  # what the training deletes is filled as well
        error = command.end(1)
        assert error["code"] in (
            "store",
            "run_failed",
        )  # the latter when Prefect's server was the first to find no space
        if error["code"] == "store":
            assert re.fullmatch(r"the disk that holds \S+ is full", error["message"])
        assert "resume" in error["hint"]
        assert "Traceback" not in command.words
        with small.store() as store:
            assert 2 <= store.run("full").committed_round < ROUNDS
        (small_disk / "filler").unlink()
        data = small.start("resume", "full", **elsewhere).end(0)
        assert (data["state"], data["params_digest"]) == ("Completed", undisturbed(ROUNDS))
        with small.store() as store:
            assert [each.round for each in store.rounds("full")] == list(range(1, ROUNDS + 1))
            if elsewhere:  # the hub of the other home has signed it
                store.keys.trust(KeyRing(stack.home / "secrets").signing.public.hex())
            store.verify_journal()
    finally:
        small.close()


def test_two_processes_on_one_run(stack: Stack) -> None:
    first = stack.start("train", FEDERATION, "--set", "rounds=1000", "--run-id", "contended")
    committed(stack, first, "contended", 1)
    error = stack.start("resume", "contended").end(1)
    assert error["code"] == "lease_held"
    assert f"process {first.pid} " in error["message"]
    with stack.store() as store:
        round = store.run("contended").committed_round
        committed(stack, first, "contended", round + 1)  # the first goes on undisturbed
        first.kill()
        run = store.run("contended")
        assert (run.state, run.attempt) == ("Running", 1)


def test_a_configuration_edited_between_attempts(stack: Stack, undisturbed: Callable[[int], str]) -> None:
    first = stack.start(*TRAIN, "edited")
    committed(stack, first, "edited", 1)
    first.kill()
    error = stack.start(*TRAIN, "edited", "--set", "training.momentum=0.5").end(2)
    assert error["code"] == "run_conflict"
    assert "training.momentum (0.9, now 0.5)" in error["message"]
    assert stack.start(*TRAIN, "edited").end(0)["params_digest"] == undisturbed(ROUNDS)


def test_a_home_that_cannot_be_written(stack: Stack, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    home.chmod(0o555)
    as_others: list[str] = []
    if os.geteuid() == 0:  # whom permissions stop only without this capability
        if shutil.which("setpriv") is None:
            missing("root needs setpriv to be stopped by permissions")
        as_others = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
    command = stack.start("train", FEDERATION, home=home, before=as_others)
    error = command.end(1)
    assert error["code"] == "store"
    assert f"{home}" in error["message"]
    assert "FEDROUNDS_HOME" in error["hint"]
    assert "Traceback" not in command.words


def start_mlflow(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    options = {
        "--host": "127.0.0.1",
        "--port": uri.rpartition(":")[2],
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination": f"{folder}/artifacts",
    }
    with open(folder / "mlflow.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)],
            cwd=folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,  # it starts further processes, which are to end with it
        )
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            return server
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "mlflow.log").read_text()
            time.sleep(0.1)


def test_mlflow_that_is_away_gets_everything_later(
    stack: Stack, undisturbed: Callable[[int], str], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = stack.start(*TRAIN, "untracked", variables={"MLFLOW_TRACKING_URI": uri})
    data = command.end(0)
    assert (data["state"], data["params_digest"], data["mlflow_run_id"]) == ("Completed", undisturbed(ROUNDS), None)
    assert f"MLflow lacks {ROUNDS} rounds of this run" in command.words
    assert "fedrounds resume untracked" in command.words

    server = start_mlflow(tmp_path, uri)
    try:
        data = stack.start("resume", "untracked", variables={"MLFLOW_TRACKING_URI": uri}).end(0)
        from fedrounds.tasks.tracking import server as tracking

        client = tracking.connect(uri)
        shown = client.get_run(data["mlflow_run_id"])
        assert shown.info.status == "FINISHED"
        for key in shown.data.metrics:
            steps = [each.step for each in client.get_metric_history(shown.info.run_id, key)]
            assert steps == list(range(1, ROUNDS + 1)), key
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
