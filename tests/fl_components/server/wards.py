"""Nine wards whose data are private, and runs under a claim about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedrounds.fl_components.privacy.events import Gaussian, PoissonSampled
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import BudgetTerms, Store
from fedrounds.fl_components.values import ServerState
from tests.support import PRIVATE

from . import rounds

HERE = __name__
NUM_CLIENTS = 9
FIELDS = PRIVATE | {
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": NUM_CLIENTS}},
    "execution": {"processes": 1, "shard_size": 3},
}
WARDS = {"kind": "function", "path": f"{HERE}:wards", "num_classes": 2}
TERMS = BudgetTerms(
    epsilon=100.0, delta=1e-3, unit="client", neighbouring="add_or_remove", accountant="RDP", demonstration=False
)
EVENT = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1.5))


def wards(
    exchanged: int | None = None, reverse: bool = False, shortened: int | None = None
) -> dict[str, tuple[Any, ...]]:
    """Nine wards with rows of their own; one of them may have entirely other ones, and fewer, or one row alone."""
    found = {}
    for ward in range(NUM_CLIENTS):
        generator = np.random.default_rng(99 if ward == exchanged else ward)
        sizes = (3, 2) if ward == exchanged else (20, 5)
        x_train, x_test = (generator.normal(size=(size, 4)).astype(np.float32) for size in sizes)
        if reverse:
            x_train = x_train[::-1].copy()
        if ward == shortened:
            x_train = x_train[:1]
        found[f"ward-{ward}"] = (x_train, x_train.sum(1) > 0, x_test, x_test.sum(1) > 0)
    return found


def other_wards() -> dict[str, tuple[Any, ...]]:
    return wards(exchanged=4)


def broken_wards() -> dict[str, tuple[Any, ...]]:
    found = wards()
    x_train, y_train, *rest = found["ward-7"]
    found["ward-7"] = (x_train, np.where(np.arange(len(y_train)) == 3, 42, y_train), *rest)
    return found


def renamed_wards(names: dict[str, str]) -> dict[str, tuple[Any, ...]]:
    """The same wards; some under another name."""
    return {names.get(name, name): ward for name, ward in wards().items()}


def redrawn_wards(given_away: int) -> dict[str, tuple[Any, ...]]:
    """Nine wards, each of which has given so many of its training rows to the next one."""
    found = list(wards().values())
    return {
        f"ward-{ward}": (
            *(np.concatenate([before[part][:given_away], mine[part][given_away:]]) for part in (0, 1)),
            *mine[2:],
        )
        for ward, (before, mine) in enumerate(zip([found[-1], *found], found, strict=False))
    }


Begin = Callable[..., Run]


def secret_file(store: Store) -> Path:
    (file,) = (store.home / "secrets" / "runs").iterdir()
    return file


def collect(run: Run, state: ServerState) -> Any:
    plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
    return state, plan, rounds.collect(run, state, plan)


def collected_of(run: Run) -> Any:
    state = stages.load(run, 1)
    _, plan, collected = collect(run, state)
    stages.aggregate(run, plan, state, collected)
    return state, plan, collected
