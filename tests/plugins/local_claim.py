"""A third privacy claim in one file: clients in the local model, each with a budget of its own.

It is a plug-in (entry point `fedrounds.privacy`). It states and pays for noise that the clients add to what they send.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.privacy.claim import Claim, ClaimContext, ClaimRound, StatementFacts, Trust, Unit
from fedrounds.fl_components.privacy.events import Event, Gaussian, Neighbouring
from fedrounds.fl_components.values import Sampling


class LocalPrivacy(Claim):
    """All that a client holds is protected against everybody else, the server included."""

    kind: Literal["local"] = "local"
    unit: ClassVar[Unit] = "client"
    trust: ClassVar[Trust] = "client"
    noise_multiplier: float = Field(gt=0)

    def neighbouring(self, sampling: Sampling) -> Neighbouring:
        return "zero_out"

    def charges(self, round: ClaimRound) -> Mapping[Account, Event]:
        event = Gaussian(noise_multiplier=self.noise_multiplier)
        return {Account(round.population, client): event for client in round.clients}

    def check(self, context: ClaimContext) -> None:
        if context.error_feedback:
            raise ValueError(
                "privacy.kind is local but compression.error_feedback is true: a client would send what its noise "
                "does not cover; leave compression.error_feedback out"
            )

    def statement_template(self) -> str:
        return """
            about = "About clients"
            protects = "a client: all that one client holds, against everybody else"
            neighbours = "with one client's update exchanged for zero"
            mechanism = "each client adds Gaussian noise of {noise_multiplier} times the clipping norm to its update"
            sampling = "every client that takes part pays for the round"
            releases = "each client's update in each round"
            withheld = "training loss"
            not_covered = ["what a client's own machine shows of it"]
        """

    def statement_values(self, facts: StatementFacts) -> Mapping[str, Any]:
        return {"noise_multiplier": f"{self.noise_multiplier:g}"}
