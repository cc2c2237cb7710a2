"""The fuzzer works, and finds nothing in the first runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, missing


@pytest.mark.slow
def test_frames(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        missing("atheris is not installed: it has no wheel for this Python or this machine")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.frames", "20000"],
        cwd=tmp_path,  # libFuzzer writes what it finds there
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Done 20000 runs" in done.stderr
    assert not list(tmp_path.iterdir())
