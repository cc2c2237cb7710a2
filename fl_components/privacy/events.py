"""What a release costs, in the words of dp_accounting (https://github.com/google/differential-privacy): what was drawn
and how much noise was added, and not yet an epsilon. That needs a neighbouring relation, and an accountant."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter

from fl_components.rules import Rule

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

    @abstractmethod
    def dp_event(self, scale: float = 1.0) -> DpEvent:
        """The same in dp_accounting's classes, with noise multipliers times `scale`."""


class Nothing(Event):
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


class Repeated(Event):
    """The same release `count` times over the same draw: a round that is collected again from its own cohort."""

    kind: Literal["repeated"] = "repeated"
    event: Gaussian
    count: int = Field(ge=1)

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import SelfComposedDpEvent

        return SelfComposedDpEvent(self.event.dp_event(scale), self.count)


class PoissonSampled(Event):
    """Over a cohort that each client of a frozen registry enters by a coin of its own."""

    kind: Literal["poisson_sampled"] = "poisson_sampled"
    sampling_rate: float = Field(gt=0, le=1)
    event: Gaussian | Repeated = Field(discriminator="kind")

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import PoissonSampledDpEvent

        return PoissonSampledDpEvent(self.sampling_rate, self.event.dp_event(scale))


class SampledWithoutReplacement(Event):
    """Over a cohort of a fixed size, each set of `sample_size` of `population_size` clients equally likely."""

    kind: Literal["sampled_without_replacement"] = "sampled_without_replacement"
    population_size: int = Field(ge=1)
    sample_size: int = Field(ge=1)
    event: Gaussian | Repeated = Field(discriminator="kind")

    def dp_event(self, scale: float = 1.0) -> DpEvent:
        from dp_accounting import SampledWithoutReplacementDpEvent

        return SampledWithoutReplacementDpEvent(self.population_size, self.sample_size, self.event.dp_event(scale))


_ADAPTER: TypeAdapter[Event] = TypeAdapter(
    Annotated[Nothing | Gaussian | Repeated | PoissonSampled | SampledWithoutReplacement, Field(discriminator="kind")]
)


def parse_event(fields: Mapping[str, Any]) -> Event:
    """The event that was dumped as these plain values.

    >>> event = PoissonSampled(sampling_rate=0.1, event=Gaussian(noise_multiplier=1.0))
    >>> parse_event(event.model_dump()) == event
    True
    """
    return _ADAPTER.validate_python(fields)
