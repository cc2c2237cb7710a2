"""Where the files of public data sets are found, and what is said where they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedrounds.fl_components.data.folders import find_file, find_folder
from fedrounds.fl_components.data.heart_disease import HeartDisease
from fedrounds.fl_components.data.leaf import Leaf
from fedrounds.fl_components.errors import ConfigError, DataError

FILES = ["images", "labels"]


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.fixture
def places(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    home.mkdir(mode=0o700, exist_ok=True)  # one that others may enter is refused
    working = tmp_path / "project" / "work"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    monkeypatch.setenv("FEDROUNDS_DATA", str(tmp_path / "public"))
    return [
        tmp_path / "public" / "mnist",
        home / "data" / "mnist",
        working / "data" / "mnist",
        tmp_path / "project" / "shared" / "data" / "mnist",
    ]


def test_the_first_place_that_has_the_files_is_taken(places: list[Path]) -> None:
    for place in reversed(places):
        put(place, "images.gz", "labels")
        assert find_folder("mnist", FILES) == place


def test_a_configured_folder_is_the_only_one(places: list[Path], tmp_path: Path) -> None:
    put(places[0], *FILES)
    mine = put(tmp_path / "mine", *FILES)
    assert find_folder("mnist", FILES, str(mine)) == mine
    with pytest.raises(DataError, match=r"the files of mnist are not in .*elsewhere") as caught:
        find_folder("mnist", FILES, str(tmp_path / "elsewhere"))
    assert str(places[0]) not in caught.value.message
    assert caught.value.hint is not None
    assert "or leave data.folder out and run `fedrounds data get mnist`" in caught.value.hint


def test_where_they_are_nowhere_it_says_which_and_where_to_put_them(
    places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError) as caught:
        find_folder("mnist", FILES)
    assert all(str(place) in caught.value.message for place in places)
    assert caught.value.hint == (
        f"put images and labels into {places[0]}, as they are or with .gz after the name, or let `fedrounds data get "
        "mnist` do so; the variable FEDROUNDS_DATA or the field data.folder names another folder"
    )
    monkeypatch.delenv("FEDROUNDS_DATA")
    with pytest.raises(DataError) as caught:
        find_folder("mnist", FILES)
    assert caught.value.hint is not None and f"into {places[1]}," in caught.value.hint
    with pytest.raises(DataError) as caught:
        find_folder("femnist", FILES)  # nobody publishes its files
    assert caught.value.hint is not None and "data get" not in caught.value.hint


def test_a_place_with_some_of_the_files_is_not_passed_over(places: list[Path]) -> None:
    put(places[0], "images")
    put(places[1], *FILES)
    with pytest.raises(DataError, match="has some files of mnist and not labels"):
        find_folder("mnist", FILES)


def test_the_file_itself_comes_before_the_compressed_one(tmp_path: Path) -> None:
    assert find_file(tmp_path, "a") is None
    put(tmp_path, "a.gz")
    assert find_file(tmp_path, "a") == tmp_path / "a.gz"
    put(tmp_path, "a")
    assert find_file(tmp_path, "a") == tmp_path / "a"


@pytest.mark.usefixtures("places")
def test_the_home_of_an_unknown_account_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROUNDS_DATA", "~nosuch-account/x")
    with pytest.raises(ConfigError, match="FEDROUNDS_DATA is '~nosuch-account/x'") as refused:
        find_folder("mnist", FILES)
    assert refused.value.hint == "write the whole path"
    for rule in (Leaf(folder="~nosuch-account/x"), HeartDisease(folder="~nosuch-account/x")):
        with pytest.raises(ConfigError, match=r"data\.folder is '~nosuch-account/x'"):
            rule.load(0)


def test_a_folder_that_cannot_be_looked_up_is_refused(tmp_path: Path) -> None:
    too_long = str(tmp_path / ("x" * 300))
    for load in (
        lambda: find_folder("mnist", FILES, too_long),
        lambda: Leaf(folder=too_long).load(0),
        lambda: HeartDisease(folder=too_long).load(0),
    ):
        with pytest.raises(DataError, match="cannot be read: File name too long"):
            load()
    with pytest.raises(DataError, match="cannot be read: embedded null byte"):
        HeartDisease(folder="a\0b").load(0)
