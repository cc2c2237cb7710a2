"""Trainings that are killed: in forked processes that share their imports, and as the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGURES = ("PREFECT_", "MLFLOW_", "FEDROUNDS_")

# So that importing starts no thread, and the driver can fork.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment, in which nothing is configured but `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CONFIGURES)}
    return kept | {"PYTHONPATH": str(ROOT)} | variables


Cases = dict[str, dict[str, Any]]


@pytest.fixture
def run_cases(tmp_path: Path) -> Callable[..., Cases]:
    """Runs processes.py; what it told of each case, by the case's name."""

    def run(*arguments: str) -> Cases:
        folder = tmp_path / "stores"
        folder.mkdir()
        found = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "faults" / "processes.py"), arguments[0], str(folder), *arguments[1:]],
            env=clean_environment(PREFECT_HOME=str(tmp_path / "prefect"), **ONE_THREAD),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, found.stderr
        cases = [json.loads(line) for line in found.stdout.splitlines()]
        return {each.pop("case"): each for each in cases}

    return run
