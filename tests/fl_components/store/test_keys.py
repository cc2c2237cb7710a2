"""The hub's key, and the trust in others'."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fedrounds.fl_components.errors import ConfigError, StoreError
from fedrounds.fl_components.store.keys import KeyRing, SigningKey, is_signed, key_id


def test_rfc_8032() -> None:
    """Section 7.1, test 2: the public key, and the signature of the one byte 0x72."""
    key = SigningKey(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.public.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert key.sign("r") == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_it_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    folder, found = tmp_path / "secrets", []
    threads = [threading.Thread(target=lambda: found.append(KeyRing(folder).signing.public)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [each.name for each in folder.iterdir()] == ["hub.key"]
    assert (folder / "hub.key").stat().st_mode & 0o777 == 0o600


def test_another_hub_is_trusted_on_request(tmp_path: Path) -> None:
    ours, theirs = KeyRing(tmp_path / "ours"), KeyRing(tmp_path / "theirs")
    assert set(ours.trusted) == {ours.signing.id}
    for _ in range(2):
        assert ours.trust(theirs.signing.public.hex()) == theirs.signing.id
    assert KeyRing(tmp_path / "ours").trusted == {each.signing.id: each.signing.public for each in (ours, theirs)}
    assert set(theirs.trusted) == {theirs.signing.id}


@pytest.mark.parametrize("text", ["", "zz", "00", "00" * 33])
def test_what_is_no_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not a public key"):
        KeyRing(tmp_path).trust(text)


def test_a_damaged_key(tmp_path: Path) -> None:
    (tmp_path / "hub.key").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"hub\.key is damaged"):
        _ = KeyRing(tmp_path).signing


@pytest.mark.parametrize("signature", ["", "00", "zz", "00" * 64])
def test_what_is_no_signature(signature: str) -> None:
    assert not is_signed("head", signature, SigningKey(bytes(32)).public)
    assert len(key_id(bytes(32))) == 16
