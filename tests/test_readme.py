"""The README's own data and model, taken from the page and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT, data_of, run_fedrounds

README = (ROOT / "README.md").read_text()


def block(language: str, holding: str) -> str:
    """The one block of that language in the README that holds some text."""
    (found,) = [text for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S) if holding in text]
    return found


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The folder that a reader of the README has: mine.py and mine.yaml."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.py").write_text(block("python", "def load"))
    (folder / "mine.yaml").write_text(block("yaml", "name: mine"))
    return folder


@pytest.mark.ci
def test_your_own_data_and_model_train(mine: Path, warm_home: Path) -> None:
    data = data_of(run_fedrounds(warm_home, "train", mine / "mine.yaml", "--set", "rounds=8", "--json"))
    assert data["state"] == "Completed"
    assert data["metrics"]["eval/accuracy"] > 0.85  # guessing: a half
    assert data["model_uri"] == "models:/mine/1"


def test_it_is_about_twenty_lines() -> None:
    lines = [line for text in (block("python", "def load"), block("yaml", "name: mine")) for line in text.splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 22


def test_every_picture_and_page_that_is_linked_to_is_there() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_table_of_commands_names_all_that_there_are() -> None:
    from fedrounds.deployments.cli.app import build

    app = build()
    commands = {name for name in app if not name.startswith("-")}
    groups = {name: {sub for sub in app[name] if not sub.startswith("-")} for name in commands}
    expected = {f"{name} {sub}" for name in commands for sub in groups[name]}
    expected |= {name for name in commands if app[name].default_command is not None}
    rows = re.findall(r"^\| `fedrounds ([^`]+)`", README, re.M)
    assert {" ".join(re.findall(r"(?<!\S)[a-z]+", row.partition("[")[0])) for row in rows} == expected
