from __future__ import annotations

import os
from pathlib import Path

import pytest

from fl_components.errors import StoreError
from fl_components.store import home as home_folder


def test_home_is_made_for_its_owner_alone(home: Path) -> None:
    assert not home.exists()
    assert home_folder() == home
    assert home.stat().st_mode & 0o777 == 0o700
    assert home_folder() == home  # again


def test_home_defaults_to_the_users_folder_never_the_working_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDROUNDS_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    assert home_folder() == tmp_path / "user" / ".fedrounds"


def test_a_home_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="cannot be made") as caught:
        home_folder(file / "home")
    assert "FEDROUNDS_HOME" in (caught.value.hint or "")
    with pytest.raises(StoreError, match="cannot be made"):
        home_folder(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_home_that_cannot_be_written_to_is_a_store_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="cannot be written to"):
            home_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)
