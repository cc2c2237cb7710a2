"""Run secrets: the same key until a round is committed, and from then on none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.randomness import hkdf
from fedrounds.fl_components.store.secrets import RunSecret


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "runs"


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_it_is_for_its_owner_alone(folder: Path) -> None:
    RunSecret.create(folder, "r").advance(3)
    assert only_file(folder).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_each_purpose_and_round_has_its_own_key(folder: Path) -> None:
    secret, keys = RunSecret.create(folder, "r"), []
    for round in range(1, 6):
        secret.advance(round)
        keys += [secret.key(round, purpose) for purpose in ("sum", "clip count", "seal")]
    assert len(set(keys)) == 15 and {len(key) for key in keys} == {32}


CONTEXTS = st.lists(st.text(max_size=4) | st.integers(), max_size=3)


@given(st.tuples(st.text(max_size=4), CONTEXTS), st.tuples(st.text(max_size=4), CONTEXTS))
def test_keys_are_equal_where_purpose_and_context_are(one: Any, other: Any) -> None:
    """However the names could be joined: "a" "b c" is not "a b" "c"."""
    keys = [hkdf(bytes(32), purpose, *context) for purpose, context in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_its_id_is_a_commitment_to_the_first_key(folder: Path) -> None:
    secrets = [RunSecret.create(folder, "r") for _ in range(2)]
    assert secrets[0].id != secrets[1].id and secrets[0].key(1, "sum") != secrets[1].key(1, "sum")
    for secret in secrets:
        file = folder / f"r@{secret.id}"
        fields = json.loads(file.read_text())
        assert hkdf(bytes.fromhex(fields["key"]), "identity").hex()[:32] == secret.id
        file.write_text(json.dumps(fields | {"key": "00" * 32}))
        with pytest.raises(StoreError, match="does not hold the secret with which run r began"):
            RunSecret.open(folder, "r", secret.id)


def test_it_goes_on_where_it_was(folder: Path) -> None:
    first = RunSecret.create(folder, "r")
    first.advance(4)
    again = RunSecret.open(folder, "r", first.id)
    assert again.key(4, "sum") == first.key(4, "sum") and again.round == 4


def test_a_leap_is_the_same_as_steps(folder: Path, tmp_path: Path) -> None:
    secret = RunSecret.create(folder, "r")
    (tmp_path / only_file(folder).name).write_text(only_file(folder).read_text())
    other = RunSecret.open(tmp_path, "r", secret.id)
    secret.advance(5)
    for round in (2, 3, 3, 1, 4, 5):
        other.advance(round)
    assert secret.key(5, "sum") == other.key(5, "sum")


def test_after_it_has_moved_on_no_byte_of_an_old_key_is_left(folder: Path) -> None:
    secret, old = RunSecret.create(folder, "r"), set()
    for round in range(1, 5):
        old |= {json.loads(only_file(folder).read_text())["key"], secret.key(round, "sum").hex()}
        secret.advance(round + 1)
    assert not any(key in only_file(folder).read_text() for key in old)


def test_one_that_is_destroyed_is_overwritten_and_gone(folder: Path, tmp_path: Path) -> None:
    secret = RunSecret.create(folder, "r")
    other = RunSecret.create(folder, "r.1")
    file = folder / f"r@{secret.id}"
    (tmp_path / "link").hardlink_to(file)  # what the disk holds once the name is gone
    secret.destroy()
    assert set((tmp_path / "link").read_bytes()) == {0}
    assert [each.name for each in folder.iterdir()] == [f"r.1@{other.id}"]
    secret.destroy()


def test_what_a_killed_process_left_goes(folder: Path) -> None:
    """But nothing of another run, whatever it is called."""
    secret = RunSecret.create(folder, "r")
    names = {secret.id, *(f"{RunSecret.create(folder, run).id}" for run in ("r.1", "r.next-1"))}
    left, others = (folder / f".{name}.{'0a' * 16}" for name in (f"r@{secret.id}", "r.1@ab"))
    for each in (left, others):
        each.write_text('{"round": 2, "key": "00"}')
    RunSecret.open(folder, "r", secret.id)
    found = {each.name for each in folder.iterdir()}
    assert left.name not in found and others.name in found and len(found) == len(names) + 1


def test_a_round_that_is_over_has_no_key(folder: Path) -> None:
    secret = RunSecret.create(folder, "r")
    secret.advance(7)
    for round in (6, 8):
        with pytest.raises(StoreError, match=f"round {round} of this run has no key: its secret is at round 7"):
            secret.key(round, "sum")


def test_one_that_is_missing_or_damaged(folder: Path) -> None:
    with pytest.raises(StoreError, match="is missing in"):
        RunSecret.open(folder, "r", "0" * 32)
    secret = RunSecret.create(folder, "r")
    for text in ("", "{}", '{"id": "0", "round": 1, "key": "xyz"}', "[]"):
        only_file(folder).write_text(text)
        with pytest.raises(StoreError, match="cannot be read"):
            RunSecret.open(folder, "r", secret.id)


def test_a_write_that_fails_leaves_it_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = RunSecret.create(folder, "r")
    key = secret.key(1, "sum")

    def fails(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space"):
            secret.advance(2)
    assert secret.key(1, "sum") == RunSecret.open(folder, "r", secret.id).key(1, "sum") == key
