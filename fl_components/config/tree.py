"""FederationConfig: a whole experiment as one frozen tree of rules, and the laws between its fields.

A configuration that makes no sense is refused when it is read, with a sentence that names the field (or the two
fields that disagree) and what would mend it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedrounds.fl_components.admission import Admission
from fedrounds.fl_components.aggregation import Aggregation, LinearAggregator, Mean
from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.compression import Broadcast, Compression, NoCompression
from fedrounds.fl_components.data import Data, TargetReader
from fedrounds.fl_components.executors import Execution, LocalExecution
from fedrounds.fl_components.models import Model
from fedrounds.fl_components.population import Selection, Simulation, UniformSampling
from fedrounds.fl_components.privacy import CentralPrivacy, Claim, ClaimContext, NoPrivacy, Privacy
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.server_optimizers import FedAvg, ServerOptimizer
from fedrounds.fl_components.targets import TargetType
from fedrounds.fl_components.task import Classification, Task
from fedrounds.fl_components.training import Evaluation, Training
from fedrounds.fl_components.values import Sampling

MANY = 10**9
"""Clients, where their number is not known."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""Of an experiment or a population, at most 100 characters."""


class FederationConfig(Rule):
    """One experiment: what is learnt, from whom, how, and for how many rounds.

    >>> config = FederationConfig.model_validate({
    ...     "name": "heart", "rounds": 20, "data": {"kind": "heart_disease"},
    ...     "model": {"kind": "logistic_regression"}, "training": {"learning_rate": 0.1, "epochs": 1},
    ... })
    >>> config.population, config.server_optimizer.kind
    ('heart', 'fedavg')
    """

    name: str = Field(pattern=NAME, max_length=100, description="the MLflow experiment")
    population: str = Field(
        default_factory=lambda fields: fields["name"],
        pattern=NAME,
        max_length=100,
        description="clients that share one privacy budget; the name when it is not given",
    )
    rounds: int = Field(ge=1, le=1_000_000_000)
    seed: int = Field(default=0, ge=0, description="decides all public randomness")
    data: Data
    task: Task = Classification()
    model: Model
    training: Training
    selection: Selection = UniformSampling()
    simulation: Simulation = Simulation()
    compression: Compression = NoCompression()
    broadcast: Broadcast = Broadcast()
    admission: Admission = Admission()
    aggregation: Aggregation = Mean()
    server_optimizer: ServerOptimizer = FedAvg()
    privacy: Privacy = NoPrivacy()
    evaluation: Evaluation = Evaluation()
    execution: Execution = LocalExecution()

    @field_validator("name", "population", mode="before")
    @classmethod
    def _names_may_look_like_numbers(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("evaluation")
    @classmethod
    def _metrics_are_written_out(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        return evaluation.resolved(info.data["task"]) if "task" in info.data else evaluation

    @model_validator(mode="after")
    def _laws(self) -> FederationConfig:
        check_task(self)
        num_clients = self.data.known_num_clients()
        if num_clients is not None:
            check_cohort(self, num_clients)
            check_compression(self, num_clients)
        check_schedule(self)
        check_stragglers(self)
        check_claims(self, num_clients)
        return self

    def sampling(self, num_clients: int) -> Sampling:
        """Return how a round's cohort is drawn from `num_clients`.

        It has a fixed size only where no client is ever away: whoever fills an absent client's place is no uniform
        draw.
        """
        sampling = self.selection.sampling(num_clients)
        if sampling.kind == "fixed_size" and not self.simulation.always_available:
            return replace(sampling, kind="other")
        return sampling

    @property
    def claims_made(self) -> tuple[Claim, ...]:
        """What is promised: about clients first, then about their examples."""
        return tuple(each for each in (self.privacy, self.training.privacy) if isinstance(each, Claim))

    @property
    def charged_claims(self) -> tuple[Claim, ...]:
        """The claims that rounds are paid for."""
        return tuple(each for each in self.claims_made if each.is_charged)

    @property
    def claims(self) -> bool:
        """Whether anything is promised, about clients or about their examples."""
        return bool(self.claims_made)

    @property
    def protects_clients(self) -> bool:
        """Whether a claim protects all that a client holds: then who takes part must not be shown."""
        return any(each.unit == "client" for each in self.claims_made)

    @property
    def central(self) -> CentralPrivacy | None:
        """The claim for which the server adds the noise."""
        return self.privacy if isinstance(self.privacy, CentralPrivacy) else None

    @property
    def claimed_steps(self) -> int:
        """The local steps of a client's round for which it draws private batches; 0 where it draws none."""
        return self.training.private_steps if self.training.example_level is not None else 0


def check_task(config: FederationConfig) -> None:
    """Refuse data and training that do not belong to the learning task. Raises ValueError."""
    task, data, smoothing = config.task, config.data, config.training.label_smoothing
    if smoothing and not task.smooths_labels:
        raise ValueError(
            f"training.label_smoothing is {smoothing:g} but task.kind is {task.kind}, whose targets are no classes; "
            "leave training.label_smoothing out"
        )
    if task.targets is TargetType.CLASS:
        return
    if not isinstance(data, TargetReader):
        raise ValueError(
            f"task.kind is {task.kind} but the targets of data.kind {data.kind} are classes; use data.kind tables or "
            "function, or task.kind classification"
        )
    if getattr(data, data.class_field) is not None:
        raise ValueError(
            f"task.kind is {task.kind} but data.{data.class_field} is given, which says what the classes are; leave "
            f"data.{data.class_field} out"
        )


def check_cohort(config: FederationConfig, num_clients: int) -> None:
    """The laws between the selection and the number of clients. Raises ValueError."""
    cohort_size = config.selection.cohort_size_of(num_clients)
    if cohort_size > num_clients:
        raise ValueError(
            f"selection.cohort_size is {cohort_size} but data {config.data.kind} has {num_clients} clients; "
            f"make selection.cohort_size at most {num_clients}"
        )
    most = config.selection.max_cohort_size_of(num_clients)
    if config.selection.min_updates > most:
        raise ValueError(
            f"selection.min_updates is {config.selection.min_updates} but a round selects at most {most} clients: no "
            f"round could succeed; make selection.min_updates at most {most}"
        )
    config.aggregation.check(most)
    share = config.simulation.availability.mean_share
    if share is not None:
        sampling = config.sampling(num_clients)
        available = share * (sampling.rate if sampling.kind == "poisson" else 1.0) * num_clients
        expected = min(float(most), available)
        if config.selection.min_updates > max(1.0, expected):
            raise ValueError(
                f"selection.min_updates is {config.selection.min_updates} but a round expects {expected:.3g} clients, "
                "of those that are selected and there: hardly any round could succeed; lower selection.min_updates, or "
                "select more clients"
            )


def check_compression(config: FederationConfig, num_clients: int) -> None:
    """The laws between compression and the selection. Raises ValueError."""
    rule, selection = config.compression, config.selection
    everyone = config.sampling(num_clients).kind == "everyone"
    if rule.error_feedback and not everyone:
        raise ValueError(
            f"compression.error_feedback is true but selection.kind {selection.kind} draws some of {num_clients} "
            "clients: one that comes m times in n rounds makes up for what was left out n/m times as slowly; use an "
            "unbiased rule (random_k, qsgd, eden), or select every client in every round"
        )
    if config.broadcast.mode == "delta" and not (everyone and config.simulation.always_available):
        raise ValueError(
            "broadcast.mode is delta but not every client is there in every round: one that misses a round does "
            "not hold what the next difference is from; use broadcast.mode full, or select every client"
        )


def check_claims(config: FederationConfig, num_clients: int | None) -> None:
    """Check the laws that privacy claims put on all other fields, as far as they can be told without the number of
    clients. Raises ValueError."""
    units = [each.unit for each in config.claims_made]
    if len(units) > len(set(units)):
        raise ValueError(
            f"privacy.kind is {config.privacy.kind} and training.privacy.kind is {config.training.privacy.kind}: both "
            f"protect the same, a {units[0]}; leave one of them out"
        )
    selection, aggregation = config.selection, config.aggregation
    is_sum = isinstance(aggregation, LinearAggregator) and not aggregation.prepare
    limit = config.admission.max_update_norm
    context = ClaimContext(
        num_clients=num_clients,
        sampling=config.sampling(MANY if num_clients is None else num_clients),
        aggregation=aggregation.kind + "".join(f" after {each.kind}" for each in aggregation.prepare),
        is_sum=is_sum,
        max_weight=aggregation.max_weight if isinstance(aggregation, LinearAggregator) else None,
        error_feedback=config.compression.error_feedback,
        min_updates=selection.min_updates if "min_updates" in selection.model_fields_set else None,
        max_update_norm=limit if limit != Admission().max_update_norm else None,
        private_statistics=config.data.private_statistics,
        withholds_cohort=config.protects_clients and not config.data.is_public,
        other_kind=config.privacy.kind,
    )
    for rule in (config.privacy, config.training.privacy):
        rule.check(context)


def check_schedule(config: FederationConfig) -> None:
    """Refuse a warm-up that outlasts the training. Raises ValueError."""
    warmup_rounds = getattr(config.training.schedule, "warmup_rounds", 0)
    if warmup_rounds and warmup_rounds >= config.rounds:
        raise ValueError(
            f"training.schedule.warmup_rounds is {warmup_rounds} but rounds is {config.rounds}: the full rate would "
            f"never be reached; make training.schedule.warmup_rounds less than {config.rounds}"
        )


def check_stragglers(config: FederationConfig) -> None:
    """Refuse stragglers that cannot do a part of their work. Raises ValueError."""
    training = config.training
    if config.simulation.stragglers is not None and training.num_units == 1:
        work = "epochs" if training.epochs else "steps"
        raise ValueError(
            f"simulation.stragglers is given and training.{work} is 1: a straggler does a part of its {work}; make "
            f"training.{work} at least 2"
        )


def config_digest(config: FederationConfig) -> str:
    """The sha256 of the resolved configuration: two runs with equal digests were asked for the same thing."""
    return hashlib.sha256(canonical_json(config.model_dump(mode="json")).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    return FederationConfig.model_json_schema()
