"""No privacy claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fl_components.rules import Rule


@dataclass(frozen=True, slots=True)
class PrivacySpend:
    """An epsilon with all that gives it a meaning. All fields are None where nothing is claimed."""

    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    neighbouring: str | None = None
    accountant: str | None = None


class NoPrivacy(Rule):
    """Nothing is claimed: the ledger records for each round that nothing was paid for.

    >>> NoPrivacy().event()
    {'kind': 'none'}
    """

    kind: Literal["none"] = "none"

    def event(self) -> Mapping[str, Any]:
        return {"kind": "none"}

    def spend(self, rounds: int) -> PrivacySpend:
        return PrivacySpend()
