"""Assembly of a federation: load the data, build the model, and check that all of it fits together."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np

from fedrounds.fl_components.config import FederationConfig, check_claims, check_cohort, check_compression
from fedrounds.fl_components.data import FederatedData, TargetReader
from fedrounds.fl_components.errors import ConfigError, DataError, ModelError
from fedrounds.fl_components.models import Mode, ModelSpec, RowFormat, build_seeded, check_fits
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.privacy.clipping import UNITS, clip_norm_in_units
from fedrounds.fl_components.privacy.steps import Mechanism
from fedrounds.fl_components.randomness import generator
from fedrounds.fl_components.server.evaluation import EvaluationSet, check_metrics, output_shape
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.simulated_clients import SimulatedClients
from fedrounds.fl_components.shared_memory import give_back_memory
from fedrounds.fl_components.training import BATCH_SIZE, one_thread, synthetic_like

MAX_CLIENTS_EVALUATED = 1000


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
    clients = SimulatedClients(*data.shared())  # a second copy would be the largest thing that a run holds
    give_back_memory()
    federation = Federation(
        config,
        clients.population(),
        module,
        ModelSpec.of(config.model, data.input_shape, outputs, config.seed, module),
        initial_params_D,
        synthetic_like(clients.examples(config.task)),
        clients,
        EvaluationSet(clients.data, config.task, config.evaluation),
    )
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
    """The modes in which the model is given one row at a time, with the reasons.

    How many rows somebody has is not looked at under a claim: then there may be such.
    """
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
    """Refuse noise and clipping that no step or round could be computed with.

    Public values decide that, so no client is charged first.
    """
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
    config.selection.select(federation.clients_of(1, np.zeros_like), generator(config.seed, 1, "selection"))


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
