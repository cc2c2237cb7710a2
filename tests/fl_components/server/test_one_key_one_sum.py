"""No noise key serves two inputs, whatever was edited, lost, restored or copied between two attempts at a round; and
what may have been released is charged before anything else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError, RunConflict, RunFailed, StoreError
from fedrounds.fl_components.server import opening, stages
from fedrounds.fl_components.server import run as run_module
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.history import check_history
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.server.simulated_clients import SimulatedClients
from fedrounds.fl_components.server.simulation import simulated_clients
from fedrounds.fl_components.store import Anchor, BudgetTerms, RunRecord, RunSecret, Sighting, Store
from fedrounds.fl_components.values import RoundPlan
from fedrounds.flows.round import walk
from tests.fl_components.server import wards
from tests.fl_components.server.rounds import aggregate
from tests.fl_components.server.test_example_claim import EVERYONE
from tests.fl_components.server.test_example_claim import TERMS as OF_EXAMPLES
from tests.fl_components.server.wards import FIELDS, TERMS, WARDS, collect, secret_file
from tests.support import parameters

CENTRAL = FIELDS | {"data": WARDS}
BOTH = {"central": CENTRAL, "examples": FIELDS | EVERYONE}


class Attempts:
    """Opens one run again and again, as processes one after the other do."""

    def __init__(self, home: Path, fields: dict[str, Any], stack: ExitStack, **places: str) -> None:
        self.home, self._fields, self._stack, self._places = home, fields, stack, places

    def store(self, home: Path | None = None) -> Store:
        return self._stack.enter_context(Store.open(home or self.home, **self._places))

    def open(self, home: Path | None = None, **options: Any) -> Run:
        return self._stack.enter_context(open_run(self.store(home), "r", config=parse_config(self._fields), **options))

    def charges(self) -> list[tuple[int, int, str]]:
        return [(each.round, each.collection, each.state) for each in self.store().ledger.collections(run_id="r")]


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Callable[..., Attempts]]:
    with ExitStack() as stack:

        def made(claim: str = "central", **places: str) -> Attempts:
            made = Attempts(tmp_path / "home", BOTH[claim], stack, **places)
            store = made.store()
            terms: dict[str, BudgetTerms] = {"wards": TERMS, "wards/*": OF_EXAMPLES}
            name = "wards" if claim == "central" else "wards/*"
            store.ledger.set_budget(Account.parse(name), terms[name], reason="a test", by="ada")
            return made

        yield made


def sent(run: Run) -> Any:
    """What the server receives in the round in hand, before it is committed."""
    state, plan, collected = collect(run, stages.load(run, run.refresh().committed_round + 1))
    if run.federation.central is not None:
        return aggregate(run, state, plan, collected).params_D
    return collected.updates.tensors["sum"]


def edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on one row of one ward is another one."""
    before = wards.wards

    def after() -> dict[str, tuple[Any, ...]]:
        found = before()
        found["ward-3"][0][7] += 1
        return found

    monkeypatch.setattr(wards, "wards", after)


# --- equal keys imply equal inputs ---


@pytest.fixture(scope="module")
def federation() -> Federation:
    return assemble(parse_config(BOTH["examples"]))


def run_with(secret: RunSecret, federation: Federation) -> Run:
    record = RunRecord(**{name: None for name in RunRecord.__slots__} | {"run_id": "r", "population": "wards"})  # type: ignore[arg-type]
    return Run(None, None, federation, record, secret=secret)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> RunSecret:
    return RunSecret.create(tmp_path_factory.mktemp("secrets"), "r")


SUMS = st.tuples(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0]), min_size=2, max_size=3),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([0.5, 0.25]),
    st.integers(1, 2),
    st.sampled_from(["noise of the sum", "noise of the count"]),
)


@given(SUMS, SUMS)
def test_noise_keys_of_a_sum_are_equal_where_all_that_is_released_is(
    secret: RunSecret, federation: Federation, one: Any, other: Any
) -> None:
    run, plan = run_with(secret, federation), PLAN

    def inputs(attempt: Any) -> tuple[bytes, ...]:
        values, dtype, *rest = attempt
        return (np.array(values, dtype).tobytes(), str(dtype).encode(), repr(rest).encode())

    def key(attempt: Any) -> bytes:
        values, dtype, norm, collection, purpose = attempt
        released = {"sum": np.array(values, dtype), "norm": np.array([norm])}
        return run.noise_keys(replace(plan, collection=collection), released)(purpose)

    assert (key(one) == key(other)) == (inputs(one) == inputs(other))


ATTEMPTS = st.tuples(
    st.sampled_from([None, ("x_train", 0), ("x_train", 179), ("y_train", 3)]),  # which row is another
    st.sampled_from(["0a", "0b"]),  # the starting parameters
    st.integers(1, 2),  # the collection
    st.sampled_from([0.5, 0.25]),  # the learning rate
    st.sampled_from(["1.0", "1.1"]),  # torch's release
)


@given(ATTEMPTS, ATTEMPTS)
def test_keys_of_a_client_are_equal_where_all_that_determines_its_update_is(
    secret: RunSecret, federation: Federation, one: Any, other: Any
) -> None:
    def keys(attempt: Any) -> list[bytes | None]:
        row, base, collection, rate, torch = attempt
        data = federation.simulated.data
        if row is not None:
            changed = getattr(data, row[0]).copy()
            changed[row[1]] = 1 - changed[row[1]]
            data = replace(data, **{row[0]: changed})
        training = federation.config.training.model_copy(update={"learning_rate": rate})
        config = federation.config.model_copy(update={"training": training})
        run = run_with(
            secret, replace(federation, clients=SimulatedClients(data, federation.simulated.memory), config=config)
        )
        plan = replace(PLAN, base_digest=base, collection=collection, cohort=tasks_of(federation))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(run_module, "engine_environment", lambda: {"torch": torch})
            return [task.key for task in simulated_clients(run, plan, plan.cohort)]

    same = [a == b for a, b in zip(keys(one), keys(other), strict=True)]
    if one[1:] != other[1:]:
        assert not any(same)
    else:
        rows = {None: None, 0: 0, 179: 8, 3: 0}  # whose row it is
        differing = {rows[each[0][1]] for each in (one, other) if each[0] is not None} if one[0] != other[0] else set()
        assert same == [client not in differing for client in range(9)]


def tasks_of(federation: Federation) -> Any:
    from fedrounds.fl_components.values import ClientTask

    return tuple(ClientTask(federation.population.client_ids[row], row, 20, 0) for row in range(9))


PLAN = RoundPlan(
    run_id="r",
    round=1,
    base_digest="0a",
    download_bytes=0,
    cohort=(),
    shards=(),
    waves=(slice(0, 0),),
    min_updates=0,
)


# --- what was edited ---


def test_a_round_that_is_collected_again_from_the_same_rows_is_the_same(attempts: Callable[..., Attempts]) -> None:
    opener = attempts()
    first = opener.open()
    update = sent(first)
    first.close()
    assert np.array_equal(update, sent(opener.open()))


@pytest.mark.parametrize("claim", BOTH)
def test_an_edited_row_ends_the_run(
    attempts: Callable[..., Attempts], claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nothing is sealed, and with the flag that lets a run without a claim go on."""
    opener = attempts(claim)
    run = opener.open()
    stages.authorise(run, stages.select(run, stages.load(run, 1), stages.broadcast(run, stages.load(run, 1))))
    run.close()
    edited(monkeypatch)
    for accept in (False, True):
        with pytest.raises(RunConflict, match="began with other rows: which clients' have changed is withheld"):
            opener.open(accept_changed_data=accept)


def test_an_edited_row_has_other_noise_even_where_nobody_compares(
    attempts: Callable[..., Attempts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The difference of two updates of one client is not that of its clipped gradients."""
    opener = attempts("examples")
    run = opener.open()
    first = sent(run)
    run.close()
    again = opener.open()
    assert np.array_equal(sent(again), first)  # what a client is asked again, it answers with the same bits
    again.close()
    edited(monkeypatch)
    monkeypatch.setattr(opening, "_check_data", lambda *_: {})
    change = sent(opener.open()) - first
    one_step = 1.0 / (0.5 * 20)  # C over the expected batch: more than one row can change of a mean, in both steps
    assert np.linalg.norm(change) > 3 * one_step * EVERYONE["training"]["learning_rate"]  # type: ignore[index]


def test_another_engine_pays_again(attempts: Callable[..., Attempts], monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that may have sent their updates would send others, by their last bits."""
    opener = attempts("examples")
    run = opener.open()
    sent(run)
    run.close()
    monkeypatch.setattr(run_module, "engine_environment", lambda: {"torch": "another"})
    run = opener.open()
    with pytest.raises(StoreError, match="updates computed now would differ") as caught:
        sent(run)
    assert "fedrounds resume r --fresh-collection" in str(caught.value.hint)
    run.close()
    sent(opener.open(fresh_collection=True))
    assert opener.charges() == [(1, 1, "spent"), (1, 2, "reserved")]


# --- what was lost ---


@pytest.mark.parametrize("claim", parameters(BOTH, quick=("central",)))
def test_a_lost_secret_is_never_made_anew_silently(attempts: Callable[..., Attempts], claim: str) -> None:
    opener = attempts(claim)
    run = opener.open()
    first = sent(run)
    run.close()
    secret_file(opener.store()).unlink()
    with pytest.raises(StoreError, match="is missing in") as caught:
        opener.open()
    assert f":{opener.home}" in caught.value.message
    assert "fedrounds resume r --fresh-collection" in str(caught.value.hint)
    assert opener.charges() == [(1, 1, "reserved")]

    run = opener.open(fresh_collection=True)
    assert opener.charges() == [(1, 1, "spent")] and run.sealed(1) is None
    assert not np.array_equal(sent(run), first)
    walk(stages, run, 1)
    assert opener.charges() == [(1, 1, "spent"), (1, 2, "spent")]
    run.close()
    walk(stages, opener.open(), 2)  # and from now on as any run
    store = opener.store()
    whose = "wards" if claim == "central" else "wards/ward-3"
    assert sum(store.ledger.budget(Account.parse(whose)).spent.values()) == 3  # type: ignore[union-attr]
    if claim == "central":
        assert sum(store.ledger.spent("r")[Account("wards")].values()) == 3
    (row,) = [each for each in store.journal("r") if each.kind == "secret.replaced"]
    assert row.content["reason"] == "the secret is missing" and row.content["round"] == 1
    store.verify_journal()


@pytest.mark.parametrize("claim", BOTH)
def test_another_home_of_the_store_has_no_secret(attempts: Callable[..., Attempts], claim: str, tmp_path: Path) -> None:
    """In the first round as in any other one."""
    opener = attempts(claim, database_url=f"sqlite:///{tmp_path}/shared.db", blobs_url=str(tmp_path / "blobs"))
    run = opener.open()
    sent(run)
    run.close()
    other = tmp_path / "other"
    opener.store(other).keys.trust(opener.store().keys.signing.public.hex())
    # What a hub needs besides, it has by then: only the secret is missing.
    for file in (opener.home / "secrets").glob("*.key"):  # the hub's, and that of fingerprints
        shutil.copy(file, other / "secrets")
    with pytest.raises(StoreError, match="is missing in") as caught:
        opener.open(other)
    assert f":{opener.home}" in caught.value.message
    sent(opener.open())


def test_what_is_spent_afresh_must_be_within_the_budget(attempts: Callable[..., Attempts]) -> None:
    opener = attempts()
    run = opener.open()
    sent(run)
    run.close()
    opener.store().ledger.set_budget(Account("wards"), replace(TERMS, epsilon=2.0), reason="a test", by="ada")
    run = opener.open(fresh_collection=True)
    with pytest.raises(BudgetExhausted):
        sent(run)
    assert opener.charges() == [(1, 1, "spent")]


def test_a_run_without_a_claim_has_nothing_to_pay_for(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        config = parse_config(FIELDS | {"privacy": {"kind": "none"}, "population": "p"})
        open_run(store, "r", config=config).close()
        with pytest.raises(ConfigError, match="makes no privacy claim"):
            open_run(store, "r", config=config, fresh_collection=True)
        open_run(store, "r", config=config).close()  # the lease is free again


def test_a_run_that_another_process_created_keeps_its_secret(
    attempts: Callable[..., Attempts], monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = attempts()
    find_run = Store.find_run
    run = opener.open()
    update = sent(run)
    run.close()
    looks = iter([None])
    monkeypatch.setattr(Store, "find_run", lambda store, run_id: next(looks, find_run(store, run_id)))
    assert np.array_equal(sent(opener.open()), update)
    secret_file(opener.store())  # there is one


def test_a_kill_between_the_secret_and_the_run_leaves_a_run_that_begins(
    attempts: Callable[..., Attempts], monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = attempts()
    with monkeypatch.context() as patched:
        patched.setattr(Store, "create_run", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opener.open()
    assert list((opener.home / "secrets" / "runs").iterdir()) == []
    walk(stages, opener.open(), 1)


# --- what was restored ---


def copy_database(home: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in (*home.glob("fedrounds.db*"), *folder.glob("fedrounds.db*")):
        if file.parent == folder:
            file.unlink()
    for file in home.glob("fedrounds.db*"):
        shutil.copy(file, folder)
    shutil.copytree(home / "blobs", folder / "blobs", dirs_exist_ok=True)


@pytest.mark.parametrize("claim", parameters(BOTH, quick=("central",)))
def test_a_restored_database_is_noticed_and_what_came_after_it_charged(
    attempts: Callable[..., Attempts], claim: str, tmp_path: Path
) -> None:
    """The secret is three rounds ahead: rounds 2 and 3 were released, and are in no book any more."""
    opener = attempts(claim)
    run = opener.open()
    walk(stages, run, 1)
    run.close()
    copy_database(opener.home, tmp_path / "backup")
    run = opener.open()
    walk(stages, run, 2), run.store.anchor()
    released = run.state().params_D
    run.close()
    copy_database(tmp_path / "backup", opener.home)

    with pytest.raises(StoreError, match="the database is older than what was seen of run r") as caught:
        opener.open()
    assert "the run's secret shows its round 2" in caught.value.message
    assert "journal.anchor" in caught.value.message
    assert "fedrounds resume r --fresh-collection" in str(caught.value.hint)

    run = opener.open(fresh_collection=True)
    lost = [(2, 1, "spent")] if claim == "central" else [(2, 1, "spent"), (2, 2, "spent")]  # and perhaps round 3's
    assert opener.charges() == [(1, 1, "spent"), *lost]
    walk(stages, run, 2)
    assert not np.array_equal(run.state().params_D, released)
    run.close()
    run = opener.open()  # what is acknowledged does not stop it again
    walk(stages, run, 3)
    store = opener.store()
    assert opener.charges() == [(1, 1, "spent"), *lost, (2, len(lost) + 1, "spent"), (3, 1, "spent")]
    whose = "wards" if claim == "central" else "wards/ward-0"
    assert sum(store.ledger.budget(Account.parse(whose)).spent.values()) == 3 + len(lost)  # type: ignore[union-attr]
    store.verify_journal()


def rounds(opener: Attempts, *numbers: int, **options: Any) -> None:
    """Release these rounds, in a process of their own."""
    run = opener.open(**options)
    for number in numbers:
        walk(stages, run, number)
        run.store.anchor()
    run.close()


@pytest.mark.parametrize("claim", ["central", pytest.param("examples", marks=pytest.mark.ci)])
def test_a_backup_that_is_restored_twice_is_paid_for_twice(
    attempts: Callable[..., Attempts], claim: str, tmp_path: Path
) -> None:
    """Whatever was released between is in no book: the secret that the fresh collection made counts it."""
    opener, released = attempts(claim), 3
    rounds(opener, 1)
    copy_database(opener.home, tmp_path / "backup")
    rounds(opener, 2, 3)
    for _ in range(2):
        copy_database(tmp_path / "backup", opener.home)
        with pytest.raises(StoreError):
            opener.open()
        rounds(opener, 2, fresh_collection=True)
        released += 1
        assert len(opener.charges()) >= released and {state for *_, state in opener.charges()} == {"spent"}
    if claim == "central":
        assert len(opener.charges()) == released
    whose = "wards" if claim == "central" else "wards/ward-0"
    store = opener.store()
    assert sum(store.ledger.budget(Account.parse(whose)).spent.values()) == len(opener.charges())  # type: ignore[union-attr]
    store.verify_journal()


@pytest.mark.parametrize("claim", ["central", pytest.param("examples", marks=pytest.mark.ci)])
def test_a_restore_after_a_fresh_collection_is_noticed(
    attempts: Callable[..., Attempts], claim: str, tmp_path: Path
) -> None:
    """That the earlier secret had come further hides nothing of the new one."""
    opener = attempts(claim)
    rounds(opener, 1)
    copy_database(opener.home, tmp_path / "first")
    rounds(opener, 2, 3)
    copy_database(tmp_path / "first", opener.home)
    opener.open(fresh_collection=True).close()
    copy_database(opener.home, tmp_path / "second")
    charged = len(opener.charges())
    rounds(opener, 2)
    copy_database(tmp_path / "second", opener.home)
    with pytest.raises(StoreError, match=r"the run's secret shows its round 2, .* of which 1 is not charged"):
        opener.open()
    opener.open(fresh_collection=True).close()
    assert len(opener.charges()) == charged + (1 if claim == "central" else 2)


def test_a_run_whose_database_was_lost_is_paid_for(attempts: Callable[..., Attempts]) -> None:
    opener = attempts()
    rounds(opener, 1, 2)
    for file in opener.home.glob("fedrounds.db*"):
        file.unlink()
    opener.store().ledger.set_budget(Account("wards"), TERMS, reason="a test", by="ada")
    with pytest.raises(StoreError, match="the database is older"):
        opener.open()
    opener.open(fresh_collection=True).close()
    assert opener.charges() == [(1, 1, "spent"), (1, 2, "spent")]


@pytest.mark.parametrize("evidence", ["the secret", "the anchor", "the secret is missing"])
def test_nothing_is_given_back_on_a_restored_database(
    attempts: Callable[..., Attempts], evidence: str, tmp_path: Path
) -> None:
    """The reservation is there, and the round that it paid for was released."""
    opener = attempts()
    rounds(opener, 1)
    run = opener.open()
    stages.authorise(run, stages.select(run, stages.load(run, 2), stages.broadcast(run, stages.load(run, 2))))
    run.close()
    copy_database(opener.home, tmp_path / "backup")
    secret, anchor = secret_file(opener.store()), opener.home / "secrets" / "journal.anchor"
    before = secret.read_text(), anchor.read_text()
    rounds(opener, 2)
    copy_database(tmp_path / "backup", opener.home)
    if evidence == "the secret":
        anchor.write_text(before[1])
    elif evidence == "the anchor":
        secret.write_text(before[0])
    else:
        anchor.write_text(before[1])
        secret.unlink()
    store = opener.store()
    with store.acquire("r") as lease, pytest.raises(StoreError, match="round 2 of run r may have been released"):
        lease.void("a test", by="ada")
    assert opener.charges() == [(1, 1, "spent"), (2, 1, "reserved")]


def test_the_key_of_a_committed_round_goes_when_the_store_is_opened(
    attempts: Callable[..., Attempts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was killed between the commit and the forgetting: nobody need resume the opener."""
    opener = attempts()
    rounds(opener, 1)
    run, file = opener.open(), secret_file(opener.store())
    with monkeypatch.context() as patched:
        patched.setattr(RunSecret, "advance", lambda *_: 1 / 0)
        with pytest.raises(RunFailed):
            walk(stages, run, 2)
    run.close()
    assert '"round": 2' in file.read_text()
    opener.store()
    assert '"round": 3' in file.read_text() and '"releases": 2' in file.read_text()


def test_a_replaced_secret_goes_with_the_run(attempts: Callable[..., Attempts]) -> None:
    opener = attempts()
    opener.open().close()
    file = secret_file(opener.store())
    text = file.read_text()
    opener.open(fresh_collection=True).close()
    file.write_text(text)  # as if the process had been killed before it removed the file
    opener.store().delete_run("r", by="ada")
    assert list((opener.home / "secrets" / "runs").iterdir()) == []


def test_a_view_that_is_ahead_is_an_anchor(attempts: Callable[..., Attempts]) -> None:
    opener = attempts()
    run = opener.open()
    walk(stages, run, 1)
    head = run.store.journal_head()
    check_history(run, [Sighting("MLflow", round=1, anchor=Anchor(head.rows, head.head, "MLflow"))])
    for ahead in (
        Sighting("MLflow", round=2),
        Sighting("MLflow", anchor=Anchor(head.rows + 1, "0" * 64, "MLflow")),
        Sighting("MLflow", anchor=Anchor(head.rows, "0" * 64, "MLflow")),
    ):
        with pytest.raises(StoreError, match=r"MLflow .*restored from a backup") as caught:
            check_history(run, [ahead])
        assert "--fresh-collection" in str(caught.value.hint)
    run.close()
    run = opener.open(fresh_collection=True)
    check_history(run, [Sighting("MLflow", round=2)])
    check_history(run, [Sighting("MLflow", round=2)])  # charged once
    assert opener.charges() == [(1, 1, "spent"), (2, 1, "spent")]
    run.close()
    check_history(opener.open(), [Sighting("MLflow", round=2)])


def test_an_old_secret_goes_when_the_run_has_a_new_one(attempts: Callable[..., Attempts]) -> None:
    opener = attempts()
    opener.open().close()
    file = secret_file(opener.store())
    text = file.read_text()
    opener.open(fresh_collection=True).close()
    assert not file.exists() and text not in secret_file(opener.store()).read_text()
    file.write_text(text)  # as if the process had been killed before it removed the file
    opener.open().close()
    assert not file.exists()
