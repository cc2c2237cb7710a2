"""Homes for whole trainings: their databases are made once, which takes 20 s, and copied."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.support import Fedrounds, make_template_home, run_fedrounds


@pytest.fixture(scope="session")
def template_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which nothing has run yet, one for all workers of a test session."""
    shared = tmp_path_factory.getbasetemp()
    return make_template_home((shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "template")


@pytest.fixture
def home(template_home: Path, tmp_path: Path) -> Path:
    """A home of the test's own, ready to use."""
    return Path(shutil.copytree(template_home, tmp_path / "home", symlinks=True))


@pytest.fixture
def fedrounds(home: Path) -> Fedrounds:
    """Runs the console script in the test's home."""
    return partial(run_fedrounds, home)
