"""Deleting what MLflow shows of runs that are deleted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedrounds.fl_components.store import RunRecord, Store
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.run_view import RUN_ID_TAG
from fedrounds.tasks.tracking.sweep_view import CREATED_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass
class MlflowDeletion:
    """What was deleted in MLflow: how many runs and versions of registered models, and which runs were kept, by the id
    of the training run, each with the reason. `problem` says why MLflow could not be asked, or stopped answering."""

    runs: int = 0
    model_versions: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


def delete_from_mlflow(store: Store, runs: Sequence[RunRecord]) -> MlflowDeletion:
    """Delete the MLflow runs of these training runs, with the models that they logged and registered.

    A run whose registered model has an alias (`challenger`, `champion`) is kept: something may load it by that name. As
    MLflow does, it marks them deleted; `mlflow gc` then frees their files. Found are also runs that the store no longer
    refers to, by their tags.
    """
    uri, found = server.tracking_uri(store.home), MlflowDeletion()
    if not server.is_there(uri):
        return found
    with server.quiet():
        try:
            client = server.connect(uri)
            for run in runs:
                for shown in _shown(client, run):
                    _delete(client, run, shown, found)
        except Exception as error:
            found.problem = f"MLflow at {server.public_uri(uri)} could not be asked: {server.reason(error)}"
    return found


def _shown(client: MlflowClient, run: RunRecord) -> list[Run]:
    experiment = client.get_experiment_by_name(run.name)
    if experiment is None:
        return []
    tagged = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{RUN_ID_TAG}` = '{run.run_id}'")
    return [each for each in tagged if each.data.tags.get(CREATED_TAG) == repr(run.created_at)]  # else another store's


def _delete(client: MlflowClient, run: RunRecord, shown: Run, found: MlflowDeletion) -> None:
    versions = client.search_model_versions(f"run_id = '{shown.info.run_id}'")
    for each in versions:
        names = [
            alias
            for alias, version in client.get_registered_model(each.name).aliases.items()
            if str(version) == str(each.version)
        ]
        if names:
            found.kept[run.run_id] = (
                f"version {each.version} of the model {each.name} is its {' and '.join(sorted(names))}"
            )
            return
    for each in versions:
        client.delete_model_version(each.name, str(each.version))
        found.model_versions += 1
    logged = client.search_logged_models(
        [shown.info.experiment_id], filter_string=f"source_run_id = '{shown.info.run_id}'"
    )
    for model in logged:
        client.delete_logged_model(model.model_id)
    client.delete_run(shown.info.run_id)
    found.runs += 1
