"""The page of a run in Prefect follows its rounds, and its trouble stays its own."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Store
from fedrounds.flows.prefect_runs import flow_run_log
from fedrounds.tasks.progress import Progress
from fedrounds.tasks.session import Session, session
from fedrounds.tasks.views import RunArtifact

pytestmark = pytest.mark.filterwarnings("ignore:Artifact creation outside of a flow")
ARTIFACT_ID = "0193f7a2-7c1e-7d52-9b1c-5a1d3c2b4e6f"
CONFIG = {
    "name": "digits",
    "rounds": 3,
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 2}},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "batch_size": 10, "epochs": 1},
    "selection": {"kind": "uniform", "cohort_size": 2},
}


class PrefectApi(ThreadingHTTPServer):
    """What a page needs of Prefect's API. It answers 500 to the next `failures` updates, and keeps the others."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.failures, self.failed = 0, 0
        self.pages: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: PrefectApi

    def do_POST(self) -> None:
        self._answer(201, json.dumps({"id": ARTIFACT_ID, **self._body()}))

    def do_PATCH(self) -> None:
        page = self._body()["data"]
        if self.server.failures > 0:
            self.server.failures -= 1
            self.server.failed += 1
            self._answer(500, "{}")
        else:
            self.server.pages.append(page)
            self._answer(204, "")

    def do_GET(self) -> None:  # a token against CSRF, which the client does without
        self._answer(404, "{}")

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        return body

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def api() -> Iterator[PrefectApi]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with PrefectApi() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
                yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def running(home: Path, said: list[str]) -> Iterator[Session]:
    def listen(news: Progress) -> None:
        said.append(news.text)

    Store.open(home).close()
    with session("r1", CONFIG, listener=listen) as running:
        yield running


def commit(running: Session, round: int) -> None:
    lease, metrics = running.run.lease, {"eval/accuracy": 0.5 + round / 100}
    lease.reserve(round)
    lease.commit(round, state=b"%d" % round, params_digest="d", result={"metrics": metrics})


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_the_page_follows_the_rounds(api: PrefectApi, running: Session, said: list[str]) -> None:
    artifact = RunArtifact(running)
    commit(running, 1)
    artifact.wake()
    wait_until(lambda: api.pages)
    assert "**1 of 3 rounds** committed" in api.pages[-1]
    assert "| round | accuracy |\n|---:|---:|\n| 1 | 0.5100 |" in api.pages[-1]  # no column without a value
    commit(running, 2)
    artifact.close()  # without a poke: the last page is never behind
    assert "**2 of 3 rounds** committed" in api.pages[-1]
    assert said == []


def test_the_page_says_who_was_left_out_and_how_the_run_ended(api: PrefectApi, running: Session) -> None:
    lease = running.run.lease
    for round in (1, 2):
        lease.reserve(round)
        result = {"metrics": {"privacy/example/epsilon": 0.5 * round, "time/round_s": 1.0}, "left_out": ["va"]}
        lease.commit(round, state=b"%d" % round, params_digest="d", result=result)
    lease.finish(
        RunState.BUDGET_EXHAUSTED, error={"code": "budget_exhausted", "message": "nothing is left", "hint": None}
    )
    RunArtifact(running).close()
    page = api.pages[-1]
    assert "**BudgetExhausted**: nothing is left." in page
    assert "their budgets are spent: va (2 rounds)." in page
    assert "| round | epsilon | seconds |" in page and "that of the client that has spent most" in page


def test_the_log_of_a_round_has_its_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(logging.getLogger("fedrounds"), "handlers", [logging.NullHandler()])
    listen = flow_run_log(uuid4())
    monkeypatch.setattr(logging.getLogger("fedrounds"), "info", lambda text, **_: heard.append(text))
    metrics = {"eval/accuracy": 0.5, "privacy/example/epsilon": 0.6681234}
    listen(Progress("round", round=2, rounds=3, metrics=metrics))
    assert heard == ["round 2 of 3: eval/accuracy 0.5000, privacy/example/epsilon 0.6681"]


def test_an_update_that_fails_is_made_good(api: PrefectApi, running: Session, said: list[str]) -> None:
    artifact = RunArtifact(running)
    api.failures = 1
    commit(running, 1)
    artifact.wake()
    wait_until(lambda: api.failed)
    artifact.close()
    assert "**1 of 3 rounds** committed" in api.pages[-1]
    assert said == []


def test_a_page_that_cannot_be_written_is_told_once(api: PrefectApi, running: Session, said: list[str]) -> None:
    artifact = RunArtifact(running)
    api.failures = 1000
    commit(running, 1)
    artifact.wake()
    wait_until(lambda: api.failed)
    artifact.close()
    assert said == ["the page of this run in Prefect could not be brought up to date"]
