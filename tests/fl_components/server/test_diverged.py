"""A run that diverges after its seal leaves no sum without noise, and no key that would open one."""

from __future__ import annotations

import pytest

from fl_components.errors import Diverged, RunNotFound
from fl_components.server import stages
from fl_components.server.hub import open_hub
from fl_components.store import Store
from flows.round import walk
from tests.fl_components.server.wards import TERMS, WARDS, Begin, secret_file

TOO_LARGE = {"learning_rate": 1e41}


def test_the_seal_and_the_secret_are_erased(begin: Begin, store: Store) -> None:
    store.set_budget("wards", TERMS, reason="x", by="ada")
    hub = begin(data=WARDS, server_optimizer=TOO_LARGE)
    hub.lease.begin_attempt()
    secret = secret_file(store)
    with pytest.raises(Diverged, match="no longer finite") as caught:
        walk(stages, hub, 1)
    assert "round.sealed" in [row.kind for row in store.journal("r")]
    assert not secret.exists()
    assert store.sealed("r", 1) is None
    (blob,) = [path for path in (store.home / "blobs").rglob("*") if path.is_file()]
    assert blob.name == store.run("r").initial_state_key.rpartition("/")[2]
    assert (store.run("r").state, store.run("r").error) == ("Failed", caught.value.as_data())
    assert [charge.state for charge in store.charges()] == ["reserved"]  # it counts: something of it was seen
    hub.lease.finish("Failed", caught.value.as_data())  # as the training flow does, once more
    assert [row.kind for row in store.journal("r")][-2:] == ["run.finished", "seal.erased"]
    hub.close()
    with pytest.raises(Diverged, match="run r can never continue: round 1: the server's parameters"):
        open_hub(store, "r")
    assert not secret.exists()  # none is made anew
    assert store.latest_unfinished() is None
    store.verify_journal()


def test_without_a_claim_it_is_the_same(begin: Begin, store: Store) -> None:
    privacy = {"kind": "none"}
    hub = begin(privacy=privacy, selection={"kind": "uniform", "cohort_size": 3}, server_optimizer=TOO_LARGE)
    with pytest.raises(Diverged):
        walk(stages, hub, 1)
    assert store.sealed("r", 1) is None
    store.verify_journal()


def test_a_deleted_run_is_not_opened(begin: Begin, store: Store) -> None:
    hub = begin()
    walk(stages, hub, 1)
    hub.close()
    store.delete_run("r", by="ada")
    with pytest.raises(RunNotFound, match="run 'r' was deleted"):
        open_hub(store, "r")
