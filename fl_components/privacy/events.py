"""What a release costs, in the words of dp_accounting (https://github.com/google/differential-privacy): what was drawn
and how much noise was added, and not yet an epsilon. That needs a neighbouring relation, and an accountant."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, field_validator

from fedrounds.fl_components.rules import Rule

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Neighbouring = Literal["add_or_remove", "replace_one", "zero_out"]
"""How one client differs between two neighbouring populations: it is there or not; it is another one; it contributes
something or zero."""


def as_neighbouring(name: str) -> Neighbouring:
    """The relation of that name. Raises ValueError when there is none.

    >>> as_neighbouring("zero_out")
    'zero_out'
    """
    for known in get_args(Neighbouring):
        if name == known:
            relation: Neighbouring = known
            return relation
    raise ValueError(f"{name!r} is no neighbouring relation; known are {', '.join(get_args(Neighbouring))}")


class Event(Rule):
    """Base of the events. Frozen and hashable, and JSON when it is dumped."""

    @property
    def untruncated(self) -> Event:
        """The event that this one is but for an exception, where that has simpler divergences."""
        return self

    @property
    def truncation_probability(self) -> float:
        """How likely it is not `untruncated`: the distance of the two in total variation is at most that."""
        return 0.0

    @abstractmethod
    def dp_event(self, scale: float = 1.0) -> DpEvent:
        """The same in dp_accounting's classes, with noise multipliers times `scale`."""


class NoOpEvent(Event):
    """No release of private data."""

    kind: Literal["none"] = "none"

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import NoOpDpEvent

        return NoOpDpEvent()


class Gaussian(Event):
    """A sum of contributions whose L2 norm is at most C, with Gaussian noise of deviation `noise_multiplier` * C.

    >>> Gaussian(noise_multiplier=1.1).dp_event()
    GaussianDpEvent(noise_multiplier=1.1)
    """

    kind: Literal["gaussian"] = "gaussian"
    noise_multiplier: float = Field(gt=0)

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(self.noise_multiplier * scale)


class PoissonSampled(Event):
    """Over a cohort that each client of a frozen registry enters by a coin of its own."""

    kind: Literal["poisson_sampled"] = "poisson_sampled"
    sampling_rate: float = Field(gt=0, le=1)
    event: Gaussian | SelfComposed = Field(discriminator="kind")

    @field_validator("event")
    @classmethod
    def _one_draw(cls, event: Gaussian | SelfComposed) -> Gaussian | SelfComposed:
        return _without_draws(event)

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import PoissonSampledDpEvent

        return PoissonSampledDpEvent(self.sampling_rate, self.event.dp_event(scale))


class SampledWithoutReplacement(Event):
    """Over a cohort of a fixed size, each set of `sample_size` of `population_size` clients equally likely."""

    kind: Literal["sampled_without_replacement"] = "sampled_without_replacement"
    population_size: int = Field(ge=1)
    sample_size: int = Field(ge=1)
    event: Gaussian | SelfComposed = Field(discriminator="kind")

    @field_validator("event")
    @classmethod
    def _one_draw(cls, event: Gaussian | SelfComposed) -> Gaussian | SelfComposed:
        return _without_draws(event)

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import SampledWithoutReplacementDpEvent

        return SampledWithoutReplacementDpEvent(self.population_size, self.sample_size, self.event.dp_event(scale))


class TruncatedPoissonSampled(Event):
    """Over a batch that each of `dataset_size` examples enters by a coin of its own, of which a random
    `truncated_batch_size` are kept where more come (https://arxiv.org/abs/2508.15089)."""

    kind: Literal["truncated_poisson_sampled"] = "truncated_poisson_sampled"
    dataset_size: int = Field(ge=1)
    sampling_rate: float = Field(gt=0, le=1)
    truncated_batch_size: int = Field(ge=1)
    noise_multiplier: float = Field(gt=0)

    @property
    def untruncated(self) -> Event:
        return PoissonSampled(sampling_rate=self.sampling_rate, event=Gaussian(noise_multiplier=self.noise_multiplier))

    @property
    def truncation_probability(self) -> float:
        from scipy.stats import binom

        return float(binom.sf(self.truncated_batch_size, self.dataset_size, self.sampling_rate))

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import TruncatedSubsampledGaussianDpEvent

        return TruncatedSubsampledGaussianDpEvent(
            self.dataset_size, self.sampling_rate, self.truncated_batch_size, self.noise_multiplier * scale
        )


class SelfComposed(Event):
    """The same event `count` times.

    Around a draw, each time with a draw of its own: the steps of DP-SGD. Inside one, all over the same draw: a round
    that is collected again from its own cohort.
    """

    kind: Literal["self_composed"] = "self_composed"
    event: Gaussian | PoissonSampled | TruncatedPoissonSampled = Field(discriminator="kind")
    count: int = Field(ge=1)

    @property
    def untruncated(self) -> Event:
        return SelfComposed(event=self.event.untruncated, count=self.count)

    @property
    def truncation_probability(self) -> float:
        return self.count * self.event.truncation_probability

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import SelfComposedDpEvent

        return SelfComposedDpEvent(self.event.dp_event(scale), self.count)


def _without_draws(event: Gaussian | SelfComposed) -> Gaussian | SelfComposed:
    if isinstance(event, SelfComposed) and not isinstance(event.event, Gaussian):
        raise ValueError("a draw within a draw is not accounted for")
    return event


_ADAPTER: TypeAdapter[Event] = TypeAdapter(
    Annotated[
        NoOpEvent | Gaussian | PoissonSampled | SampledWithoutReplacement | TruncatedPoissonSampled | SelfComposed,
        Field(discriminator="kind"),
    ]
)


def parse_event(fields: Mapping[str, Any]) -> Event:
    """The event that was dumped as these plain values.

    >>> event = PoissonSampled(sampling_rate=0.1, event=Gaussian(noise_multiplier=1.0))
    >>> parse_event(event.model_dump()) == event
    True
    """
    return _ADAPTER.validate_python(fields)
