"""The pages in docs/: their configuration is the schema's, their blocks parse, and their example of a rule works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel, TypeAdapter

from fedrounds.fl_components.aggregation import Aggregation
from fedrounds.fl_components.aggregation.prepare import Preparation
from fedrounds.fl_components.arrays import IGNORED
from fedrounds.fl_components.compression import Compression
from fedrounds.fl_components.compression.sparse import Values
from fedrounds.fl_components.config import FederationConfig, load_config, parse_config
from fedrounds.fl_components.data import Data
from fedrounds.fl_components.data.partition import Partition
from fedrounds.fl_components.executors import Execution
from fedrounds.fl_components.models import Model
from fedrounds.fl_components.population import Availability, Network, Selection, Stragglers
from fedrounds.fl_components.privacy import AnyClipping, ExamplePrivacy, Privacy
from fedrounds.fl_components.rules import import_attribute
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server_optimizers import ServerOptimizer
from fedrounds.fl_components.simulate import simulate
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.task import Tally, Task
from fedrounds.fl_components.training.objectives import Objective
from fedrounds.fl_components.training.schedules import Schedule
from tests.support import ROOT, parameters, public_data

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.yaml"))
BASE: dict[str, Any] = {
    "name": "page",
    "rounds": 1,
    "data": {"kind": "heart_disease"},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "epochs": 1},
}


def blocks(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))
    ]


def documented(heading: str) -> dict[str, str]:
    """The fields in the table below a heading of docs/configuration.md, each with its default as it is written."""
    (section,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", CONFIGURATION, re.M | re.S)
    return {name: default for name, default in re.findall(r"^\| `([\w.]+)` \| (.*?) \|", section, re.M)}


UNIONS: dict[str, Any] = {
    "data": Data,
    "data.partition": Partition,
    "task": Task,
    "model": Model,
    "training.privacy": ExamplePrivacy,
    "training.objective": Objective,
    "training.schedule": Schedule,
    "selection": Selection,
    "simulation.availability": Availability,
    "aggregation": Aggregation,
    "aggregation.prepare": Preparation,
    "compression": Compression,
    "server_optimizer": ServerOptimizer,
    "privacy": Privacy,
    "privacy.clipping": AnyClipping,
    "execution": Execution,
}

INNER: dict[str, Any] = {"compression.values": Values, "broadcast.values": Compression}  # documented as others are


def rules() -> list[Any]:
    """Every rule that a configuration can hold: its heading, its group, its model."""
    found = []
    for group, union in UNIONS.items():
        for model in get_args(union.__origin__) or (union.__origin__,):
            heading = f"{group}: {model.model_fields['kind'].default}"
            found.append(pytest.param(heading, group, model, id=heading))
    for group, model in {"simulation.network": Network, "simulation.stragglers": Stragglers}.items():
        found.append(pytest.param(group, group, model, id=group))
    for group, field in FederationConfig.model_fields.items():
        if group not in UNIONS and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found.append(pytest.param(group, group, field.annotation, id=group))
    return found


@pytest.mark.parametrize(("heading", "group", "model"), rules())
def test_every_field_of_a_rule_is_documented_with_its_default(heading: str, group: str, model: type[BaseModel]) -> None:
    fields = dict(model.model_fields)
    if ":" in heading:
        del fields["kind"]  # it is the heading
    rows = documented(heading)
    assert rows.keys() == {f"{group}.{name}" for name in fields}
    for name, field in fields.items():
        written = rows[f"{group}.{name}"]
        if field.is_required():
            assert written == "required", name
        else:
            default = field.get_default(call_default_factory=True)
            value = list(default) if isinstance(default, tuple) else default
            shown = yaml.safe_load(written.strip("`"))
            union = None if isinstance(default, tuple) else (UNIONS | INNER).get(f"{group}.{name}")
            assert (shown if union is None else TypeAdapter(union).validate_python(shown)) == value, name


def test_every_field_of_an_experiment_is_documented() -> None:
    rows = documented("The experiment")
    assert list(rows) == list(FederationConfig.model_fields)
    required = {name for name, field in FederationConfig.model_fields.items() if field.is_required()}
    assert {name for name, default in rows.items() if default == "required"} == required
    assert yaml.safe_load(rows["seed"].strip("`")) == FederationConfig.model_fields["seed"].default


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_configuration_on_a_page_is_one(text: str) -> None:
    parse_config(BASE | {"data": {"kind": "mnist"}} | yaml.safe_load(text))  # of as many clients as the pages speak of


@pytest.mark.parametrize("text", blocks("python"))
def test_python_on_a_page_compiles(text: str) -> None:
    compile(text, "page", "exec")


@pytest.mark.parametrize("name", parameters(EXAMPLES, quick=("heart_disease", "compressed", "heart_disease_private")))
def test_an_example_loads_its_data_and_fits_its_model(name: str) -> None:
    from fedrounds.deployments import api

    with public_data():
        checked = api.check_config(str(ROOT / "examples" / f"{name}.yaml"), data=True)
    assert checked["cohort_size"] >= 1
    assert checked["num_parameters"] > 0


@pytest.mark.ci
def test_the_digits_example_learns_what_it_says() -> None:
    config = load_config(ROOT / "examples" / "digits.yaml")
    *_, last = simulate(config)
    assert last.metrics["eval/accuracy"] == pytest.approx(0.97, abs=0.015)


def test_the_rule_on_the_page_is_the_one_in_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    (text,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert text == (ROOT / "fl_components" / "server_optimizers" / "fedavgm.py").read_text()


def test_the_metric_of_the_extension_s_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    _, text = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "metric_of_the_page.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    tally = Tally(import_attribute("metric_of_the_page:TopThree", "task")().metrics())
    scores = torch.eye(5) + torch.tensor([0.3, 0.2, 0.1, 0.05, 0.0])
    tally.add(scores[None], torch.tensor([[0, 1, 4, 1, IGNORED]]))
    assert (tally.values()["top_3"], tally.values()["accuracy"]) == (0.75, 0.5)


def test_the_rules_of_the_extension_s_page_are_those_of_the_example() -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    text, *_ = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    code = (ROOT / "examples" / "extension" / "hospital_rules" / "quadratic.py").read_text()
    for part in text.split("\n\n\n")[1:]:
        assert part.strip() in re.sub(r'    """.*?"""\n\n', "", code, flags=re.S)


def test_the_rule_on_the_page_trains_through_the_stages(home: Path) -> None:
    from fedrounds.flows.round import walk

    config = parse_config(BASE | {"rounds": 3, "server_optimizer": {"kind": "fedavgm", "momentum": 0.8}})
    with Store.open() as store, open_run(store, "r", config=config) as run:
        for round in range(1, 4):
            walk(stages, run, round)
        state = run.state()
    assert state.server_optimizer.keys() == {"v"}
    *_, last = simulate(config)
    np.testing.assert_allclose(state.params_D, last.params_D, atol=1e-5)


def test_the_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    named = {name for name in re.findall(r"`([\w./]+/[\w./]*|\w+\.py)`", text) if "*" not in name}
    folders = [ROOT, ROOT / "fl_components", *(ROOT / "fl_components").iterdir(), ROOT / "deployments"]
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert len(named) > 40 and not missing


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_to_a_heading_has_its_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        linked = (page.parent / target).resolve() if target else page
        assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_the_glossary_is_sorted_and_names_a_term_once() -> None:
    terms = re.findall(r"^### (.*)$", (ROOT / "docs" / "glossary.md").read_text(), re.M)
    assert len(terms) > 50
    assert terms == sorted(set(terms), key=lambda term: term.lower().replace("-", " "))


def test_the_pages_that_explain_a_round_exist_and_are_few() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    (section,) = re.findall(r"^## Where to add something\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    for path in re.findall(r"`((?:fl_components|flows|tests)/[\w/.]*)`", section):
        assert (ROOT / path).exists(), path
    files = re.findall(r"^\d\. `([\w/.]+)`", section, re.M)
    assert files[0] == "flows/round.py"
    assert len(files) <= 8
