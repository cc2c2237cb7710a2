"""Federation: a configuration with its population and its model, before any round begins."""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.admission import Clip, RoundAdmission
from fedrounds.fl_components.aggregation import LinearAggregator
from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.config import FederationConfig, config_digest
from fedrounds.fl_components.errors import ConfigError, RunFailed
from fedrounds.fl_components.executors import MAX_OF_SHARD
from fedrounds.fl_components.layout import DELTA, PARAMS, Layout, Shape
from fedrounds.fl_components.models import ModelSpec
from fedrounds.fl_components.parameters import constants_digest, load_into
from fedrounds.fl_components.population import Clients, Population
from fedrounds.fl_components.privacy import CentralPrivacy, ExampleLevel
from fedrounds.fl_components.randomness import generator
from fedrounds.fl_components.server.evaluation import EvaluationSet
from fedrounds.fl_components.server.simulated_clients import SimulatedClients
from fedrounds.fl_components.training import ExampleTable, grad_sampler_name, one_thread, synthetic_like
from fedrounds.fl_components.values import RoundPlan, Sampling, ServerState

FLOATS_OF_SHARD = 1_000_000
"""The coordinates of the updates of a shard, where the aggregator needs each update."""


@dataclass(frozen=True)
class Federation:
    """What the server knows of a federation, made by `assemble`.

    Args:
      config: the configuration.
      population: who the clients are.
      module: the model with its initial parameters. It is never run: whoever runs it runs a copy.
      model_spec: how another process builds the same model.
      initial_params_D: the initial parameters, float32 [D].
      synthetic: rows that look like the clients', and hold nothing of theirs.
      clients: the clients' examples, where this installation simulates the clients; else None.
      evaluation_set: the test examples, where the server has any; else None.
    """

    config: FederationConfig
    population: Population
    module: torch.nn.Module
    model_spec: ModelSpec
    initial_params_D: Float32
    synthetic: ExampleTable
    clients: SimulatedClients | None = None
    evaluation_set: EvaluationSet | None = None

    @property
    def simulated(self) -> SimulatedClients:
        """The simulated clients. Raises `RunFailed` where the clients are real: their examples are not here."""
        if self.clients is None:
            raise RunFailed("the clients of this population are not simulated: their examples are not here")
        return self.clients

    @property
    def num_parameters(self) -> int:
        return len(self.initial_params_D)

    @property
    def parameter_shapes(self) -> tuple[Shape, ...]:
        """The shapes of the trainable parameters, in the order of D."""
        return tuple(tuple(parameter.shape) for parameter in self.module.parameters() if parameter.requires_grad)

    @cached_property
    def update_layout(self) -> Layout:
        """How an update is laid out."""
        return Layout((DELTA, *self.config.training.objective.channels), self.parameter_shapes)

    @cached_property
    def broadcast_layout(self) -> Layout:
        """How a broadcast is laid out."""
        return Layout((PARAMS, *self.config.training.objective.channels), self.parameter_shapes)

    @property
    def facts(self) -> dict[str, int | str]:
        """What a resumed run must find as it was, and a warm start as its ancestor left it."""
        facts: dict[str, int | str] = {
            "num_clients": self.population.size,
            "num_parameters": self.num_parameters,
            "constants_digest": constants_digest(self.module),
            "public_data": self.population.is_public,
        }
        return facts | ({"grad_sampler_name": self.grad_sampler_name} if self.grad_sampler_name is not None else {})

    @cached_property
    def grad_sampler_name(self) -> str | None:
        """How gradients of single examples are computed, where clients answer for these.

        Raises:
          ModelError: examples of the model see each other, or it fails.
          ConfigError: the sampler needs a package that is not installed.
        """
        return None if self.example_level is None else grad_sampler_name(self.module, self.synthetic)

    def clients_of(self, round: int, participations: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Clients:
        """Return the clients as the selection of a round sees them."""
        return Clients(
            self.population.size,
            round,
            self.config.seed,
            strata=self.population.strata,
            participations=participations,
            availability=self.config.simulation.availability,
        )

    def select(
        self, round: int, participations: Callable[[NDArray[np.int64]], NDArray[np.int64]], source: int | bytes
    ) -> NDArray[np.int64]:
        """Return the indices of the clients of a round, int64 [N], drawn from a seed or a secret.

        Those with the most examples come first: clients that train together then have about as much to do.
        """
        indices_N = self.config.selection.select(
            self.clients_of(round, participations), generator(source, round, "selection")
        )
        return indices_N[np.argsort(-self.population.num_examples_n[indices_N], kind="stable")]

    @property
    def summed(self) -> LinearAggregator | None:
        """The aggregator, where it needs only the sum of the updates."""
        rule = self.config.aggregation
        return rule if isinstance(rule, LinearAggregator) and not rule.prepare else None

    @property
    def streamed(self) -> LinearAggregator | None:
        """The aggregator, where updates may be summed where they are computed: nothing needs a single one later."""
        needs_each = not self.config.compression.is_identity or self.config.training.objective.channels
        return None if needs_each else self.summed

    @property
    def keeps_client_states(self) -> bool:
        """Whether clients keep something from round to round."""
        return self.config.compression.error_feedback or bool(self.config.training.objective.channels)

    @property
    def sampling(self) -> Sampling:
        """How a round's cohort is drawn."""
        return self.config.sampling(self.population.size)

    @property
    def central(self) -> CentralPrivacy | None:
        """The claim for which the server adds the noise."""
        return self.config.central

    @property
    def example_level(self) -> ExampleLevel | None:
        """The privacy rule of single examples, where each client answers for its own."""
        return self.config.training.example_level

    @property
    def withholds(self) -> bool:
        """Whether what is neither public nor paid for must stay out of all views.

        A privacy claim about private data.
        """
        return self.config.claims and not self.population.is_public

    @property
    def hides_participation(self) -> bool:
        """Whether that goes for who was selected and what became of it.

        Where clients, not only their examples, are protected.
        """
        return self.config.protects_clients and not self.population.is_public

    @property
    def largest_cohort(self) -> int:
        """A bound on the size of a cohort that follows from public values alone.

        A Poisson cohort exceeds its mean by 10 deviations and 10 clients with a probability below 1e-6 (Bernstein's
        inequality), and then costs memory, not privacy.
        """
        most, sampling = self.config.selection.max_cohort_size_of(self.population.size), self.sampling
        if sampling.kind != "poisson":
            return most
        deviation = math.sqrt(sampling.cohort_size * (1 - sampling.rate))
        return min(most, math.ceil(sampling.cohort_size + 10 * deviation + 10))

    def scores_digest(self, repetitions: int = 1) -> str:
        """Return the sha256 over the model's scores of synthetic rows at its initial parameters, in training and in
        evaluation mode, each computed `repetitions` times from the same torch seed."""
        digest, module, rows = hashlib.sha256(), copy.deepcopy(self.module), self.synthetic
        load_into(module, self.initial_params_D)
        with one_thread(), torch.random.fork_rng(devices=[]), torch.no_grad():
            for mode in [True] * repetitions + [False] * repetitions:
                torch.manual_seed(0)
                digest.update(module.train(mode)(rows.x.clone()).numpy(force=True).tobytes())
        return digest.hexdigest()

    @cached_property
    def model_digest(self) -> str:
        """The sha256 over what determines an update besides the parameters.

        The model's scores of synthetic rows, its constants, the way of gradients and the code of the user's module.
        """
        facts = [self.facts["constants_digest"], self.grad_sampler_name, self.scores_digest()]
        digest = hashlib.sha256(repr(facts).encode())
        path = getattr(self.config.model, "path", "")
        file = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None) if path else None
        digest.update(Path(file).read_bytes() if file is not None else b"")
        return digest.hexdigest()

    def admission(self, plan: RoundPlan) -> RoundAdmission:
        """Return what decides which updates of a round count, and how long they may be."""
        clip = None
        if self.central is not None:
            assert plan.clipping_norm is not None
            clip = Clip(plan.clipping_norm, self.central.per_layer)
        return RoundAdmission(self.config.admission, clip)

    @property
    def largest_shard(self) -> int:
        """The most clients of a shard. Where the aggregator needs each update, small shards make small waves."""
        if self.config.execution.shard_size is not None or self.summed is not None:
            return self.config.execution.shard_size or MAX_OF_SHARD
        return max(1, min(MAX_OF_SHARD, FLOATS_OF_SHARD // self.update_layout.size))

    def initial_state(self, params_D: Float32 | None = None) -> ServerState:
        """The state before the first round, from the seeded initial parameters or from given ones (a warm start)."""
        if params_D is not None and params_D.shape != self.initial_params_D.shape:
            raise ConfigError(
                f"model.start_from {self.config.model.start_from!r} has {params_D.size} parameters but model "
                f"{self.config.model.kind} has {self.num_parameters}; start from a model of the same shape, or fresh"
            )
        return ServerState(
            round=0,
            params_D=self.initial_params_D if params_D is None else params_D,
            server_optimizer=self.config.server_optimizer.init(self.num_parameters),
            config_digest=config_digest(self.config),
            aggregator=self.config.aggregation.init(self.update_layout.size),
            channels={
                name: np.zeros(self.num_parameters, np.float32) for name in self.config.training.objective.channels
            },
            clipping=self.config.privacy.init(),
        )

    def trained_module(self, params_D: Float32) -> torch.nn.Module:
        """A new copy of the module with these parameters, ready to predict."""
        module = copy.deepcopy(self.module)
        load_into(module, params_D)
        return module.eval()

    def public_rows(self, limit: int) -> ExampleTable:
        """Return at most `limit` test examples where they are declared public, else `limit` synthetic rows."""
        rows = None if self.evaluation_set is None else self.evaluation_set.public_rows(limit)
        return synthetic_like(self.synthetic, (limit,)) if rows is None else rows

    @property
    def baselines(self) -> dict[str, float]:
        """The metrics of predictors that need no model, on the evaluation set; none where there is none."""
        return {} if self.evaluation_set is None else self.evaluation_set.baselines

    def evaluate(self, params_D: Float32) -> dict[str, float]:
        """Return the metrics of these parameters on the evaluation set; none where there is none."""
        return {} if self.evaluation_set is None else self.evaluation_set.evaluate(self.trained_module(params_D))
