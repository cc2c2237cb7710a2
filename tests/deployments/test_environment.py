"""What a command finds around it: another flow, an MLflow that cannot be, a home that cannot be, an edited module."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from deployments import api
from fl_components.errors import ConfigError, FedroundsError, StoreError
from fl_components.rules import import_attribute
from fl_components.store.home import home
from tasks.tracking.server import check_tracking_uri


def test_training_inside_a_flow_run_of_another_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.context import FlowRunContext

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    api._check_enclosing_flow()
    monkeypatch.setattr(FlowRunContext, "get", classmethod(lambda cls: SimpleNamespace()))
    with pytest.raises(ConfigError, match="inside a Prefect flow run of another server") as caught:
        api._check_enclosing_flow()
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
    monkeypatch.setattr("tasks.tracking.server.find_spec", lambda name: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(FedroundsError, match=words) as caught:
        check_tracking_uri()
    assert caught.value.exit_code in (2, 3) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["", "http://127.0.0.1:5000", "sqlite:////srv/mlflow.db", "postgresql+psycopg2://db/m"])
def test_an_mlflow_that_may_be_there_is_left_to_the_tracker(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check_tracking_uri()


@pytest.mark.parametrize("name", ["100%20", "what?", "a\nb"])
def test_a_home_that_no_database_url_can_hold_is_refused_before_it_is_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="in its path, which the addresses of Prefect's and MLflow's") as caught:
        home(tmp_path / name)
    assert "FEDROUNDS_HOME" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_home_with_other_signs_is_taken(tmp_path: Path) -> None:
    assert home(tmp_path / "Müller's #1 home").is_dir()


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
