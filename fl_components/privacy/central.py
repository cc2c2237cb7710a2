"""Central differential privacy: the server clips each client's update and adds noise to the sum (McMahan et al. 2018,
"Learning differentially private recurrent language models", https://arxiv.org/abs/1710.06963). It protects a client
(all that a client holds) against whoever sees the models, and trusts the server that adds the noise."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.arrays import Float64, Tensors
from fedrounds.fl_components.privacy.claim import (
    Claim,
    ClaimContext,
    ClaimRound,
    StatementFacts,
    Trust,
    Unit,
    neighbouring_of,
    no_seed,
)
from fedrounds.fl_components.privacy.clipping import UNITS, clip_norm_in_units
from fedrounds.fl_components.privacy.events import (
    Event,
    Gaussian,
    Neighbouring,
    PoissonSampled,
    SampledWithoutReplacement,
)
from fedrounds.fl_components.privacy.noise import gaussian
from fedrounds.fl_components.privacy.releases import Release, charged, withheld
from fedrounds.fl_components.rules import Rule, union
from fedrounds.fl_components.values import Sampling

Clipping = Tensors
"""The state of the clipping."""

KeyOf = Callable[[str], bytes]
"""The key of a purpose."""

SAMPLED = "use selection.kind poisson, or uniform over all clients"

MIN_NORM: Final = 1e-6
MAX_NORM: Final = 1e6
"""Within these the arithmetic of float32 is what the margins of clipping.py were worked out for."""

MIN_NOISE: Final = 1e-3
MAX_NOISE: Final = 1e6
"""Within these so is that of the accountant, and of the noise."""

MAX_STEP: Final = 30.0  # of the logarithm of a norm in one round: more leaves the norms above anyway


class ClippingRule(Rule):
    """Base of the clipping rules: how long a contribution may be."""

    @abstractmethod
    def init(self) -> Clipping:
        """The state before the first round; `norm` in it, float64 [1], is the clipping norm."""

    @abstractmethod
    def in_words(self) -> str:
        """For a privacy statement: "clipped to ..."."""

    def count_deviation(self, expected_cohort_size: float) -> float | None:
        """The deviation of the noise on the count of unclipped updates; None where nobody counts."""
        return None

    def update(self, state: Clipping, noisy_fraction: float) -> Clipping:
        """The state after a round in which this fraction of the expected cohort was not clipped, noise included."""
        return state


class FixedClipping(ClippingRule):
    """The same clipping norm in all rounds.

    >>> float(FixedClipping(norm=0.5).init()["norm"][0])
    0.5
    """

    kind: Literal["fixed"] = "fixed"
    norm: float = Field(ge=MIN_NORM, le=MAX_NORM)

    def in_words(self) -> str:
        return f"a fixed L2 norm of {self.norm:g}"

    def init(self) -> Clipping:
        return {"norm": np.array([self.norm])}


class AdaptiveClipping(ClippingRule):
    """A clipping norm that follows a quantile of the updates' norms.

    C <- C exp(-rate (b - quantile)), where b is the noisy fraction of updates that were not clipped (Andrew et al.
    2021, "Differentially private learning with adaptive clipping", https://arxiv.org/abs/1905.03871, algorithm 1).

    Args:
      initial_norm: C in the first round.
      quantile: which of the norms C is to meet.
      learning_rate: of the logarithm of C.
      count_noise: the deviation of the noise on the count; by default a twentieth of the expected cohort, as there.
    """

    kind: Literal["adaptive"] = "adaptive"
    initial_norm: float = Field(default=0.1, ge=MIN_NORM, le=MAX_NORM)
    quantile: float = Field(default=0.5, ge=0, le=1)
    learning_rate: float = Field(default=0.2, gt=0)
    count_noise: float | None = Field(default=None, gt=0, le=MAX_NOISE)

    def in_words(self) -> str:
        return f"an L2 norm that follows the {self.quantile:g} quantile of the updates (Andrew et al. 2021)"

    def init(self) -> Clipping:
        return {"norm": np.array([self.initial_norm])}

    def count_deviation(self, expected_cohort_size: float) -> float | None:
        return self.count_noise if self.count_noise is not None else expected_cohort_size / 20

    def update(self, state: Clipping, noisy_fraction: float) -> Clipping:
        step = np.clip(-self.learning_rate * (noisy_fraction - self.quantile), -MAX_STEP, MAX_STEP)
        norm = np.clip(state["norm"] * np.exp(step), MIN_NORM, MAX_NORM)
        return {"norm": norm, "unclipped_fraction": np.array([noisy_fraction])}


if TYPE_CHECKING:
    AnyClipping = ClippingRule
else:
    AnyClipping = union("clipping", FixedClipping, AdaptiveClipping)


class CentralPrivacy(Claim):
    """Gaussian noise on the sum of clipped updates.

    Args:
      noise_multiplier: z: what a round releases is as private as noise of deviation z times the clipping norm makes it.
        With adaptive clipping the count shares it: the sum's own noise is then a little larger.
      clipping: how long an update may be.
      per_layer: clip each parameter for itself, to the clipping norm over the square root of their number.
      delta: the delta at which epsilon is stated. Make it smaller than one over the number of clients.
      epsilon: the most that this run may spend, within what its population has left.
      simulate_noise_cohort: a study of a larger cohort: the noise of one of this size is scaled down to the cohort that
        is trained, so that signal and noise are as they would be. The epsilon is that of the larger cohort: simulated,
        in no ledger, and no model of it is promoted.
    """

    kind: Literal["central"] = "central"
    unit: ClassVar[Unit] = "client"
    trust: ClassVar[Trust] = "server"
    noise_multiplier: float = Field(ge=MIN_NOISE, le=MAX_NOISE)
    clipping: AnyClipping
    per_layer: bool = False
    epsilon: float | None = Field(default=None, gt=0)
    simulate_noise_cohort: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _no_seed(cls, fields: Any) -> Any:
        return no_seed("privacy", fields)

    @model_validator(mode="after")
    def _one_norm_follows_one_quantile(self) -> CentralPrivacy:
        if self.per_layer and isinstance(self.clipping, AdaptiveClipping):
            raise ValueError(
                "privacy.per_layer is true and privacy.clipping.kind is adaptive: one count cannot steer the norms of "
                "several layers; use fixed clipping, or per_layer: false"
            )
        return self

    def init(self) -> Clipping:
        return self.clipping.init()

    @property
    def is_charged(self) -> bool:
        return self.simulate_noise_cohort is None

    @property
    def limit(self) -> float | None:
        return self.epsilon

    def neighbouring(self, sampling: Sampling) -> Neighbouring:
        return neighbouring_of(sampling)

    def charges(self, round: ClaimRound) -> Mapping[Account, Event]:
        return {Account(round.population): self.event(round.sampling)}

    def check(self, context: ClaimContext) -> None:
        """Check what a claim about clients asks of the sum, the draw and the size of the cohort. Raises ValueError."""
        if not context.is_sum:
            raise ValueError(
                f"privacy.kind is central but aggregation.kind is {context.aggregation}: how far one client moves it "
                "is not known, so no noise could cover it; use aggregation.kind mean"
            )
        if context.max_weight is None:
            raise ValueError(
                "privacy.kind is central but aggregation.weights is num_examples without a cap: one client with many "
                "examples could move the mean any distance; set aggregation.max_examples, or aggregation.weights to "
                "uniform"
            )
        if context.error_feedback:
            raise ValueError(
                "privacy.kind is central but compression.error_feedback is true: what clients keep for later is their "
                "own, and checkpoints would hold it; leave compression.error_feedback out"
            )
        if context.min_updates:
            raise ValueError(
                f"privacy.kind is central but selection.min_updates is {context.min_updates}: a round that ends "
                "because few clients came tells who came; leave selection.min_updates out"
            )
        if context.max_update_norm is not None:
            raise ValueError(
                f"privacy.kind is central but admission.max_update_norm is {context.max_update_norm:g}: under a claim "
                "an update is clipped to privacy.clipping, not rejected; leave admission.max_update_norm out"
            )
        if self.simulate_noise_cohort is not None and self.epsilon is not None:
            raise ValueError(
                f"privacy.epsilon is {self.epsilon:g} and privacy.simulate_noise_cohort is "
                f"{self.simulate_noise_cohort}: a simulated epsilon is not spent, so the limit would do nothing; leave "
                "one of them out"
            )
        self.event(context.sampling)  # whether a claim leans on the draw is the same for any number of clients
        if context.num_clients is not None:
            self._check_cohort(context.sampling, context.num_clients)

    def _check_cohort(self, sampling: Sampling, num_clients: int) -> None:
        if sampling.cohort_size < 1:
            raise ValueError(
                f"privacy.kind is central but selection.sampling_rate {sampling.rate:g} expects "
                f"{sampling.cohort_size:.3g} of {num_clients} clients in a round: most rounds would be noise alone; "
                f"make selection.sampling_rate at least {1 / num_clients:.3g}"
            )
        if self.simulate_noise_cohort is not None and self.simulate_noise_cohort < sampling.cohort_size:
            raise ValueError(
                f"privacy.simulate_noise_cohort is {self.simulate_noise_cohort} but a round selects "
                f"{sampling.cohort_size:g} clients: it is for the study of a larger cohort; make it larger than the "
                "cohort, or leave it out"
            )
        self.sum_noise_multiplier(self._claimed_cohort(sampling.cohort_size))

    def statement_values(self, facts: StatementFacts) -> Mapping[str, Any]:
        released = ["the model after each round", "the clipping norm"]
        if isinstance(self.clipping, AdaptiveClipping):
            released.append("the noisy fraction of updates that were not clipped")
        if facts.public_metrics:
            *names, last = facts.public_metrics
            metrics = f"{', '.join(names)} and {last}" if names else last
            released.append(f"{metrics} on all test examples together, which are declared public")
        return {
            "clipping": self.clipping.in_words(),
            "layers": ", layer by layer" if self.per_layer else "",
            "weights": "each with the same weight" if facts.equal_weights else "weighted by examples, with a cap",
            "noise_multiplier": f"{self.noise_multiplier:g}",
            "released": ", ".join(released),
        }

    def _claimed_cohort(self, expected_cohort_size: float) -> float:
        """The size of the cohort that the noise is for."""
        return expected_cohort_size if self.simulate_noise_cohort is None else self.simulate_noise_cohort

    def event(self, sampling: Sampling) -> Event:
        """Return what a round releases.

        Raises ValueError, with a sentence for people, where the draw supports no claim.
        """
        release = Gaussian(noise_multiplier=self.noise_multiplier)
        match sampling.kind:
            case "poisson":
                return PoissonSampled(sampling_rate=sampling.rate, event=release)
            case "fixed_size":
                return SampledWithoutReplacement(
                    population_size=sampling.population_size, sample_size=int(sampling.cohort_size), event=release
                )
            case "everyone":
                return release
            case _:
                raise ValueError(
                    f"selection draws its cohort in a way for which no privacy accounting is known; {SAMPLED}"
                )

    def resolve_count_noise(self, expected_cohort_size: float) -> CentralPrivacy:
        """The same rule, whose count of unclipped updates has the noise that it has in a cohort of this size."""
        deviation = self.clipping.count_deviation(self._claimed_cohort(expected_cohort_size))
        if deviation is None:
            return self
        return self.model_copy(update={"clipping": self.clipping.model_copy(update={"count_noise": deviation})})

    def sum_noise_multiplier(self, expected_cohort_size: float) -> float:
        """The deviation of the noise on the sum, in clipping norms.

        A round that also releases the count of unclipped updates (each counts 1/2 or -1/2, so its sensitivity is 1/2)
        has the two together cost what one Gaussian of `noise_multiplier` costs: z_sum^-2 + (2 s)^-2 = z^-2, where s is
        the count's deviation (Andrew et al. 2021, theorem 1). Raises ValueError when s alone costs more.

        >>> rule = CentralPrivacy(noise_multiplier=1.0, clipping=AdaptiveClipping())
        >>> round(rule.sum_noise_multiplier(100), 4)
        1.005
        """
        deviation = self.clipping.count_deviation(expected_cohort_size)
        if deviation is None:
            return self.noise_multiplier
        left = self.noise_multiplier**-2 - (2 * deviation) ** -2
        if left <= 1e-6 * self.noise_multiplier**-2:
            raise ValueError(
                f"privacy.clipping counts unclipped updates with noise of deviation {deviation:g}, which alone costs "
                f"all that privacy.noise_multiplier {self.noise_multiplier:g} allows; set "
                f"privacy.clipping.count_noise above {self.noise_multiplier / 2:g}, or select more than "
                f"{10 * self.noise_multiplier:g} clients a round"
            )
        return float(left**-0.5)

    def release(
        self, sum_D1: Float64, clipping: Clipping, sampling: Sampling, key_of: KeyOf
    ) -> tuple[Float64, Clipping]:
        """What a round gives away of the contributions' exact sum, float64 [D + 1] (`StreamingSum` in
        training/engine.py): their mean with noise, float64 [D], and the state of the clipping after the round.

        The denominator is the expected size of the cohort, which is public; what was received is not. `key_of` gives
        the key of a purpose in this round, the same again for the same collection and never for another.
        """
        norm, expected = float(clipping["norm"][0]), sampling.cohort_size
        claimed, num_parameters = self._claimed_cohort(expected), len(sum_D1) - 1
        smaller = expected / claimed
        deviation = self.sum_noise_multiplier(claimed) * smaller
        noise_D = gaussian(key_of("noise of the sum"), deviation * UNITS, num_parameters)
        unit = norm / clip_norm_in_units(num_parameters)
        mean_D = (sum_D1[:-1].astype(np.int64) + noise_D).astype(np.float64)
        mean_D *= unit / expected
        count_deviation = self.clipping.count_deviation(claimed)
        fraction = None
        if count_deviation is not None:
            steps = 1 << 20  # the count is in halves: these are small beside its noise
            noise = gaussian(key_of("noise of the count"), count_deviation * smaller * steps, 1)[0]
            fraction = (int(sum_D1[-1] * steps) + int(noise)) / steps / expected + 0.5
        after = clipping if fraction is None else self.clipping.update(clipping, fraction)
        seen = {
            "mean_norm": np.array([np.linalg.norm(mean_D)]),
            "noise": np.array([deviation * UNITS * unit / expected]),
        }
        return mean_D, {**after, **seen}

    def clipped_fraction(self, sum_D1: Float64, received: int) -> dict[str, Release]:
        """How many updates were clipped; nobody is told beside a noisy count, whose noise it would give away."""
        if self.clipping.count_deviation(received) is not None or not received:
            return {}
        return {"privacy/clipped_fraction": withheld(0.5 - float(sum_D1[-1]) / received)}

    def metrics(self, state: Clipping, clipping_norm: float, num_parameters: int) -> dict[str, Release]:
        """What may be shown of a round after `release`.

        The noise of each coordinate of the mean, and how much longer the mean is than noise alone would make it.
        """
        noise, mean_norm = float(state["noise"][0]), float(state["mean_norm"][0])
        excess = (mean_norm / noise) ** 2 / num_parameters - 1
        metrics = {
            "privacy/clipping_norm": charged(clipping_norm),
            "privacy/noise_stddev": charged(noise),
            "privacy/update_norm": charged(mean_norm),
            "privacy/signal_to_noise": charged(math.sqrt(max(excess, 0.0))),
        }
        if "unclipped_fraction" in state:
            metrics["privacy/unclipped_fraction"] = charged(float(state["unclipped_fraction"][0]))
        return metrics
