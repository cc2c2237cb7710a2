"""The project as a stranger meets it: the wheel, the command's name, the pinned releases, the targets of make."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fl_components", "tasks", "flows", "deployments")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fedrounds"}


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {f"fedrounds/{path.relative_to(ROOT)}" for path in files if path.parent.name != "__pycache__"}
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert expected - packed == set()
    for name in ("fl_components/data/heart_disease/processed.cleveland.data", "deployments/prefect.yaml", "py.typed"):
        assert f"fedrounds/{name}" in packed
    assert any(name.startswith("fedrounds/fl_components/store/migrations/versions/") for name in packed)


@pytest.mark.ci
def test_the_wheel_works_away_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import pathlib, fedrounds\n"
        "from fedrounds.fl_components.data.heart_disease import HeartDisease\n"
        "from fedrounds.fl_components.store import Store\n"
        f"assert pathlib.Path(fedrounds.__file__).is_relative_to({str(site)!r}), fedrounds.__file__\n"
        f"with Store.open(pathlib.Path({str(tmp_path / 'home')!r})) as store:\n"
        "    assert store.runs() == []\n"
        "print(HeartDisease().load(0).num_clients)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"


def test_the_command_is_called_fedrounds() -> None:
    assert PROJECT["scripts"] == {"fedrounds": "fedrounds.deployments.cli:main"}
    (script,) = entry_points(group="console_scripts", name="fedrounds")
    assert callable(script.load())


def test_every_dependency_is_pinned_to_a_release_that_the_project_allows() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["server"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name != PROJECT["name"]:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_a_silo_installs_neither_prefect_nor_mlflow() -> None:
    base = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert not {"prefect", "mlflow"} & base


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (\S+)$", makefile, flags=re.MULTILINE)
    assert {"help", "install", "train", "ui", "test", "test-all", "check", "clean"} <= set(targets)
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make (\S+) +\S", done.stdout, flags=re.MULTILINE) == targets


def test_make_says_what_is_missing_when_there_is_no_suitable_python(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    done = subprocess.run(
        ["make", "install", "PYTHON=no-such-python"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "fedrounds needs Python 3.11 or newer" in done.stdout
    assert not (tmp_path / ".venv").exists()
