"""A run that diverges after its seal leaves no sum without noise, and no key that would open one."""

from __future__ import annotations

from typing import Any

import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import Diverged, RunNotFound
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.flows.round import walk
from tests.fl_components.server.wards import FIELDS, TERMS, WARDS, Begin, secret_file

TOO_LARGE = {"learning_rate": 3e38}  # just below the largest float32


def test_the_seal_and_the_secret_are_erased(begin: Begin, store: Store) -> None:
    store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
    privacy = FIELDS["privacy"] | {"clipping": {"kind": "fixed", "norm": 1e3}}  # the noise is as large
    run = begin(data=WARDS, privacy=privacy, server_optimizer=TOO_LARGE)
    run.lease.begin_attempt()
    secret = secret_file(store)
    with pytest.raises(Diverged, match="no longer finite") as caught:
        walk(stages, run, 1)
    assert "round.sealed" in [row.kind for row in store.journal("r")]
    assert not secret.exists()
    assert store.sealed("r", 1) is None
    (blob,) = [path for path in (store.home / "blobs").rglob("*") if path.is_file()]
    assert blob.name == store.run("r").initial_state_key.rpartition("/")[2]
    assert (store.run("r").state, store.run("r").error) == ("Failed", caught.value.as_data())
    assert [charge.state for charge in store.ledger.collections("r")] == [
        "reserved"
    ]  # it counts: something of it was seen
    run.lease.finish(RunState.FAILED, caught.value.as_data())  # as the training flow does, once more
    assert [row.kind for row in store.journal("r")][-2:] == ["run.finished", "seal.erased"]
    run.close()
    with pytest.raises(Diverged, match="run r can never continue: round 1: the server's parameters"):
        open_run(store, "r")
    assert not secret.exists()  # none is made anew
    assert store.latest_unfinished() is None
    store.verify_journal()


@pytest.mark.parametrize(
    ("learning_rate", "server_optimizer", "what"),
    [
        (20.0, TOO_LARGE, "round 1: the server's parameters are no longer finite"),
        (1e24, {"kind": "fedadam"}, "round 1: server_optimizer.kind fedadam: state v exceeds float32"),
    ],
    ids=["parameters", "state"],
)
def test_without_a_claim_it_is_the_same(
    begin: Begin, store: Store, learning_rate: float, server_optimizer: dict[str, Any], what: str
) -> None:
    run = begin(
        privacy={"kind": "none"},
        selection={"kind": "uniform", "cohort_size": 3},
        training=FIELDS["training"] | {"learning_rate": learning_rate},
        admission={"max_update_norm": 1e30},
        server_optimizer=server_optimizer,
    )
    with pytest.raises(Diverged, match=what) as caught:
        walk(stages, run, 1)
    assert (store.run("r").state, store.run("r").error) == ("Failed", caught.value.as_data())
    assert store.sealed("r", 1) is None
    store.verify_journal()


def test_a_deleted_run_is_not_opened(begin: Begin, store: Store) -> None:
    run = begin()
    walk(stages, run, 1)
    run.close()
    store.delete_run("r", by="ada")
    with pytest.raises(RunNotFound, match="run 'r' was deleted"):
        open_run(store, "r")
