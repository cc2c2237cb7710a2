"""What MLflow shows of deleted runs goes with them, but for models that something may load by an alias."""

from __future__ import annotations

from fedrounds.fl_components.store import Store
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.deletion import delete_from_mlflow
from fedrounds.tasks.tracking.run_view import CREATED_TAG, RUN_ID_TAG, RunView
from tests.tasks.test_tracking import make_run


def test_runs_and_versions_go_and_what_has_an_alias_stays(store: Store) -> None:
    uri = server.tracking_uri(store.home)
    client = server.connect(uri)
    shown = {}
    client.create_registered_model("digits")
    for run_id in ("old", "new", "bare"):
        make_run(store, run_id)
        with store.acquire(run_id) as lease:
            shown[run_id] = RunView(client, uri, store, lease).mlflow_run_id
        if run_id != "bare":
            source = f"runs:/{shown[run_id]}/model"
            client.create_model_version("digits", source, run_id=shown[run_id])
    client.set_registered_model_alias("digits", "challenger", "2")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    tags = {RUN_ID_TAG: "old", CREATED_TAG: "1.5"}  # of another store on the same MLflow
    client.create_run(experiment.experiment_id, tags=tags, run_name="another store's")

    runs = [store.run(run_id) for run_id in shown]
    for run_id in shown:
        store.delete_run(run_id, by="ada")
    found = delete_from_mlflow(store, runs)
    assert (found.runs, found.model_versions, found.problem) == (2, 1, None)
    assert found.kept == {"new": "version 2 of the model digits is its challenger"}
    left = client.search_runs([experiment.experiment_id])
    assert {each.info.run_name for each in left} == {"new", "another store's"}
    assert [version.version for version in client.search_model_versions("name = 'digits'")] == [2]

    again = delete_from_mlflow(store, [store.run(run_id) for run_id in shown])
    assert (again.runs, again.model_versions, list(again.kept)) == (0, 0, ["new"])
    client.delete_registered_model_alias("digits", "challenger")
    assert delete_from_mlflow(store, runs).runs == 1


def test_an_mlflow_that_does_not_answer_is_named(store: Store, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    make_run(store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    found = delete_from_mlflow(store, store.runs())
    assert found.runs == 0
    assert found.problem is not None and "http://127.0.0.1:9 could not be asked: connection refused" in found.problem
