"""Runs on a real store, in a home folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import pytest

from fedrounds.fl_components.compression import NoCompression
from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import Store
from tests.fl_components.server import wards
from tests.fl_components.server.wards import Begin

FIELDS: dict[str, Any] = {
    "name": "ward",
    "rounds": 3,
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 9}},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "batch_size": 64, "steps": 2},
    "execution": {"shard_size": 2},
}

StartRun = Callable[..., Run]


class Single(NoCompression):
    """Each update for itself, as where the server must look at single ones."""

    is_identity: ClassVar[bool] = False


def configured(*, single: bool = False, **changes: Any) -> FederationConfig:
    config = parse_config(FIELDS | changes)
    return config.model_copy(update={"compression": Single()}) if single else config


@pytest.fixture
def start_run(store: Store) -> Iterator[StartRun]:
    """Opens a run with changes to FIELDS; whatever is still open is closed after the test."""
    with ExitStack() as stack:

        def opened(run_id: str = "r", **changes: Any) -> Run:
            return stack.enter_context(open_run(store, run_id, config=configured(**changes)))

        yield opened


@pytest.fixture
def open_single(start_run: StartRun) -> StartRun:
    """The same with each update for itself."""
    return partial(start_run, single=True)


@pytest.fixture
def begin(store: Store) -> Iterator[Begin]:
    """Opens a run with changes to wards.FIELDS."""
    with ExitStack() as stack:

        def opened(run_id: str = "r", **changes: Any) -> Run:
            config = parse_config(wards.FIELDS | changes)
            return stack.enter_context(open_run(store, run_id, config=config))

        yield opened
