"""What a configuration promises about the clients' data, and what a round of that costs.

A claim is one file: a rule that says what it protects (`unit`), who is trusted (`trust`), which accounts a round
charges (`charges`), which configurations it holds for (`check`), and how the privacy statement words it
(`statement_template`). Everything else follows from these: budgets, the ledger, the guard, what views withhold, the
report and the statement are the same for all claims.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.arrays import Tensors
from fedrounds.fl_components.privacy.events import Event, Neighbouring
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.values import Sampling

Unit = Literal["client", "example"]
"""Whose data are protected: all that a client holds, or each of its examples."""

Trust = Literal["server", "client"]
"""Who adds the noise, and is trusted with data that have none: the server, or each client with its own data alone."""


class PrivacyRule(Rule):
    """Base of the rules of `privacy` and `training.privacy`."""

    kind: str
    claims: ClassVar[bool]
    """Whether anything is promised: then every value that leaves the trusted side is public, paid for, or withheld."""

    def init(self) -> Tensors:
        """Return the state before the first round of what clips; `norm` in it, float64 [1], is the clipping norm."""
        return {}

    def check(self, context: ClaimContext) -> None:
        """Raise ValueError, with a sentence for people, where the rest of the configuration does not allow the rule."""


class NoPrivacy(PrivacyRule):
    """Nothing is claimed, and nothing is charged."""

    kind: Literal["none"] = "none"
    claims: ClassVar[bool] = False


class Claim(PrivacyRule):
    """Base of the claims: differential privacy for a unit, against everybody but those who are trusted.

    Args:
      delta: the delta at which epsilon is stated. Above one over the number of units that an account stands for, it
        says little.
    """

    claims: ClassVar[bool] = True
    unit: ClassVar[Unit]
    trust: ClassVar[Trust]
    delta: float = Field(default=1e-5, gt=0, lt=1)

    @abstractmethod
    def neighbouring(self, sampling: Sampling) -> Neighbouring:
        """Return the relation under which the claim is accounted for, where the cohort is drawn like this."""

    @abstractmethod
    def charges(self, round: ClaimRound) -> Mapping[Account, Event]:
        """Return the event that each account is charged for a round."""

    def account(self, population: str) -> Account:
        """Return the account that holds the terms of the claim: the population's, or the template of its clients'.

        A client that trusts nobody else is charged itself, since what it sends is what it pays for.
        """
        account = Account(population)
        return account.template if self.trust == "client" else account

    @property
    def is_charged(self) -> bool:
        """Whether rounds are paid for. What is only simulated is not."""
        return True

    @property
    def limit(self) -> float | None:
        """The epsilon that one run may spend of an account, within the account's budget; None for no such limit."""
        return None

    @property
    def skips_exhausted(self) -> bool:
        """Whether a round is made without the clients whose budgets are spent, as long as enough others can pay."""
        return False

    def statement_template(self) -> str:
        """Return the wording of the claim: a TOML document with the fields of `Wording` (reports/statement.py).

        By default it is the file KIND.toml beside the module of the claim. A text may name values in braces: those of
        `statement_values`.
        """
        package = sys.modules[type(self).__module__].__package__ or ""
        return files(package).joinpath(f"{self.kind}.toml").read_text(encoding="utf-8")

    def statement_values(self, facts: StatementFacts) -> Mapping[str, Any]:
        """Return the values that the wording names."""
        return {}


@dataclass(frozen=True, slots=True)
class ClaimRound:
    """What the price of a round depends on.

    Args:
      population: the name of the population that the clients belong to.
      sampling: how the cohort is drawn.
      clients: the number of training examples of each client that may be charged, by id.
      steps: the local steps of each client, where it draws the batches of a claim; else 0.
      rounds: how many rounds the run has.
    """

    population: str
    sampling: Sampling
    clients: Mapping[str, int]
    steps: int
    rounds: int


@dataclass(frozen=True, slots=True)
class ClaimContext:
    """What the laws of a claim concern in a configuration. A value that does not matter may be left at its default.

    Args:
      num_clients: None where it is not known before the data are loaded.
      sampling: how a cohort is drawn, of many clients where their number is not known.
      aggregation: the kind of the aggregation rule.
      is_sum: whether that adds updates up.
      max_weight: the largest weight of an update in the sum; None where it has no bound.
      error_feedback: whether clients keep what compression leaves out of their updates.
      min_updates: the number of updates that a round must have, where it is given.
      max_update_norm: the norm above which an update is rejected, where it is given.
      private_statistics: the field of the data by which inputs depend on other examples of their client, if any.
      withholds_cohort: whether who is selected must not be shown.
      other_kind: the kind of the other claim; "none" without one.
    """

    num_clients: int | None
    sampling: Sampling
    aggregation: str = "mean"
    is_sum: bool = True
    max_weight: float | None = 1.0
    error_feedback: bool = False
    min_updates: int | None = None
    max_update_norm: float | None = None
    private_statistics: str | None = None
    withholds_cohort: bool = False
    other_kind: str = "none"


@dataclass(frozen=True, slots=True)
class StatementFacts:
    """What the wording of a claim may depend on besides its own fields.

    Args:
      rounds, steps: of the run, and the local steps of a client in a round (0 where the claim draws no batches).
      equal_weights: whether all updates have the same weight in the sum.
      public_metrics: those of all test examples together, where these are declared public.
      grad_sampler: how gradients of single examples are computed, where they are.
    """

    rounds: int
    steps: int
    equal_weights: bool
    public_metrics: tuple[str, ...]
    grad_sampler: str | None


def neighbouring_of(sampling: Sampling) -> Neighbouring:
    """Return the relation under which a draw of clients is accounted for.

    Each is the one that its amplification theorem is proved for, and under which the size of the cohort gives nothing
    away: a coin for each client hides whether it is there at all; a cohort of a fixed size does not, so clients are
    replaced; where all take part, one contributes something or zero.
    """
    relations: dict[str, Neighbouring] = {
        "poisson": "add_or_remove",
        "fixed_size": "replace_one",
        "everyone": "zero_out",
    }
    return relations[sampling.kind]


def no_seed(field: str, fields: Any) -> Any:
    """Return the fields of a privacy rule as they were given. Raises ValueError when one of them is a seed."""
    if isinstance(fields, Mapping) and fields.keys() & {"seed", "noise_seed"}:
        raise ValueError(
            f"{field} has no seed for its noise: it is drawn from a secret, since whoever knew the seed could subtract "
            "the noise; leave the field out"
        )
    return fields
