"""The example package in examples/extension: installed as a user would, its four rules are known and train."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from fedrounds.fl_components.errors import PluginSkipped
from fedrounds.fl_components.models import LogisticRegression, Mlp
from fedrounds.fl_components.rules import union
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


@pytest.mark.ci
def test_its_configuration_makes_sense_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    checked = data_of(fedrounds(tmp_path / "home", installed, "config", "check", CONFIG, "--data", "--json"))
    assert (checked["num_clients"], checked["cohort_size"], checked["num_parameters"]) == (8, 4, 10)
    schema = json.dumps(data_of(fedrounds(tmp_path / "home", installed, "config", "schema", "--json")))
    for kind in ("wards", "quadratic", "capped_mean", "round_robin"):
        assert f'"{kind}"' in schema


@pytest.mark.ci
def test_its_kinds_are_unknown_elsewhere(tmp_path: Path) -> None:
    refused = fedrounds(tmp_path / "home", None, "config", "check", CONFIG)
    assert refused.returncode == 2
    assert "data.kind is 'wards'" in refused.stderr


@pytest.mark.ci
def test_its_four_rules_train(installed: Path) -> None:
    code = f"""
from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.simulate import simulate
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
        "from typing import Literal\nfrom fedrounds.fl_components.models import ModelRule\n"
        "class Net(ModelRule):\n    kind: Literal['net'] = 'net'\n",
        "it has no build",
    ),
    (
        "[fedrounds.models]\nnet = broken_rules:Net\n",
        "from typing import Literal\nfrom fedrounds.fl_components.models import Mlp\n"
        "class Net(Mlp):\n    kind: Literal['net'] = 'net'\n    of: memoryview\n",
        "Unable to generate pydantic-core schema for <class 'memoryview'>",
    ),
    (
        "[fedrounds.models]\nnet = broken_rules:Net\n",
        "from fedrounds.fl_components.models import Mlp\n\nclass Net(Mlp):\n    pass\n",
        "the kind 'mlp' exists already, as Mlp",
    ),
]


@pytest.mark.parametrize(("entry_points", "module", "words"), BROKEN)
def test_a_broken_package_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry_points: str, module: str, words: str
) -> None:
    monkeypatch.syspath_prepend(broken(tmp_path, entry_points, module))
    monkeypatch.delitem(sys.modules, "broken_rules", raising=False)
    with pytest.warns(PluginSkipped) as warned:
        kinds = TypeAdapter(union("models", LogisticRegression, Mlp)).json_schema()["discriminator"]["mapping"]
    assert kinds.keys() == {"logistic_regression", "mlp"}
    (message,) = [str(each.message) for each in warned]
    assert message.startswith("net of broken-rules (") and "fedrounds.models) is left out" in message
    assert words in message
    sys.modules.pop("broken_rules", None)


@pytest.mark.ci
def test_the_command_says_what_is_left_out_and_a_configuration_why(tmp_path: Path) -> None:
    """In a family with many built-in rules, in one with a single rule, and in the field of a rule."""
    asked_for = {"models": "model", "aggregation": "aggregation", "partitions": "data.partition"}
    entry_points = "".join(f"[fedrounds.{family}]\n{family}_net = no_such_module:Net\n" for family in asked_for)
    folder = broken(tmp_path / "broken", entry_points)
    overrides = [f"--set={field}.kind={family}_net" for family, field in asked_for.items()]
    example = ROOT / "examples" / "digits.yaml"
    asked = fedrounds(tmp_path / "home", folder, "config", "check", example, *overrides, "--json")
    assert asked.returncode == 2
    warnings = [line for line in asked.stderr.splitlines() if line.startswith("Warning: ")]
    message = json.loads(asked.stdout)["error"]["message"]
    assert len(warnings) == 3
    for family, field in asked_for.items():
        reason = (
            f"{family}_net of broken-rules (no_such_module:Net, group fedrounds.{family}) is left out: "
            "ModuleNotFoundError: No module named 'no_such_module'"
        )
        assert f"Warning: {reason}" in warnings
        assert f"{field}.kind is '{family}_net'; {reason}" in message


@pytest.mark.slow
def test_a_rule_may_hold_another_of_its_family(tmp_path: Path) -> None:
    module = """
from typing import Literal
from fedrounds.fl_components.data.partition import Iid, Partition

class Within(Iid):
    kind: Literal["within"] = "within"
    inner: Partition
"""
    folder = broken(tmp_path, "[fedrounds.partitions]\nwithin = broken_rules:Within\n", module)
    code = """
import warnings; warnings.simplefilter("error")
from fedrounds.fl_components.data import Digits
inner = {"kind": "within", "num_clients": 2, "inner": {"kind": "iid", "num_clients": 3}}
print(Digits(partition={"kind": "within", "num_clients": 1, "inner": inner}).partition.inner.inner.num_clients)
"""
    assert python(folder, code) == "3\n"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one_module", "fedrounds.fl_components.data", "fedrounds.fl_components.config"])
def test_rules_of_several_families_may_share_a_module(first: str, tmp_path: Path) -> None:
    """Whatever is imported first: the module needs the families, and the families name its rules."""
    rules = {"data": "Wards", "models": "Quadratic", "aggregation": "CappedMean", "selection": "RoundRobin"}
    entry_points = "".join(f"[fedrounds.{family}]\nname = one_module:{rule}\n" for family, rule in rules.items())
    files = [
        EXTENSION / "hospital_rules" / f"{name}.py" for name in ("wards", "quadratic", "capped_mean", "round_robin")
    ]
    in_one = "\n".join(file.read_text().replace("from __future__ import annotations", "") for file in files)
    folder = broken(tmp_path, entry_points)
    (folder / "one_module.py").write_text(in_one)
    code = f"""
import warnings; warnings.simplefilter("error")
import {first}
from fedrounds.fl_components.config import load_config
config = load_config({str(CONFIG)!r})
print(*[type(each).__name__ for each in (config.data, config.model, config.aggregation, config.selection)])
"""
    assert python(folder, code).split() == list(rules.values())


def test_the_page_says_what_the_example_does() -> None:
    """Its class is the example's without the docstrings; its table names what a rule has to write."""
    page = (ROOT / "docs" / "extending.md").read_text()
    in_the_page, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert program(in_the_page) == program((EXTENSION / "hospital_rules" / "quadratic.py").read_text())
    (entry_point,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert entry_point in (EXTENSION / "pyproject.toml").read_text()
    rows = re.findall(r"^\| `fedrounds\.(\w+)` \| `([\w.]+)\.(\w+)` \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 11
    for _, module, name, methods in rows:
        assert getattr(import_module(module), name).__abstractmethods__ == set(re.findall(r"`(\w+)`", methods)), name


def program(source: str) -> str:
    """What `source` does: without docstrings, comments, blank lines and `from __future__`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")]
    return ast.dump(tree)


@pytest.mark.slow
def test_a_training_with_it_is_a_run_like_any_other(installed: Path, warm_home: Path) -> None:
    trained = data_of(fedrounds(warm_home, installed, "train", CONFIG, "--set", "rounds=3", "--json"))
    assert (trained["state"], trained["committed_round"]) == ("Completed", 3)
