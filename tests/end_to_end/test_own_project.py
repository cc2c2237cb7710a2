"""A project with its own `flows/`, `tasks/` and `deployments/` packages trains from a flow of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedrounds.fl_components.store import Store
from tests.support import HEART, clean_environment, prefect, start_fedrounds, wait_until

pytestmark = [pytest.mark.ci, pytest.mark.timeout(600)]

FILES = {
    "flows/__init__.py": "",
    "flows/nightly.py": """
from prefect import flow

from fedrounds import train
from tasks.report import headline


@flow
def nightly(config: str, rounds: int) -> str:
    return headline(train(config, overrides=["name=ward", f"rounds={rounds}"]))
""",
    "tasks/__init__.py": "",
    "tasks/report.py": """
from prefect import task


@task
def headline(data: dict) -> str:
    return f"{data['state']} after {data['rounds']} rounds"
""",
    "deployments/__init__.py": "",
    "deployments/deploy.py": """
import sys
from pathlib import Path

from flows.nightly import nightly

folder = str(Path(__file__).parents[1])
deployed = nightly.from_source(source=folder, entrypoint="flows/nightly.py:nightly")
print(deployed.deploy(name="nightly", work_pool_name="fedrounds", ignore_warnings=True, print_next_steps=False))
""",
}


@pytest.fixture
def api_url(home: Path) -> Iterator[str]:
    """The API of the local stack, with its worker."""
    process = start_fedrounds(home, "up")
    log = home.parent / "fedrounds.log"
    try:
        wait_until(lambda: "Ctrl-C" in log.read_text(), "the stack is up", deadline_s=240)
        (address,) = re.findall(r"PREFECT_API_URL=(\S+)", log.read_text())
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_projects_own_flow_trains_by_hand_and_as_a_deployment(home: Path, project: Path, api_url: str) -> None:
    def python(*arguments: str) -> str:
        environment = clean_environment(home) | {"PREFECT_API_URL": api_url, "PYTHONPATH": str(project)}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    by_hand = f"from flows.nightly import nightly; print(nightly({str(HEART)!r}, 2))"
    assert python("-c", by_hand) == "Completed after 2 rounds"

    deployment_id = python("deployments/deploy.py")
    body = {"parameters": {"config": str(HEART), "rounds": 3}, "state": {"type": "SCHEDULED"}}
    flow_run_id = prefect(api_url, f"/deployments/{deployment_id}/create_flow_run", body)["id"]
    ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    wait_until(
        lambda: prefect(api_url, f"/flow_runs/{flow_run_id}")["state"]["type"] in ended,
        "the deployment's flow run has ended",
        deadline_s=240,
    )
    assert prefect(api_url, f"/flow_runs/{flow_run_id}")["state"]["type"] == "COMPLETED"
    with Store.open(home) as store:
        newest, first = store.runs(name="ward")
    assert [(run.state.value, run.committed_round) for run in (first, newest)] == [("Completed", 2), ("Completed", 3)]
