"""docs/own_data.md, word for word: its files are made and its commands run, in the order of the page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedrounds.fl_components.config import load_config
from fedrounds.fl_components.data import Tables
from fedrounds.fl_components.errors import DataError
from tests.support import ROOT, data_of, run_fedrounds

PAGE = (ROOT / "docs" / "own_data.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def block(language: str, number: int = 0) -> str:
    return [text for name, text in BLOCKS if name == language][number]


def command(beginning: str) -> list[str]:
    """The words after `fedrounds` of the page's one command that begins so."""
    (found,) = [line for line in COMMANDS if line.startswith(beginning)]
    return shlex.split(found)[1:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reader's folder, that `warm_home` is in as well, once the page's first command has been run."""
    folder = tmp_path / "warm"
    folder.mkdir(exist_ok=True)
    (folder / "make_wards.py").write_text(block("python"))
    (folder / "wards.yaml").write_text(block("yaml"))
    python, *arguments = shlex.split(COMMANDS[0])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
    return folder


def test_the_folder_is_what_the_page_shows(folder: Path) -> None:
    assert sorted(file.name for file in (folder / "wards").iterdir()) == [
        "east.csv",
        "north.csv",
        "south.csv",
        "west.csv",
    ]
    assert (folder / "wards" / "north.csv").read_text().startswith(block("csv"))


@pytest.mark.ci
def test_the_check_passes(folder: Path) -> None:
    found = data_of(run_fedrounds(folder / "home", *command("fedrounds config check"), "--json"))
    assert [client["id"] for client in found["clients"]] == ["east", "north", "south", "west"]
    assert (found["num_classes"], found["num_parameters"]) == (2, 10)


def test_a_wrong_cell_is_named_as_the_page_shows(folder: Path) -> None:
    south = folder / "wards" / "south.csv"
    lines = south.read_text().splitlines()
    lines[16] = '"6,5"' + lines[16][lines[16].index(",") :]
    south.write_text("\n".join(lines))
    with pytest.raises(DataError) as refused:
        load_config(folder / "wards.yaml").data.load(seed=0)
    (error,), (hint,) = (re.findall(rf"^    {word}: +(.*)$", PAGE, re.M) for word in ("Error", "Hint"))
    assert refused.value.message == error.replace("/home/you", str(folder))
    assert refused.value.hint == hint


def test_the_german_export_is_read_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "kliniken").mkdir()
    (tmp_path / "kliniken" / "Köln.csv").write_text(block("text"), encoding="cp1252", newline="\r\n")
    fields = yaml.safe_load(block("yaml", 1))["data"]
    data = Tables.model_validate(fields | {"folder": str(tmp_path / "kliniken"), "test_fraction": 0.0}).load(seed=0)
    expected = np.array([[11 / 15, 0.6, 0, 1, 0, -1.47], [4 / 15, 0, 1, 0, 1, 1.4]])
    np.testing.assert_allclose(data.x_train, expected, rtol=1e-6)
    assert (data.y_train.tolist(), data.class_names) == ([0, 1], ("nein", "ja"))


@pytest.mark.slow
def test_it_trains_to_what_the_page_says(folder: Path, warm_home: Path) -> None:
    trained = data_of(run_fedrounds(warm_home, *command("fedrounds train"), "--json"))
    accuracy, majority = map(float, re.findall(r"(0\.\d\d) on the rows to test on,.*?reaches (0\.\d\d)", PAGE, re.S)[0])
    assert trained["state"] == "Completed"
    assert trained["metrics"]["eval/accuracy"] == pytest.approx(accuracy, abs=0.04)
    assert trained["baselines"]["pooled_majority"] == pytest.approx(majority, abs=0.005)
    shown = data_of(run_fedrounds(warm_home, *command("fedrounds show"), "--json"))
    assert shown["params_digest"] == trained["params_digest"]
