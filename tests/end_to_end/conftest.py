"""Each test has a home of its own, and the console script in it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support import Fedrounds, run_fedrounds


@pytest.fixture
def home(warm_home: Path) -> Path:
    return warm_home


@pytest.fixture
def fedrounds(home: Path) -> Fedrounds:
    """Runs the console script in the test's home."""
    return partial(run_fedrounds, home)
