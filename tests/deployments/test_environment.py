"""What a command finds around it: another flow, an MLflow that cannot be, a home that cannot be, an edited module."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedrounds.deployments import api, training
from fedrounds.fl_components.config import load_config, parse_config, source_folder
from fedrounds.fl_components.errors import ConfigError, FedroundsError, RunNotFound, StoreError
from fedrounds.fl_components.rules import import_attribute
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.store.home import home as home_folder
from fedrounds.flows.round import walk
from fedrounds.tasks.session import _check_is_there
from fedrounds.tasks.tracking.server import check_tracking_uri, run_url
from tests.support import HEART


def test_training_inside_a_flow_run_of_another_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.context import FlowRunContext

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    training._check_enclosing_flow()
    monkeypatch.setattr(FlowRunContext, "get", classmethod(lambda cls: SimpleNamespace()))
    with pytest.raises(ConfigError, match="inside a Prefect flow run of another server") as caught:
        training._check_enclosing_flow()
    assert "set PREFECT_API_URL" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("./mlruns", "a folder, in which MLflow no longer keeps runs"),
        ("file:///srv/mlruns", "a folder, in which MLflow no longer keeps runs"),
        ("databricks", "databricks-sdk is missing"),
        ("databricks://profile", "databricks-sdk is missing"),
        ("ftp://me:hunter2@mlflow.example", "MLflow knows no 'ftp'"),
        ("http://[::1", "is not a URL"),
    ],
)
def test_an_mlflow_that_can_never_be_is_refused(uri: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrounds.tasks.tracking.server.find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(FedroundsError, match=words) as caught:
        check_tracking_uri()
    assert caught.value.exit_code in (2, 3) and "hunter2" not in str(caught.value)


def test_a_training_is_refused_before_it_begins(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLflow can never be, and inside another server's flow run."""
    from prefect.context import FlowRunContext

    with monkeypatch.context() as environment:
        environment.setenv("MLFLOW_TRACKING_URI", "./mlruns")
        with pytest.raises(FedroundsError, match="a folder, in which MLflow no longer keeps runs"):
            api.train(str(HEART))
    monkeypatch.setattr(FlowRunContext, "get", classmethod(lambda cls: SimpleNamespace()))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(ConfigError, match="inside a Prefect flow run of another server"):
        api.train(str(HEART))
    assert not home.exists() or list(home.iterdir()) == []


@pytest.mark.parametrize("uri", ["admin:hunter2@db/fed", "hunter2@db/fed", "u:hunter2@h:5000", "azure://x?sig=hunter2"])
def test_no_password_is_in_what_an_mlflow_address_raises(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError) as caught:
        check_tracking_uri()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["https://me:hunter2@mlflow.example/x", "https://me:hunter/2@mlflow.example/x", "https://h/x?token=hunter2"]
)
def test_no_password_is_in_the_address_of_an_mlflow_page(uri: str) -> None:
    assert "hunter" not in str(run_url(uri, "b1946ac9")) and "b1946ac9" in str(run_url(uri, "b1946ac9"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: api.resume("nope"), RunNotFound, "nope"),
        (lambda: api.resume(""), RunNotFound, "''"),
        (lambda: api.train(str(HEART), run_id="a/b"), ConfigError, "'a/b' cannot be a run id"),
        (lambda: api.train(str(HEART), run_id=""), ConfigError, "'' cannot be a run id"),
        (lambda: api.sweep(str(HEART), ["seed=1,2"], sweep_id="a/b"), ConfigError, "'a/b' cannot be a sweep id"),
        (lambda: api.sweep(str(HEART), ["seed=1,2"], sweep_id=""), ConfigError, "'' cannot be a sweep id"),
        (lambda: api.sweep(str(HEART), ["typo=1,2"]), ConfigError, "typo is not a field"),
        (lambda: api.sweep(str(HEART), ["training.typo=1,2"]), ConfigError, "typo is not a field"),
        (lambda: api.sweep(str(HEART), ["seed"]), ConfigError, "not of the form"),
        (lambda: api.sweep(str(HEART), ["seed=1,1"]), ConfigError, "same configuration"),
        (lambda: api.sweep(str(HEART), []), ConfigError, "needs a field to vary"),
    ],
)
def test_a_typo_is_reported_before_a_server_is_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], error: type[FedroundsError], words: str
) -> None:
    monkeypatch.setattr("fedrounds.deployments.stack.connection.connect", lambda **_: pytest.fail("a server is asked"))
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("argument", ["\udcff", "r\udcf6m"])
def test_an_id_that_is_not_utf_8_is_refused(home: Path, argument: str) -> None:
    for call in (api.show, api.resume, lambda run: api.delete_runs([run])):
        with pytest.raises(ConfigError, match=r"'r?\\udcf[6f]m?' is not UTF-8 text"):
            call(argument)


def test_a_limit_may_be_larger_than_any_number_of_runs(home: Path) -> None:
    assert api.runs(99999999999999999999) == []


@pytest.mark.parametrize("uri", ["", "http://127.0.0.1:5000", "sqlite:////srv/mlflow.db", "postgresql+psycopg2://db/m"])
def test_an_mlflow_that_may_be_there_is_left_to_the_tracker(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check_tracking_uri()


@pytest.mark.parametrize("name", ["100%20", "what?", "a\nb"])
def test_a_home_that_no_database_url_can_hold_is_refused_before_it_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="in its path, which the addresses of Prefect's and MLflow's") as caught:
        home_folder(tmp_path / name)
    assert "FEDROUNDS_HOME" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_home_with_other_signs_is_taken(tmp_path: Path) -> None:
    assert home_folder(tmp_path / "Müller's #1 home").is_dir()


def moving_wards(folder: Path) -> Path:
    """A project: a configuration, and the tables of two clients beside it."""
    (folder / "wards").mkdir(parents=True)
    for name in ("north", "south"):
        rows = "".join(f"{row},{row % 2}\n" for row in range(20))  # the same: nothing tells one from the other
        (folder / "wards" / f"{name}.csv").write_text(f"age,ill\n{rows}")
    fields = {
        "name": "wards",
        "rounds": 2,
        "data": {"kind": "tables", "folder": "wards", "label": "ill", "public": True},
        "model": {"kind": "logistic_regression"},
        "training": {"learning_rate": 0.1, "epochs": 1},
    }
    (folder / "wards.yaml").write_text(json.dumps(fields))
    return folder / "wards.yaml"


def test_a_project_that_was_moved_goes_on_where_it_is_named(store: Store, tmp_path: Path) -> None:
    config = moving_wards(tmp_path / "old")
    with open_run(store, "r", config=load_config(config), source_folder=str(source_folder(config))) as run:
        walk(stages, run, 1)
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ConfigError, match=r"run r was started from .*old, which is not there") as caught:
        _check_is_there(store.run("r"))
    assert "fedrounds train CONFIG --run-id r" in str(caught.value.hint)
    config = tmp_path / "new" / "wards.yaml"
    with open_run(store, "r", config=load_config(config), source_folder=str(source_folder(config))) as run:
        assert walk(stages, run, 2).round == 2
    store.verify_journal()


def test_a_second_training_in_a_process_does_not_take_the_module_of_the_first(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    file = tmp_path / "edited_wards.py"
    program = "import numpy as np\nx, y = np.eye(4), [0, 1, 0, LAST]\ndef load(): return {'a': (x, y, x, y)}\n"
    fields = {
        "name": "wards",
        "rounds": 1,
        "data": {"kind": "function", "path": "edited_wards:load", "num_classes": 2, "public": True},
        "model": {"kind": "logistic_regression"},
        "training": {"learning_rate": 0.1, "epochs": 1},
    }
    file.write_text(program.replace("LAST", "1"))
    open_run(store, "first", config=parse_config(fields), source_folder=str(tmp_path)).close()
    file.write_text(program.replace("LAST", "0"))
    with pytest.raises(ConfigError, match=r"edited_wards\.py has changed since this process imported it"):
        open_run(store, "second", config=parse_config(fields), source_folder=str(tmp_path))
    assert [run.run_id for run in store.runs()] == ["first"]


def test_a_module_that_changed_since_its_import_is_refused_until_it_is_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_helper.py").write_text("LABEL = 1\n")
    (tmp_path / "edited_loader.py").write_text("from edited_helper import LABEL\ndef load(): return LABEL\n")
    assert import_attribute("edited_loader:load", "data.path")() == 1
    assert import_attribute("edited_loader:load", "data.path")() == 1
    (tmp_path / "edited_helper.py").write_text("LABEL = 200\n")
    with pytest.raises(ConfigError, match=r"edited_helper\.py has changed since this process imported it") as caught:
        import_attribute("edited_loader:load", "data.path")
    assert "importlib.reload(edited_helper)" in str(caught.value.hint)
    for name in ("edited_helper", "edited_loader"):
        importlib.reload(importlib.import_module(name))
    assert import_attribute("edited_loader:load", "data.path")() == 200
