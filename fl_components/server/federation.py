"""Federation: all that a configuration names, loaded and checked against each other, before any round begins."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedrounds.fl_components.admission import Clip, RoundAdmission
from fedrounds.fl_components.aggregation import LinearAggregator
from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.clients import Clients, Strata
from fedrounds.fl_components.config import (
    FederationConfig,
    check_claims,
    check_cohort,
    check_compression,
    config_digest,
)
from fedrounds.fl_components.data import FederatedData, TargetReader
from fedrounds.fl_components.errors import ConfigError, DataError, ModelError
from fedrounds.fl_components.executors import MAX_OF_SHARD, ArrayType, Workload
from fedrounds.fl_components.layout import DELTA, PARAMS, Layout, Shape
from fedrounds.fl_components.models import Mode, ModelSpec, RowFormat, build_seeded, check_fits
from fedrounds.fl_components.parameters import constants_digest, flatten, load_into
from fedrounds.fl_components.privacy import CentralPrivacy, ExampleLevel
from fedrounds.fl_components.privacy.clipping import UNITS, clip_norm_in_units
from fedrounds.fl_components.privacy.steps import Mechanism
from fedrounds.fl_components.randomness import generator
from fedrounds.fl_components.server.evaluation import check_metrics, evaluate_clients, output_shape
from fedrounds.fl_components.server.rows import digest_of_client
from fedrounds.fl_components.shared_memory import SharedMemory, give_back_memory
from fedrounds.fl_components.task import Metric
from fedrounds.fl_components.training import (
    BATCH_SIZE,
    ExampleTable,
    grad_sampler_name,
    one_thread,
    synthetic_like,
)
from fedrounds.fl_components.values import RoundPlan, Sampling, ServerState

MAX_CLIENTS_EVALUATED = 1000
FLOATS_OF_SHARD = 1_000_000
"""The coordinates of the updates of a shard, where the aggregator needs each update."""


@dataclass(frozen=True)
class Federation:
    """A configuration with its data and its model. `examples` are the data's training examples, for other processes;
    `module` holds the initial parameters. It is never run: whoever runs it runs a copy."""

    config: FederationConfig
    data: FederatedData
    examples: SharedMemory
    module: torch.nn.Module
    initial_params_D: Float32

    @property
    def num_parameters(self) -> int:
        return len(self.initial_params_D)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the model's output for one row: [C], or [T, C] where each position has a target."""
        return output_shape(self.config, self.data)

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

    @cached_property
    def model_spec(self) -> ModelSpec:
        """How another process builds the same model."""
        config = self.config
        return ModelSpec.of(config.model, self.data.input_shape, self.output_shape, config.seed, self.module)

    @property
    def facts(self) -> dict[str, int | str]:
        """What a resumed run must find as it was, and a warm start as its ancestor left it."""
        facts: dict[str, int | str] = {
            "num_clients": self.data.num_clients,
            "num_parameters": self.num_parameters,
            "constants_digest": constants_digest(self.module),
            "public_data": self.data.public,
        }
        return facts | ({"grad_sampler_name": self.grad_sampler_name} if self.grad_sampler_name is not None else {})

    @cached_property
    def grad_sampler_name(self) -> str | None:
        """How gradients of single examples are found, where clients answer for these. Raises what
        `training.grad_sampler_name` raises."""
        return None if self.example_level is None else grad_sampler_name(self.module, self.training_examples)

    @property
    def training_examples(self) -> ExampleTable:
        """All clients' training examples, as training takes them."""
        x, y = (torch.from_numpy(self.examples[name]) for name in ("x", "y"))
        return ExampleTable(x, y, self.examples["starts"], self.examples["stops"], self.config.task)

    def public_rows(self, most: int) -> ExampleTable:
        """Test examples where they are declared public, at most so many, else as many that are made up."""
        x, y = self.data.x_test, self.data.y_test
        if not (self.data.public or self.config.evaluation.public_test):
            return synthetic_like(self.training_examples, (most,))
        rows = np.linspace(0, len(y) - 1, min(most, len(y))).astype(np.int64)  # of all clients
        starts, stops = np.array([0]), np.array([len(rows)])
        return ExampleTable(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), starts, stops, self.config.task)

    @cached_property
    def baselines(self) -> dict[str, float]:
        """How good the predictors are that need no model: the majority label (or mean) of all, and of each client."""
        return self.data.baselines()

    def clients(self, round: int, participations: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Clients:
        """The table of clients as the selection of round `round` sees it."""
        return Clients(
            self.data.num_clients,
            round,
            self.config.seed,
            strata=self._strata,
            participations=participations,
            availability=self.config.simulation.availability,
        )

    @cached_property
    def _strata(self) -> Callable[[str], Strata]:
        data = self.data  # not self: a circle would keep the data of a run that is over until somebody collects garbage
        return cache(lambda name: Strata.of(data.attribute(name)))

    def select(
        self, round: int, participations: Callable[[NDArray[np.int64]], NDArray[np.int64]], source: int | bytes
    ) -> NDArray[np.int64]:
        """The clients of round `round`, as rows [N], drawn from a seed or a secret. Those with the most examples come
        first: whoever trains together then has about as much to do."""
        clients = self.clients(round, participations)
        rows = self.config.selection.select(clients, generator(source, round, "selection"))
        lengths = self.data.train_rows.stops[rows] - self.data.train_rows.starts[rows]
        return rows[np.argsort(-lengths, kind="stable")]

    @property
    def summed(self) -> LinearAggregator | None:
        """The aggregator, where it needs only the sum of the updates."""
        rule = self.config.aggregation
        return rule if isinstance(rule, LinearAggregator) and not rule.prepare else None

    @property
    def streamed(self) -> LinearAggregator | None:
        """The aggregator, where updates may be summed where they are computed: nothing needs a single one later."""
        needs_each = not self.config.compression.transparent or self.config.training.objective.channels
        return None if needs_each else self.summed

    @property
    def keeps_client_states(self) -> bool:
        """Whether clients keep something from round to round."""
        return self.config.compression.error_feedback or bool(self.config.training.objective.channels)

    @property
    def sampling(self) -> Sampling:
        """How a round's cohort is drawn."""
        return self.config.sampling(self.data.num_clients)

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
        """Whether what is neither public nor paid for must stay out of all views: a privacy claim about private
        data."""
        return self.config.claims and not self.data.public

    @property
    def hides_participation(self) -> bool:
        """Whether that goes for who was selected and what became of it: where clients, not only their examples, are
        protected."""
        return self.config.protects_clients and not self.data.public

    @property
    def largest_cohort(self) -> int:
        """A bound on the size of a cohort that follows from public values alone.

        A Poisson cohort exceeds its mean by 10 deviations and 10 clients with a probability below 1e-6 (Bernstein's
        inequality), and then costs memory, not privacy.
        """
        most, sampling = self.config.selection.max_cohort_size_of(self.data.num_clients), self.sampling
        if sampling.kind != "poisson":
            return most
        deviation = math.sqrt(sampling.cohort_size * (1 - sampling.rate))
        return min(most, math.ceil(sampling.cohort_size + 10 * deviation + 10))

    def digest_of_client(self, client: int) -> bytes:
        """The sha256 over the id and the training rows of the client in this row, which is private; computed once."""
        if client not in self._digests:
            self._digests[client] = digest_of_client(self.data, client)
        return self._digests[client]

    @cached_property
    def _digests(self) -> dict[int, bytes]:
        return {}

    def scores_digest(self, repetitions: int = 1) -> str:
        """Return the sha256 over the model's scores of synthetic rows at its initial parameters, in training and in
        evaluation mode, each computed `repetitions` times from the same torch seed."""
        digest, module, rows = hashlib.sha256(), copy.deepcopy(self.module), synthetic_like(self.training_examples)
        load_into(module, self.initial_params_D)
        with one_thread(), torch.random.fork_rng(devices=[]), torch.no_grad():
            for mode in [True] * repetitions + [False] * repetitions:
                torch.manual_seed(0)
                digest.update(module.train(mode)(rows.x.clone()).numpy(force=True).tobytes())
        return digest.hexdigest()

    @cached_property
    def model_digest(self) -> str:
        """The sha256 over what determines an update besides the parameters: the model's scores of synthetic rows, its
        constants, the way of gradients and the code of the user's module."""
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

    @property
    def average_work_N(self) -> list[float]:
        """What each client of an average cohort has to do in a round: examples times parameters."""
        num_examples = round(self.data.train_rows.lengths.mean())
        work = self.config.training.num_samples_processed(num_examples) * self.num_parameters
        return [float(work)] * round(self.sampling.cohort_size)

    def workload(self) -> Workload:
        """What local training needs of this federation."""
        num_coordinates = self.update_layout.size
        if self.streamed is None:
            result: ArrayType = (np.float32, (self.largest_shard, num_coordinates))
        elif self.central is not None:
            result = (np.float64, (num_coordinates + 1,))
        else:
            result = (np.float32, (num_coordinates,))
        return Workload(
            module=self.module,
            spec=self.model_spec,
            task=self.config.task,
            examples=self.examples,
            num_parameters=num_coordinates,
            result=result,
        )

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

    def evaluate(self, params_D: Float32) -> dict[str, float]:
        """Return the metrics of all clients' test examples together, those of each client's and their quantiles."""
        return evaluate_clients(self.trained_module(params_D), self.data, self.metrics, self.config.evaluation)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """What is evaluated, by name."""
        return self.config.evaluation.metrics_of(self.config.task, self.data.class_names)


def assemble(config: FederationConfig, source_folder: str | None = None) -> Federation:
    """Load the data, build the model and check that all of it fits together.

    `source_folder` (the configuration file's) is where a user's own modules are found. It goes last on the path, so
    that nothing in it hides an installed package. Raises `ConfigError`, `DataError` or `ModelError`.
    """
    if source_folder is not None:
        if source_folder not in sys.path:
            sys.path.append(source_folder)
        for field, rule in (("data", config.data), ("model", config.model)):
            _check_own_module(f"{field}.path", getattr(rule, "path", ""), Path(source_folder))
    config.execution.check()
    if isinstance(config.data, TargetReader):
        data = config.data.load(config.seed, config.task.targets)
    else:
        data = config.data.load(config.seed)
    check_metrics(config, data)
    try:
        check_cohort(config, data.num_clients)
        check_compression(config, data.num_clients)
        check_claims(config, data.num_clients)
        _check_examples(config, data)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    tested = int(np.count_nonzero(data.test_rows.lengths))
    if config.evaluation.per_client and tested > MAX_CLIENTS_EVALUATED:
        raise ConfigError(
            f"evaluation.per_client is true but data {config.data.kind} has {tested} clients with test rows: a round "
            f"would cost as much as the population; set evaluation.per_client to false above {MAX_CLIENTS_EVALUATED}"
        )
    if not len(data.y_test):
        raise DataError(
            f"data {config.data.kind} has no test examples: the model could never be evaluated",
            hint=config.data.hint_without_test_rows(data),
        )
    outputs = output_shape(config, data)
    module = build_seeded(config.model, data.input_shape, outputs, config.seed)
    initial_params_D = flatten(module)
    with one_thread():
        check_fits(module, _row_format(config, data), outputs, one_row=_single_rows(config, data))
    data, examples = data.shared()  # a second copy would be the largest thing that a run holds
    give_back_memory()
    federation = Federation(config, data, examples, module, initial_params_D)
    try:
        config.compression.check_size(federation.update_layout.size)
        config.broadcast.check_size(federation.update_layout.size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_mechanisms(federation)
    _check_server_step(config)
    _try_selection(federation)
    _ = federation.grad_sampler_name  # refuses what has no gradients of single examples
    return federation


def _row_format(config: FederationConfig, data: FederatedData) -> RowFormat:
    """What the model is checked with. The tokens that private rows hold are not looked at under a claim."""
    return RowFormat.of(data.x_train, data.x_test, ranges=data.public or not config.claims)


def _single_rows(config: FederationConfig, data: FederatedData) -> dict[Mode, str]:
    """The modes in which the model is given one row at a time, with the reasons. How many rows somebody has is not
    looked at under a claim: then there may be such."""
    found: dict[Mode, str] = {}
    if config.claims and not data.public:
        found["evaluation"] = "a client may have one test row"
        if config.training.example_level is None:
            found["training"] = "a client may have one row left for its last batch"
        return found
    batch_size, lengths = config.training.batch_size, data.train_rows.lengths
    last = lengths if batch_size is None else (lengths - 1) % batch_size + 1  # of a pass
    single = np.flatnonzero((last == 1) | (batch_size == 1))
    if config.training.example_level is None and single.size:
        index = int(single[0])
        found["training"] = (
            f"client {data.client_ids[index]} has {lengths[index]} rows, training.batch_size is {batch_size}"
        )
    tests = data.test_rows.lengths
    single = np.flatnonzero(tests % BATCH_SIZE == 1)
    if config.evaluation.per_client and single.size:
        index = int(single[0])
        found["evaluation"] = f"client {data.client_ids[index]} has {tests[index]} test rows"
    elif not config.evaluation.per_client and len(data.y_test) % BATCH_SIZE == 1:
        found["evaluation"] = f"there are {len(data.y_test)} test rows in all"
    return found


def _check_examples(config: FederationConfig, data: FederatedData) -> None:
    """Raises ValueError when some client has too few training examples for the claim about them, or so many that
    their batches would be cut too often."""
    rule = config.training.example_level
    if rule is not None:
        lengths = data.train_rows.lengths
        fewest = int(np.argmin(lengths))
        rule.check_client(data.client_ids[fewest], int(lengths[fewest]))
        config.training.resolved_privacy(config.rounds)
        most, all_steps = int(np.argmax(lengths)), config.rounds * config.training.private_steps
        rule.check_epsilon(data.client_ids[most], int(lengths[most]), all_steps)


def _check_mechanisms(federation: Federation) -> None:
    """Refuse noise and clipping that no step or round could be computed with: public values decide that, so no client
    is charged first."""
    config, num_coordinates = federation.config, federation.update_layout.size
    if config.training.example_level is not None:
        try:
            Mechanism.of(config.training.resolved_privacy(config.rounds), federation.num_parameters)
        except ModelError as error:
            raise ConfigError(error.message, hint=error.hint) from None
    if federation.central is not None:
        if clip_norm_in_units(num_coordinates) < UNITS / 2:
            raise ConfigError(
                f"privacy.kind is central: rounding the {num_coordinates} coordinates of an update to whole units "
                "would take more than half of the clipping norm",
                hint="use a smaller model, or freeze a part of it",
            )
        try:  # a sum of one coordinate is enough for what depends on the noise alone
            central, sum_D1 = federation.central, np.zeros(2)
            central.release(sum_D1, central.init(), federation.sampling, lambda purpose: bytes(32))
        except ValueError as error:
            raise ConfigError(
                f"the noise of privacy.noise_multiplier {federation.central.noise_multiplier:g} cannot be drawn for a "
                f"cohort of {federation.sampling.cohort_size:g}: {error}",
                hint="set a smaller privacy.noise_multiplier or privacy.clipping.count_noise, or a larger "
                "privacy.simulate_noise_cohort",
            ) from None


def _check_server_step(config: FederationConfig) -> None:
    """Refuse a learning rate that the server's parameters, which are float32, cannot be moved by."""
    rate = float(getattr(config.server_optimizer, "learning_rate", 0.0))
    if rate > float(np.finfo(np.float32).max):
        raise ConfigError(
            f"server_optimizer.learning_rate {rate:g} is beyond float32: the server's parameters would not be finite "
            "after any round",
            hint="set a smaller server_optimizer.learning_rate",
        )


def _try_selection(federation: Federation) -> None:
    """Select a first cohort: an attribute or a file that is not there must not be found out in the first round."""
    config = federation.config
    config.selection.select(federation.clients(1, np.zeros_like), generator(config.seed, 1, "selection"))


def _check_own_module(field: str, path: str, folder: Path) -> None:
    """Refuse a module of the user's that Python would not find, because another one of that name comes first."""
    name = path.partition(":")[0].partition(".")[0]
    own = next((file for file in (folder / f"{name}.py", folder / name / "__init__.py") if file.exists()), None)
    if not name or own is None:
        return
    loaded = sys.modules.get(name)
    found = getattr(loaded, "__file__", None) if loaded else getattr(importlib.util.find_spec(name), "origin", None)
    if found is None or Path(found).resolve() != own.resolve():
        raise ConfigError(
            f"{field} is {path!r}, and {name} is {found or 'built into Python'}, not {own}",
            hint="give your module another name" + ("; or use a process of its own" if loaded else ""),
        )
