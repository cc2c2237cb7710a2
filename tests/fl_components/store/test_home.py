from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.errors import ConfigError, StoreError
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.store import home as home_folder
from fedrounds.fl_components.store.keys import SigningKey


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


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o2775, 0o770, 0o1777])
def test_a_home_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "a volume"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(StoreError, match=f"has the mode {mode & 0o777:04o}: other accounts may enter it") as caught:
        Store.open(folder)
    assert f"chmod 700 '{folder}'" in (caught.value.hint or "")
    assert list(folder.iterdir()) == []
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(StoreError, match="other accounts may enter it"):
        home_folder(tmp_path / "link")
    assert home_folder(folder / "fedrounds").stat().st_mode & 0o777 == 0o700  # what the hint says
    folder.chmod(0o700)
    Store.open(folder).close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_all_files_are_for_their_owner_alone(home: Path, run_values: dict[str, Any], umask: int) -> None:
    before = os.umask(umask)
    try:
        with Store.open() as store:
            store.create_run(run_id="r", **run_values)
            store.anchor()
            store.keys.trust(SigningKey(b"7" * 32).public.hex())
            modes = {path: path.stat().st_mode & 0o777 for path in [home, *home.rglob("*")]}
    finally:
        os.umask(before)
    names = {path.name for path in modes}
    assert {"fedrounds.db", "fedrounds.db-wal", "hub.key", "trusted_keys", "journal.anchor", "blobs"} <= names
    assert {path: mode for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}


def test_a_database_elsewhere_that_others_may_read_is_refused(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "srv"
    folder.mkdir()
    folder.chmod(0o755)
    url = f"sqlite:///{folder / 'fedrounds.db'}"
    Store.open(database_url=url).close()
    assert (folder / "fedrounds.db").stat().st_mode & 0o777 == 0o600
    (folder / "fedrounds.db").chmod(0o644)
    with pytest.raises(StoreError, match=r"fedrounds.db has the mode 0644: other accounts may read it") as caught:
        Store.open(database_url=url)
    assert "chmod 600" in (caught.value.hint or "")
    folder.chmod(0o700)  # nobody else comes that far
    Store.open(database_url=url).close()


@pytest.mark.parametrize("value", ["home", "./home", "../home", "."])
def test_a_relative_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDROUNDS_HOME", value)
    with pytest.raises(ConfigError, match=r"relative path .*another home, with other privacy budgets") as caught:
        Store.open()
    assert caught.value.hint == f"set FEDROUNDS_HOME={tmp_path / value}"
    assert list(tmp_path.iterdir()) == []


def test_a_home_below_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FEDROUNDS_HOME", "~/a/b")
    assert home_folder() == tmp_path / "a" / "b"


class TestDurability:
    """A name is flushed with the folder that holds it: after a power cut the file is there."""

    @pytest.fixture
    def flushed(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The files and folders that are flushed, in order."""
        found: list[str] = []
        fsync = os.fsync

        def recorded(descriptor: int) -> None:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", recorded)
        return found

    def test_of_the_home_and_the_hubs_key(self, tmp_path: Path, flushed: list[str]) -> None:
        home = tmp_path / "a" / "home"
        with Store.open(home) as store:
            assert {str(tmp_path), str(tmp_path / "a"), str(home)} <= set(flushed)
            flushed.clear()
            store.keys.signing  # noqa: B018
        assert flushed[0] == str(home)  # which holds `secrets`
        assert flushed[-1] == str(home / "secrets")
        assert flushed[1].startswith(str(home / "secrets" / "hub.key"))

    def test_of_a_key_that_another_process_has_just_linked(self, tmp_path: Path, flushed: list[str]) -> None:
        with Store.open(tmp_path) as store:
            (tmp_path / "secrets").mkdir(mode=0o700)
            (tmp_path / "secrets" / "hub.key").write_bytes(bytes(32))
            flushed.clear()
            store.keys.signing  # noqa: B018
        assert flushed == [str(tmp_path / "secrets")]

    def test_of_a_trusted_key(self, tmp_path: Path, flushed: list[str]) -> None:
        with Store.open(tmp_path) as store:
            store.keys.trust(SigningKey(b"7" * 32).public.hex())
            assert flushed[-1] == str(tmp_path / "secrets")
            store.keys.trust(SigningKey(b"8" * 32).public.hex())
            assert len(store.keys.trusted) == 3
