"""The example package in examples/extension: installed as a user would, its four rules are known and train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fl_components.errors import LeftOut
from fl_components.models import LogisticRegression, Mlp
from fl_components.rules import kind_of, left_out, union
from tests.support import FEDROUNDS, ROOT, clean_environment, data_of

EXTENSION = ROOT / "examples" / "extension"
CONFIG = EXTENSION / "config.yaml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder, EXTENSION], check=True)
    return folder


def fedrounds(home: Path, path: Path | None, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = clean_environment(home) | ({"PYTHONPATH": str(path)} if path is not None else {})
    return subprocess.run(
        [str(FEDROUNDS), *map(str, arguments)], env=environment, cwd=home.parent, capture_output=True, text=True
    )


def python(path: Path, code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_its_configuration_makes_sense_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    checked = data_of(fedrounds(tmp_path / "home", installed, "config", "check", CONFIG, "--data", "--json"))
    assert (checked["num_clients"], checked["cohort_size"], checked["num_parameters"]) == (8, 4, 10)
    schema = json.dumps(data_of(fedrounds(tmp_path / "home", installed, "config", "schema", "--json")))
    for kind in ("wards", "quadratic", "capped_mean", "round_robin"):
        assert f'"{kind}"' in schema


def test_its_kinds_are_unknown_elsewhere(tmp_path: Path) -> None:
    refused = fedrounds(tmp_path / "home", None, "config", "check", CONFIG)
    assert refused.returncode == 2
    assert "data.kind is 'wards'" in refused.stderr


def test_its_four_rules_train(installed: Path) -> None:
    code = f"""
from fl_components.config import load_config
from fl_components.simulate import simulate
for step in simulate(load_config({str(CONFIG)!r})):
    if step.round <= 2:
        print(*step.cohort)
print(step.metrics["eval/accuracy"])
"""
    first, second, accuracy = python(installed, code).splitlines()
    assert first == "ward-0 ward-1 ward-2 ward-3"
    assert second == "ward-4 ward-5 ward-6 ward-7"
    assert float(accuracy) > 0.9


def broken(folder: Path, entry_points: str, module: str = "") -> Path:
    """A package as an installer leaves it."""
    facts = folder / "broken_rules-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-rules\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(entry_points)
    (folder / "broken_rules.py").write_text(module)
    return folder


BROKEN: list[Any] = [
    ("[fedrounds.models]\nnet = no_such_module:Net\n", "", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("[fedrounds.models]\nnet = broken_rules:Net\n", "", "AttributeError"),
    ("[fedrounds.models]\nnet = broken_rules:Net\n", "raise RuntimeError('out of cheese')", "out of cheese"),
    ("[fedrounds.models]\nnet = broken_rules:Net\n", "class Net: pass", "it is no ModelRule"),
    (
        "[fedrounds.models]\nnet = broken_rules:Net\n",
        "from fl_components.models import Mlp\n\nclass Net(Mlp):\n    pass\n",
        "the kind 'mlp' exists already, as Mlp",
    ),
]


@pytest.mark.parametrize(("entry_points", "module", "words"), BROKEN)
def test_a_broken_package_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_points: str, module: str, words: str
) -> None:
    monkeypatch.syspath_prepend(broken(tmp_path, entry_points, module))
    monkeypatch.delitem(sys.modules, "broken_rules", raising=False)
    with pytest.warns(LeftOut) as warned:
        found = union("models", LogisticRegression, Mlp)
    assert {kind_of(each) for each in found.__origin__.__args__} == {"logistic_regression", "mlp"}
    (message,) = [str(each.message) for each in warned]
    assert message.startswith("net of broken-rules (") and "fedrounds.models) is left out" in message
    assert words in message
    sys.modules.pop("broken_rules", None)
    left_out.clear()


def test_the_command_says_in_one_line_what_is_left_out(tmp_path: Path) -> None:
    folder = broken(tmp_path / "broken", "[fedrounds.models]\nnet = no_such_module:Net\n")
    example = ROOT / "examples" / "heart_disease.yaml"
    asked = fedrounds(tmp_path / "home", folder, "config", "check", example, "--set", "model.kind=net", "--json")
    assert asked.returncode == 2
    (warning,) = [line for line in asked.stderr.splitlines() if line.startswith("Warning: ")]
    assert warning.endswith("is left out: ModuleNotFoundError: No module named 'no_such_module'")
    message = json.loads(asked.stdout)["error"]["message"]
    assert message.startswith("model.kind is 'net'; net of broken-rules (no_such_module:Net")


@pytest.mark.slow
def test_a_training_with_it_is_a_run_like_any_other(installed: Path, warm_home: Path) -> None:
    trained = data_of(fedrounds(warm_home, installed, "train", CONFIG, "--set", "rounds=3", "--json"))
    assert (trained["state"], trained["committed_round"]) == ("Completed", 3)
