"""What every privacy rule says, and what an epsilon is made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedrounds.fl_components.arrays import Tensors
from fedrounds.fl_components.privacy.events import Event, Neighbouring
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.values import Sampling


@dataclass(frozen=True, slots=True)
class PrivacySpend:
    """An epsilon with all that gives it a meaning. All fields are None where nothing is claimed."""

    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    neighbouring: str | None = None
    accountant: str | None = None


class PrivacyRule(Rule):
    """What is promised about the clients' data, and what a round of it costs."""

    kind: str
    claims: ClassVar[bool]
    """Whether anything is promised: then every value that leaves the trusted side is public, paid for, or withheld."""

    def init(self) -> Tensors:
        """The state before the first round of what clips; `norm` in it, float64 [1], is the clipping norm."""
        return {}

    @abstractmethod
    def event(self, sampling: Sampling) -> Event:
        """What one round releases. Raises ValueError, in words for people, where the draw supports no claim."""

    def check(self, expected_cohort_size: float) -> None:
        """Raise ValueError, in words for people, when the rule's own fields do not fit a cohort of this size."""


def neighbouring_of(sampling: Sampling) -> Neighbouring:
    """The relation under which a draw is accounted for.

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
    """The fields of a privacy rule as they were given. Raises ValueError when one of them is a seed."""
    if isinstance(fields, Mapping) and fields.keys() & {"seed", "noise_seed"}:
        raise ValueError(
            f"{field} has no seed for its noise: it is drawn from a secret, since whoever knew the seed could subtract "
            "the noise; leave the field out"
        )
    return fields
