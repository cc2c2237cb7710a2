"""What a person sees in a browser, taken by the script that makes the pictures of the docs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import HEART, ROOT, Fedrounds, clean_environment, data_of, missing


@pytest.mark.slow
@pytest.mark.browser
def test_prefect_shows_rounds_and_stages_and_mlflow_shows_curves(
    fedrounds: Fedrounds, home: Path, tmp_path: Path
) -> None:
    """The script waits for the rounds, for a round's tasks and for the sections of charts, and fails without them."""
    if shutil.which("chromium") is None:
        missing("Chromium is missing")
    data_of(fedrounds("train", HEART, "--set", "rounds=3", "--run-id", "seen", "--json"))
    script = ROOT / "docs" / "images" / "take_screenshots.py"
    taken = subprocess.run(
        [sys.executable, script, "seen", tmp_path],
        env=clean_environment(home),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert taken.returncode == 0, taken.stderr
    for name in ("prefect-run.png", "prefect-round.png", "mlflow-metrics.png"):
        assert (tmp_path / name).stat().st_size > 30_000  # an empty page has a tenth of that
