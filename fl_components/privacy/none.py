"""No privacy claim."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedrounds.fl_components.privacy.base import PrivacyRule
from fedrounds.fl_components.privacy.events import Event, NoOpEvent
from fedrounds.fl_components.values import Sampling


class NoPrivacy(PrivacyRule):
    """Nothing is claimed: the ledger records for each round that nothing was paid for."""

    kind: Literal["none"] = "none"
    claims: ClassVar[bool] = False

    def event(self, sampling: Sampling) -> Event:
        return NoOpEvent()
