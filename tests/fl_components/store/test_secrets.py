"""Run secrets: the same key until a round is committed, and from then on none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fl_components.errors import StoreError
from fl_components.store.secrets import RunSecret


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "run"


def test_it_is_for_its_owner_alone(file: Path) -> None:
    RunSecret.create(file).advance(3)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_each_purpose_and_round_has_its_own_key(file: Path) -> None:
    secret, keys = RunSecret.create(file), []
    for round in range(1, 6):
        secret.advance(round)
        keys += [secret.key(round, purpose) for purpose in ("sum", "clip count", "seal")]
    assert len(set(keys)) == 15 and {len(key) for key in keys} == {32}


def test_each_run_has_its_own(tmp_path: Path) -> None:
    assert RunSecret.create(tmp_path / "a").key(1, "sum") != RunSecret.create(tmp_path / "b").key(1, "sum")


def test_it_goes_on_where_it_was(file: Path) -> None:
    first = RunSecret.create(file)
    first.advance(4)
    assert RunSecret.open(file).key(4, "sum") == RunSecret.create(file).key(4, "sum") == first.key(4, "sum")


def test_a_leap_is_the_same_as_steps(file: Path, tmp_path: Path) -> None:
    secret = RunSecret.create(file)
    (tmp_path / "other").write_text(file.read_text())
    other = RunSecret.open(tmp_path / "other")
    secret.advance(5)
    for round in (2, 3, 3, 1, 4, 5):
        other.advance(round)
    assert secret.key(5, "sum") == other.key(5, "sum")


def test_after_it_has_moved_on_no_byte_of_an_old_key_is_left(file: Path) -> None:
    secret, old = RunSecret.create(file), set()
    for round in range(1, 5):
        fields = file.read_text()
        old |= {fields.split('"key": "')[1][:64], secret.key(round, "sum").hex()}
        secret.advance(round + 1)
    found = [path.read_text() for path in file.parent.iterdir()]
    assert len(found) == 1 and not any(key in found[0] for key in old)


def test_what_a_killed_process_left_goes(file: Path) -> None:
    """But nothing of another run, whatever it is called."""
    RunSecret.create(file), RunSecret.create(file.with_name("run.next-1")), RunSecret.create(file.with_name("run.1"))
    left, others = (file.with_name(f".{name}.{'0a' * 16}") for name in ("run", "run.1"))
    for each in (left, others):
        each.write_text('{"round": 2, "key": "00"}')
    RunSecret.open(file)
    assert sorted(each.name for each in file.parent.iterdir()) == [others.name, "run", "run.1", "run.next-1"]


def test_a_round_that_is_over_has_no_key(file: Path) -> None:
    secret = RunSecret.create(file)
    secret.advance(7)
    for round in (6, 8):
        with pytest.raises(
            StoreError, match=f"round {round} of this run has no key: its secret is at round 7"
        ) as caught:
            secret.key(round, "sum")
        assert "restored from a backup" in str(caught.value.hint)


def test_one_that_is_missing_or_damaged(file: Path) -> None:
    with pytest.raises(StoreError, match="is not here: what it has sealed cannot be opened"):
        RunSecret.open(file)
    RunSecret.create(file)
    for text in ("", "{}", '{"round": 1, "key": "xyz"}', "[]"):
        file.write_text(text)
        with pytest.raises(StoreError, match="cannot be read"):
            RunSecret.open(file)


def test_a_write_that_fails_leaves_it_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = RunSecret.create(file)
    key = secret.key(1, "sum")

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space"):
            secret.advance(2)
    assert secret.key(1, "sum") == RunSecret.open(file).key(1, "sum") == key
