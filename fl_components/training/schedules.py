"""How the learning rate changes over the rounds: factors of `training.learning_rate`."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from fedrounds.fl_components.rules import Rule


class ScheduleRule(Rule):
    """The factor of a round, after a warm-up that rises in equal steps to 1."""

    warmup_rounds: int = Field(default=0, ge=0)

    def factor(self, round: int, rounds: int) -> float:
        """What the learning rate is multiplied by in round `round` (from 1) of `rounds`."""
        if round <= self.warmup_rounds:
            return round / (self.warmup_rounds + 1)
        return self.after_warmup(round - self.warmup_rounds - 1, max(1, rounds - self.warmup_rounds))

    @abstractmethod
    def after_warmup(self, done: int, rounds: int) -> float:
        """The factor when `done` of the `rounds` after the warm-up are over."""


class Constant(ScheduleRule):
    """Always the same.

    >>> Constant(warmup_rounds=3).factor(1, 10), Constant().factor(1, 10)
    (0.25, 1.0)
    """

    kind: Literal["constant"] = "constant"

    def after_warmup(self, done: int, rounds: int) -> float:
        return 1.0


class Step(ScheduleRule):
    """Multiplied by `decay` after every so many rounds.

    >>> [Step(every=2, decay=0.5).factor(round, 10) for round in (1, 2, 3, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """

    kind: Literal["step"] = "step"
    every: int = Field(ge=1)
    decay: float = Field(default=0.1, gt=0, le=1)

    def after_warmup(self, done: int, rounds: int) -> float:
        return float(self.decay ** (done // self.every))


class Exponential(ScheduleRule):
    """Multiplied by `decay` after each round; McMahan et al. 2017 use 0.99 and above for CIFAR-10.

    >>> [Exponential(decay=0.5).factor(round, 10) for round in (1, 2, 3)]
    [1.0, 0.5, 0.25]
    """

    kind: Literal["exponential"] = "exponential"
    decay: float = Field(gt=0, le=1)

    def after_warmup(self, done: int, rounds: int) -> float:
        return float(self.decay**done)


class Cosine(ScheduleRule):
    """Falls from 1 to `floor` by half a cosine (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983).

    >>> [round(Cosine().factor(each, 4), 3) for each in (1, 3)]
    [1.0, 0.5]
    """

    kind: Literal["cosine"] = "cosine"
    floor: float = Field(default=0.0, ge=0, lt=1)

    def after_warmup(self, done: int, rounds: int) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done / rounds)) / 2


Schedule = Annotated[Constant | Step | Exponential | Cosine, Field(discriminator="kind")]
