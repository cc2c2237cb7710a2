"""What the store gives back: one frozen record a row, with the table's column names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import Diverged
from fedrounds.fl_components.run_state import RunState


def is_unfinished(state: RunState, error: Mapping[str, Any] | None) -> bool:
    """Return whether a resume can take the run further.

    >>> is_unfinished(RunState.CANCELLED, {"code": "cancelled"}), is_unfinished(RunState.FAILED, {"code": "diverged"})
    (True, False)
    """
    return not state.is_finished and state != RunState.DELETED and not can_never_continue(state, error)


def can_never_continue(state: RunState, error: Mapping[str, Any] | None) -> bool:
    """Return whether no resume can take the run any further: it has diverged, and a round is a pure function.

    Every other state can be left. A `Cancelled` or `TooFewClients` run is resumed, an exhausted budget raised, and what
    else failed a round (a server, a disk, a user's code) may be repaired.

    >>> can_never_continue(RunState.FAILED, {"code": "diverged"})
    True
    """
    return state == RunState.FAILED and error is not None and error.get("code") == Diverged.code


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run. Times are unix seconds by the database's clock.

    `params_digest` is that of round `committed_round` (0: of the initial parameters), `tracked_round` the last round
    that MLflow has, `prefect_flow_runs` one {"id", "url"} for each attempt that Prefect knows. `secret_id` names the
    secret that a run under a privacy claim draws from, `secret_home` the home folder in which it was created.
    """

    run_id: str
    name: str
    population: str
    state: RunState
    rounds: int
    committed_round: int
    config: dict[str, Any]
    config_digest: str
    params_digest: str
    ancestor: str | None
    engine: dict[str, Any]
    source_folder: str
    attempt: int
    error: dict[str, Any] | None
    created_at: float
    updated_at: float
    initial_state_key: str
    mlflow_run_id: str | None
    tracked_round: int
    model_uri: str | None
    prefect_flow_runs: list[dict[str, Any]]
    sweep_id: str | None
    secret_id: str | None = None
    secret_home: str | None = None


Events: TypeAlias = "Mapping[str, int]"
"""How often each event was reserved or spent; an event is its canonical JSON text."""

Guard: TypeAlias = "Callable[[Budget, Events, Events], None]"
"""Decides whether an account may be charged. It gets the account's budget, and what all runs and this run will have
spent of it with the charge; it raises `BudgetExhausted` to refuse."""


@dataclass(frozen=True, slots=True)
class BudgetTerms:
    """What an account may spend, and what the number means.

    Args:
      epsilon: the limit for all its runs together; None where there is none.
      delta: the delta at which epsilon is computed.
      unit: whose data are protected: "client" or "example".
      neighbouring: the relation, as fedrounds.fl_components.privacy names it.
      accountant: how events become an epsilon.
      demonstration: its data are public, so that the claim protects nobody.
    """

    epsilon: float | None
    delta: float
    unit: str
    neighbouring: str
    accountant: str
    demonstration: bool


@dataclass(frozen=True, slots=True)
class Budget(BudgetTerms):
    """An account's terms and what is reserved or spent of them: {event as canonical JSON: how often}."""

    account: Account
    spent: Mapping[str, int]
    set_at: float

    @property
    def terms(self) -> BudgetTerms:
        return BudgetTerms(*(getattr(self, each.name) for each in fields(BudgetTerms)))


@dataclass(frozen=True, slots=True)
class Charges:
    """What a round costs under one claim.

    Args:
      events: the event that each account is charged.
      guard: decides for each account. An account that it refuses is not charged, and takes no part in the round.
      least: how many accounts must be able to pay, or the round is refused.
    """

    events: Mapping[Account, dict[str, Any]]
    guard: Guard
    least: int = 1


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """A grid of runs that vary some fields of one configuration.

    `config` is what all cells share, as it was written; `over` has a field and its values for each axis.

    >>> over = [["seed", [1, 2]], ["training.learning_rate", [0.1, 0.3]]]
    >>> sweep = SweepRecord("s", name="digits", config={}, over=over, source_folder="/src", created_at=0.0)
    >>> list(sweep.cells), sweep.cells["s-003"]
    (['s-001', 's-002', 's-003', 's-004'], {'seed': 2, 'training.learning_rate': 0.1})
    """

    sweep_id: str
    name: str
    config: dict[str, Any]
    over: list[tuple[str, list[Any]]]
    source_folder: str
    created_at: float

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """For each cell the id of its run and the values of the fields that vary: the last axis varies fastest."""
        fields = [field for field, _ in self.over]
        grid = itertools.product(*(values for _, values in self.over))
        return {
            f"{self.sweep_id}-{number:03d}": dict(zip(fields, values, strict=True))
            for number, values in enumerate(grid, 1)
        }


def cell_name(values: Mapping[str, Any]) -> str:
    """What a cell of a sweep is called.

    >>> cell_name({"training.learning_rate": 0.1, "model.hidden": [64, 32], "server_optimizer.kind": "fedadam"})
    'training.learning_rate=0.1, model.hidden=[64, 32], server_optimizer.kind=fedadam'
    """
    return ", ".join(
        f"{field}={value if isinstance(value, str) else json.dumps(value)}" for field, value in values.items()
    )


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A committed round. `state_key` is None once its state has been pruned; `withheld` is in no view."""

    run_id: str
    round: int
    collection: int
    params_digest: str
    state_key: str | None
    result: dict[str, Any]
    withheld: dict[str, Any]
    committed_at: float


@dataclass(frozen=True, slots=True)
class CollectionRecord:
    """A reservation: a round's updates may be collected once for it.

    `state` is "reserved" until the round commits, then "spent". A "voided" collection costs nothing.
    """

    run_id: str
    round: int
    collection: int
    state: str
    reserved_at: float
    settled_at: float | None


@dataclass(frozen=True, slots=True)
class ChargeRecord(CollectionRecord):
    """A line of an account's ledger: what a collection costs it. It counts unless the collection is voided."""

    account: Account
    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seal:
    """What a round admitted, made durable before noise is drawn."""

    collection: int
    data: bytes


@dataclass(frozen=True, slots=True)
class JournalRow:
    """A line of the journal.

    `hash` covers the fields before it, `previous` is the hash of the row before, `signature` is that of the hash by the
    key `key_id`.
    """

    sequence: int
    at: float
    run_id: str | None
    kind: str
    content: dict[str, Any]
    previous: str
    hash: str
    key_id: str
    signature: str


@dataclass(frozen=True, slots=True)
class Anchor:
    """What was remembered of a journal outside its database.

    That row `rows` had the hash `head`, and where it stands.
    """

    rows: int
    head: str
    where: str


@dataclass(frozen=True, slots=True)
class Sighting:
    """What something outside the database shows of a run.

    Its last committed round, and an anchor where there is one.
    """

    where: str
    round: int = 0
    anchor: Anchor | None = None


@dataclass(frozen=True, slots=True)
class JournalReport:
    """A journal that verified: how many rows, and the hash of the last (for an anchor outside the store)."""

    rows: int
    head: str
