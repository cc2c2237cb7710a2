"""Differential privacy of single examples.

The client clips each example's gradient and adds noise to their sum, in each step (DP-SGD; Abadi et al. 2016, "Deep
learning with differential privacy", https://arxiv.org/abs/1607.00133).

It protects one row of a client's data against whoever sees what the client sends, the server included. Batches and
noise come from the client's own secret.
"""

from __future__ import annotations

import bisect
import math
import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.privacy.accountants import rdp_epsilon
from fedrounds.fl_components.privacy.calibration import least_noise
from fedrounds.fl_components.privacy.central import MAX_NOISE, MAX_NORM, MIN_NOISE, MIN_NORM
from fedrounds.fl_components.privacy.claim import (
    Claim,
    ClaimContext,
    ClaimRound,
    NoPrivacy,
    PrivacyRule,
    StatementFacts,
    Trust,
    Unit,
    no_seed,
)
from fedrounds.fl_components.privacy.events import (
    Event,
    Gaussian,
    Neighbouring,
    PoissonSampled,
    SelfComposed,
    TruncatedPoissonSampled,
)
from fedrounds.fl_components.rules import union
from fedrounds.fl_components.values import Sampling

NEIGHBOURING: Final[Neighbouring] = "zero_out"
"""One example contributes something or zero: how many there are is public, since sums are divided by the expected size
of a batch."""


MAX_CHARGED: Final = 1000
"""Clients of a population in which all pay for every round, since who was selected is withheld."""


class ExampleLevel(Claim):
    """DP-SGD. In each step each of the client's examples is in the batch by a coin of its own (Poisson sampling).

    Args:
      noise_multiplier: z: the deviation of the noise on the sum of a step's gradients, in `max_grad_norm`.
      target_epsilon: instead of it: the least noise with which all rounds of the run keep this epsilon at each client,
        if it takes part in all of them.
      max_grad_norm: to which L2 norm each example's gradient is clipped.
      sampling_rate: q: the probability with which an example is in a batch. An epoch is 1 / q steps.
      max_batch_size: batches that come out larger are cut to a random part of this size, which bounds a step's memory
        and time, and is accounted for. By default large batches are worked through piece by piece.
      min_examples: a client with fewer has too few to hide one among.
      delta: the delta at which epsilon is stated. Make it smaller than one over the number of a client's examples.
      on_exhausted: what a run does about a client whose budget is spent: "skip_client" or "stop_run".
    """

    kind: Literal["example_level"] = "example_level"
    unit: ClassVar[Unit] = "example"
    trust: ClassVar[Trust] = "client"
    noise_multiplier: float | None = Field(default=None, ge=MIN_NOISE, le=MAX_NOISE)
    target_epsilon: float | None = Field(default=None, gt=0)
    max_grad_norm: float = Field(ge=MIN_NORM, le=MAX_NORM)
    sampling_rate: float = Field(gt=0, le=1)
    max_batch_size: int | None = Field(default=None, ge=1)
    min_examples: int = Field(default=1, ge=1)
    on_exhausted: Literal["skip_client", "stop_run"] = "skip_client"

    @model_validator(mode="before")
    @classmethod
    def _no_seed(cls, fields: Any) -> Any:
        return no_seed("training.privacy", fields)

    @model_validator(mode="after")
    def _noise_or_epsilon(self) -> ExampleLevel:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            found = "neither is given" if self.noise_multiplier is None else "both are given"
            raise ValueError(
                f"training.privacy.noise_multiplier and training.privacy.target_epsilon: {found}; give one of them"
            )
        if self.max_batch_size is not None and self.target_epsilon is not None:
            raise ValueError(
                "training.privacy.max_batch_size and training.privacy.target_epsilon are both given: what cutting "
                "batches costs depends on each client's rows; give training.privacy.noise_multiplier instead "
                "(`fedrounds privacy plan --example-level` finds it)"
            )
        return self

    def steps(self, epochs: int) -> int:
        """How many steps make so many passes over the examples, as far as the expected size of a batch goes.

        >>> ExampleLevel(noise_multiplier=1.0, max_grad_norm=1.0, sampling_rate=0.3).steps(2)
        7
        """
        return math.ceil(epochs / self.sampling_rate * (1 - 1e-12))

    @property
    def skips_exhausted(self) -> bool:
        return self.on_exhausted == "skip_client"

    def neighbouring(self, sampling: Sampling) -> Neighbouring:
        return NEIGHBOURING

    def charges(self, round: ClaimRound) -> Mapping[Account, Event]:
        noise = self.noise(round.rounds * round.steps)
        return {
            Account(round.population, client): self.event(num_examples, round.steps, noise)
            for client, num_examples in round.clients.items()
        }

    def check(self, context: ClaimContext) -> None:
        if context.private_statistics is not None:
            raise ValueError(
                f"training.privacy.kind is {self.kind} and data.{context.private_statistics}: one example moves all "
                "the others of its client, whose noise would not cover that; scale the inputs by public constants"
            )
        many = context.num_clients is not None and context.num_clients > MAX_CHARGED
        if context.withholds_cohort and many and context.sampling.kind != "everyone":
            raise ValueError(
                f"privacy.kind is {context.other_kind} and training.privacy.kind is {self.kind}, with "
                f"{context.num_clients} clients: who is selected must not be told, so every client pays for every "
                f"round, which at most {MAX_CHARGED} can; leave one of the two claims out"
            )

    def statement_values(self, facts: StatementFacts) -> Mapping[str, Any]:
        noise = self.noise(facts.rounds * facts.steps)
        return {
            "steps": f"{facts.steps} step{'s' * (facts.steps > 1)}",
            "max_grad_norm": f"{self.max_grad_norm:g}",
            "noise_multiplier": f"{noise:.4g}",
            "batch": f"{self.sampling_rate:g} of" if self.sampling_rate < 1 else "all",
            "cut": f", cut to {self.max_batch_size} at random" if self.max_batch_size is not None else "",
            "grad_sampler": facts.grad_sampler,
            "draw": "some" if self.sampling_rate < 1 else "all",
        }

    def check_client(self, client_id: str, num_examples: int) -> None:
        """Raise ValueError, in words for people, when a client has too few examples."""
        if num_examples < self.min_examples:
            raise ValueError(
                f"client {client_id!r} has {num_examples} training examples and training.privacy.min_examples is "
                f"{self.min_examples}: leave the client out, or lower training.privacy.min_examples"
            )
        if self.sampling_rate * num_examples < 1:
            raise ValueError(
                f"client {client_id!r} has {num_examples} training examples and training.privacy.sampling_rate is "
                f"{self.sampling_rate:g}: it expects {self.sampling_rate * num_examples:.2g} examples in a batch, less "
                f"than one; make training.privacy.sampling_rate at least {1 / max(num_examples, 1):.3g}"
            )

    def check_epsilon(self, client_id: str, num_examples: int, all_steps: int) -> None:
        """Raise ValueError, in words for people, when no epsilon holds for so many steps over a client's examples.

        The chance that a batch is cut is more than delta allows.
        """
        if self.max_batch_size is None or math.isfinite(self.epsilon(num_examples, all_steps, self.noise(all_steps))):
            return
        least = self.least_max_batch_size(num_examples, all_steps, self.noise(all_steps), sys.float_info.max)
        if least is not None:
            raise ValueError(
                f"training.privacy.max_batch_size is {self.max_batch_size}, and client {client_id!r} with its "
                f"{num_examples} training examples would have batches cut so often that no epsilon holds at a delta of "
                f"{self.delta:g}; make training.privacy.max_batch_size at least {least}, or leave it out"
            )

    def least_max_batch_size(
        self, num_examples: int, all_steps: int, noise_multiplier: float, epsilon: float
    ) -> int | None:
        """The smallest `max_batch_size` with which so many steps over a client's examples keep `epsilon`.

        None where they would not even if no batch was cut.

        >>> rule = ExampleLevel(noise_multiplier=1.0, max_grad_norm=1.0, sampling_rate=0.1)
        >>> rule.least_max_batch_size(200, all_steps=10, noise_multiplier=1.0, epsilon=3.5)
        48
        """

        def keeps(size: int) -> bool:
            cut = self.model_copy(update={"max_batch_size": size})
            return cut.epsilon(num_examples, all_steps, noise_multiplier) <= epsilon

        if not keeps(num_examples):
            return None
        return bisect.bisect_left(range(1, num_examples), True, key=keeps) + 1

    def epsilon(self, num_examples: int, all_steps: int, noise_multiplier: float) -> float:
        """What so many steps over a client's examples come to; infinity where nothing holds."""
        return rdp_epsilon({self.event(num_examples, all_steps, noise_multiplier): 1}, NEIGHBOURING, self.delta)

    def noise(self, all_steps: int) -> float:
        """The noise multiplier, in a run in which a client makes at most `all_steps` steps.

        Raises `ConfigError` when no noise is enough.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.target_epsilon is not None
        return _least_noise(self.sampling_rate, all_steps, self.target_epsilon, self.delta)

    def event(self, num_examples: int, steps: int, noise_multiplier: float | None = None) -> Event:
        """What a client's round of `steps` steps over its `num_examples` examples costs, with the rule's own noise or
        with another."""
        noise_multiplier = noise_multiplier or self.noise_multiplier
        assert noise_multiplier is not None
        step: Gaussian | PoissonSampled | TruncatedPoissonSampled = Gaussian(noise_multiplier=noise_multiplier)
        if self.max_batch_size is not None and self.max_batch_size < num_examples:
            step = TruncatedPoissonSampled(
                dataset_size=num_examples,
                sampling_rate=self.sampling_rate,
                truncated_batch_size=self.max_batch_size,
                noise_multiplier=noise_multiplier,
            )
        elif self.sampling_rate < 1:
            step = PoissonSampled(sampling_rate=self.sampling_rate, event=step)
        return SelfComposed(event=step, count=steps)


@cache
def _least_noise(sampling_rate: float, steps: int, epsilon: float, delta: float) -> float:
    rule = ExampleLevel(noise_multiplier=1.0, max_grad_norm=1.0, sampling_rate=sampling_rate)
    return least_noise(lambda noise: {rule.event(1, steps, noise): 1}, NEIGHBOURING, epsilon, delta)


if TYPE_CHECKING:
    ExamplePrivacy = PrivacyRule
else:
    ExamplePrivacy = union("example_privacy", NoPrivacy, ExampleLevel)
