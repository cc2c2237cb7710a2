"""The functions behind the commands, called from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import HEART, clean_environment

# What a person types in a notebook, where an event loop is running.
NOTEBOOK = """
import asyncio, json, sys
from fedrounds.deployments.api import resume, runs, show, train
from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.errors import RunConflict

async def cell():
    events = []
    data = train(load_config(sys.argv[1], ["rounds=2"]), run_id="r", on_progress=events.append)
    again = train(sys.argv[1], overrides=["rounds=2"], run_id="r")
    try:
        train(sys.argv[1], overrides=["rounds=3"], run_id="r")
    except RunConflict as conflict:
        refused = conflict.message
    return {
        "data": data, "again": again, "refused": refused, "runs": runs(), "shown": show("r"),
        "news": [[event.kind, event.round] for event in events if event.kind in ("run", "round", "end")],
        "stages": sorted({event.stage for event in events if event.kind == "stage"}),
    }

print(json.dumps(asyncio.run(cell())))
"""


@pytest.mark.ci
def test_a_notebook_trains_resumes_and_shows(home: Path, tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(HEART)],
        env=clean_environment(home), cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    seen = json.loads(answer.stdout)
    assert seen["data"]["state"] == "Completed"
    assert seen["news"] == [["run", 0], ["round", 1], ["round", 2], ["end", 0]]
    assert {"load", "train", "aggregate", "commit"} <= set(seen["stages"])
    assert (seen["again"]["params_digest"], seen["again"]["attempt"]) == (seen["data"]["params_digest"], 1)
    assert "rounds (2, now 3)" in seen["refused"]
    assert [run["run_id"] for run in seen["runs"]] == ["r"]
    assert [entry["round"] for entry in seen["shown"]["history"]] == [1, 2]
