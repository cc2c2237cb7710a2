"""The benchmark of a round's orchestration still runs, and prints what docs/benchmarks.md shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "orchestration.py"


@pytest.mark.slow
def test_the_orchestration_benchmark_prints_its_table() -> None:
    command = [sys.executable, BENCHMARK, "--rounds", "4", "--block", "2", "--sizes", "small"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in ("bare", "fedrounds"):
        found = re.search(rf"^{line}, small +(\d+) +(\d+) +(\d+)   (\d+) (\d+)$", done.stdout, re.M)
        assert found is not None, done.stdout
        assert all(int(milliseconds) > 0 for milliseconds in found.groups())
    assert "times Prefect alone (target 1.3)" in done.stdout
