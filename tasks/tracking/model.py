"""The registered model: a trained module in MLflow, and its parameters back again.

A model is logged in the `pt2` format, which holds no pickle: a graph and its tensors, run without the model's code.
Beside it lies `params.safetensors`, the trainable parameters as one vector, which is what a later training starts from.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fedrounds.fl_components.arrays import params_digest
from fedrounds.fl_components.errors import ConfigError, Unreachable
from fedrounds.fl_components.models.base import REGISTERED_MODEL
from fedrounds.fl_components.parameters import constants_digest, flatten
from fedrounds.fl_components.reports.statement import in_short, markdown, statement
from fedrounds.fl_components.store import RunRecord, home
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.run_view import RUN_ID_TAG, RunView

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

CHALLENGER: Final = "challenger"

_PARAMS_FILE = "params.safetensors"
_TOLERANCE = 1e-5
_BATCH_SIZES = (1, 7)


@dataclass(frozen=True, slots=True)
class LoggableModel:
    """What is registered.

    `module` is in eval mode and holds the final parameters. `example` [B, ...] has at least 2 rows (an exported program
    would keep a batch size of 1 for ever). It is stored in MLflow for all to see: no client's rows. `name` is the
    registered model's name, which is the experiment's.
    """

    module: torch.nn.Module
    example: NDArray[np.generic]
    name: str


class NotRegistered(Exception):
    """The model cannot be registered, and trying again will not help. Says why."""


def find_registered(client: MlflowClient, run: RunRecord, mlflow_run_id: str, name: str) -> str | None:
    """The URI of the version that this run registered before it was killed, with its alias; else None."""
    for version in client.search_model_versions(f"name = '{name}' and run_id = '{mlflow_run_id}'"):
        if version.tags.get(RUN_ID_TAG) == run.run_id:
            return _challenge(client, run, name, version.version)
    return None


def export(model: LoggableModel, folder: Path) -> None:
    """Write the model to `folder` as MLflow keeps it. Raises `NotRegistered` when torch cannot export the module."""
    import mlflow
    from mlflow.models import infer_signature

    vector_file = folder.parent / _PARAMS_FILE
    try:
        save_file({"params": flatten(model.module)}, vector_file)
        with server.quiet_stderr():
            mlflow.pytorch.save_model(
                model.module,
                str(folder),
                signature=infer_signature(model.example, _predict(model.module, model.example)),
                input_example=model.example,
                serialization_format="pt2",
                pip_requirements=[  # MLflow would find them by loading the model in a new process, which takes seconds
                    f"mlflow=={mlflow.__version__}",
                    f"numpy=={np.__version__}",
                    f"torch=={torch.__version__.partition('+')[0]}",
                ],
                extra_files=[str(vector_file)],
            )
    except Exception as error:  # torch.export raises as many kinds of error as there are things it cannot trace
        raise NotRegistered(f"it cannot be exported: {type(error).__name__}: {server.reason(error)}") from error


def register(view: RunView, run: RunRecord, model: LoggableModel, folder: Path) -> str:
    """Log what `export` wrote, load it back, compare, then register it as `challenger`: its URI, models:/name/version.

    Raises `NotRegistered`, `LeaseLost` before a second version could be registered, or MLflow's own errors.
    """
    try:
        logged = _log(view.client, view.mlflow_run_id, view.experiment_id, folder)
        _check(view.client, logged, model)
        view.lease.note()  # what came before took seconds
        return _register(view, run, logged, model)
    except Exception as error:
        if server.is_refusal(error):
            raise NotRegistered(f"MLflow refuses it: {server.reason(error)}") from error
        raise


def load_start_parameters(
    uri: str, *, constants: str | None = None, tracking_uri: str | None = None
) -> tuple[NDArray[np.float32], str]:
    """A registered model's trainable parameters [D], in `named_parameters` order, and "models:/name/version".

    `uri` is models:/name@alias or models:/name/version; `tracking_uri` says where, if not where runs are tracked.
    `constants` is the `constants_digest` of the model that is to start from them. Raises `ConfigError` when there is no
    such model, it was not registered by fedrounds, or it was trained beside other frozen parameters or buffers;
    `Unreachable` when MLflow does not answer.
    """
    match = REGISTERED_MODEL.fullmatch(uri)
    if match is None:
        raise ConfigError(
            f"model.start_from: {uri!r} is not a registered model",
            hint="write models:/NAME/VERSION or models:/NAME@ALIAS",
        )
    where = tracking_uri or server.tracking_uri(home())
    name, alias = match["name"], match["alias"]
    with server.quiet(), tempfile.TemporaryDirectory(prefix="fedrounds-start-") as folder:
        try:
            client = server.connect(where)
            version = client.get_model_version_by_alias(name, alias) if alias else None
            version = version or client.get_model_version(name, match["version"])
            source = client.get_model_version_download_uri(name, version.version)
        except Exception as error:
            if server.is_refusal(error):
                raise ConfigError(
                    f"model.start_from: {uri} is not in MLflow at {server.public_uri(where)}: {server.reason(error)}",
                    hint="see the registered models and their aliases in MLflow, or use fresh or latest",
                ) from error
            raise Unreachable(
                f"model.start_from is {uri}, and MLflow at {server.public_uri(where)} does not answer "
                f"({server.reason(error)})",
                hint="start MLflow or set MLFLOW_TRACKING_URI, or use fresh or latest",
            ) from error
        try:
            params_D = _download_params(client, source, folder)
        except Exception as error:
            raise ConfigError(
                f"model.start_from: the parameters of {uri} cannot be read from {source}: {server.reason(error)}",
                hint=f"give a model that fedrounds registered: beside it lies extra_files/{_PARAMS_FILE}",
            ) from error
    expected = version.tags.get("params_digest")
    if expected is not None and params_digest(params_D) != expected:
        raise ConfigError(
            f"model.start_from: the parameters of {uri} are not those that were registered (their digest differs)",
            hint="the artifact was changed or damaged; choose another version",
        )
    if constants is not None and version.tags.get("constants_digest", constants) != constants:
        raise ConfigError(
            f"model.start_from: {uri} was trained beside other frozen parameters or buffers than this model has: its "
            "trained parameters would not fit them",
            hint="use the seed, the model and model.freeze of the run that trained it, or start_from: fresh",
        )
    return params_D, f"models:/{name}/{version.version}"


def _log(client: MlflowClient, mlflow_run_id: str, experiment_id: str, folder: Path) -> LoggedModel:
    """The run's logged model, complete; one that a killed process left incomplete is completed."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    earlier = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{mlflow_run_id}'")
    logged = earlier[0] if earlier else client.create_logged_model(experiment_id, "model", source_run_id=mlflow_run_id)
    if logged.status == "READY":
        return logged
    description = Model.load(str(folder))
    description.run_id = mlflow_run_id
    description.model_id = description.model_uuid = logged.model_id
    description.artifact_path = logged.artifact_location
    description.save(str(folder / "MLmodel"))
    client.log_outputs(mlflow_run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.log_model_artifacts(logged.model_id, str(folder))
    return client.finalize_logged_model(logged.model_id, "READY")


def _check(client: MlflowClient, logged: LoggedModel, model: LoggableModel) -> None:
    """Raise `NotRegistered` unless what MLflow gives back answers as the module does, at batch sizes 1 and 7."""
    import mlflow

    with tempfile.TemporaryDirectory(prefix="fedrounds-check-") as folder:
        path = mlflow.artifacts.download_artifacts(
            artifact_uri=logged.artifact_location, dst_path=folder, tracking_uri=client.tracking_uri
        )
        loaded = mlflow.pytorch.load_model(path)
    for batch_size in _BATCH_SIZES:
        inputs = _inputs(model.example, batch_size)
        try:
            expected, answer = _predict(model.module, inputs), _predict(loaded, inputs)
        except Exception as error:
            raise NotRegistered(f"it does not work for a batch of {batch_size}: {server.reason(error)}") from error
        if not np.allclose(answer, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            raise NotRegistered(f"exported, it answers differently from the module for a batch of {batch_size}")


def _inputs(example: NDArray[np.generic], batch_size: int) -> NDArray[np.generic]:
    """Rows [batch_size, ...] like the example's, which may be zeros, and zeros look at no weight of a linear layer."""
    shape = (batch_size, *example.shape[1:])
    if not np.issubdtype(example.dtype, np.floating):
        return np.resize(example, shape)  # tokens: others may not be in the vocabulary
    return np.random.default_rng(0).standard_normal(shape).astype(example.dtype)


def _register(view: RunView, run: RunRecord, logged: LoggedModel, model: LoggableModel) -> str:
    name, client, mlflow_run_id = model.name, view.client, view.mlflow_run_id
    found = statement(view.store, run)
    tags = {
        RUN_ID_TAG: run.run_id,
        "params_digest": run.params_digest,
        "constants_digest": constants_digest(model.module),
        "privacy": in_short(found),
    }
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=mlflow_run_id,
        model_id=logged.model_id,
        tags=tags,
        description=markdown(found) if found["claim"] else None,
    )
    client.set_logged_model_tags(  # what MLflow's pages link by
        logged.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version.version}])}
    )
    return _challenge(client, run, name, version.version)


def _challenge(client: MlflowClient, run: RunRecord, name: str, version: str | int) -> str:
    """Give the version the alias `challenger`, unless a newer one has it or its privacy is that of another federation.

    A model of a simulated cohort is never promoted.
    """
    holder = client.get_registered_model(name).aliases.get(CHALLENGER)
    simulated = run.config.get("privacy", {}).get("simulate_noise_cohort") is not None
    if not simulated and (holder is None or int(holder) < int(version)):
        client.set_registered_model_alias(name, CHALLENGER, str(version))
    return f"models:/{name}/{version}"


def _download_params(client: MlflowClient, source: str, folder: str) -> NDArray[np.float32]:
    import mlflow

    path = mlflow.artifacts.download_artifacts(
        artifact_uri=f"{source}/extra_files/{_PARAMS_FILE}", dst_path=folder, tracking_uri=client.tracking_uri
    )
    return load_file(path)["params"]


def _predict(module: torch.nn.Module, inputs: NDArray[np.generic]) -> NDArray[np.generic]:
    with torch.no_grad():
        return module(torch.from_numpy(inputs.copy())).numpy()
