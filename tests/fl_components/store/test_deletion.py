"""What is deleted is gone from the disk, what was spent is not, and a crash between the two changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import JournalBroken, LeaseHeld, RunConflict, RunNotFound, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import BudgetTerms, Charges, RunRecord, RunSecret, Store
from fedrounds.fl_components.store.blobs import Blobs
from fedrounds.fl_components.store.durable_files import erase
from fedrounds.fl_components.store.lease import Lease
from fedrounds.fl_components.store.reconciliation import reconcile

EVENT = {"kind": "gaussian", "noise_multiplier": 1.0}
DIVERGED = {"code": "diverged", "message": "round 2: the server's parameters are no longer finite", "hint": "lower it"}
SECRET_SUM = b"the sum without noise" * 50


def anybody(*_: Any) -> None:
    """A guard that refuses nothing."""


CHARGES = [Charges({Account("p"): EVENT}, anybody)]


@pytest.fixture
def sealed(store: Store, new_run: Callable[..., RunRecord]) -> Store:
    """Run r has committed round 1 and sealed round 2; another run has committed a round."""
    terms = BudgetTerms(None, 1e-5, unit="client", neighbouring="add_or_remove", accountant="RDP", demonstration=False)
    store.ledger.set_budget(Account("p"), terms, reason="x", by="ada")
    secret = RunSecret.create(store.secrets_folder, "r")
    for run_id in ("r", "other"):
        new_run(run_id, **({"secret_id": secret.id, "secret_home": "host:home"} if run_id == "r" else {}))
        with store.acquire(run_id) as lease:
            lease.begin_attempt()
            lease.seal(1, lease.reserve(1, CHARGES), b"sum")
            withheld = {"metrics": {"secret": "patient seven"}}
            lease.commit(1, state=b"state", params_digest="1" * 64, result={"metrics": {}}, withheld=withheld)
            if run_id == "r":
                lease.seal(2, lease.reserve(2, CHARGES), SECRET_SUM)
    (store.home / "withheld").mkdir()
    (store.home / "withheld" / "r.log").write_text("client ward-3 failed")
    return store


def files_of(store: Store, run_id: str = "r") -> list[Path]:
    """What the disk has of a run besides the database."""
    of_run = [*(store.home / "blobs" / run_id).rglob("*"), *(store.home / "secrets" / "runs").glob(f"{run_id}@*")]
    return [file for file in [*of_run, *(store.home / "withheld").glob(f"{run_id}.log")] if file.is_file()]


def test_erase_overwrites_what_another_name_still_shows(tmp_path: Path) -> None:
    file, other_name = tmp_path / "seal", tmp_path / "link"
    file.write_bytes(SECRET_SUM)
    os.link(file, other_name)
    assert erase(file)
    assert not file.exists()
    assert other_name.read_bytes() == bytes(len(SECRET_SUM))
    assert not erase(file)


def test_erase_takes_what_a_killed_writer_left_along(tmp_path: Path) -> None:
    leftover, of_another = tmp_path / f".r@1.{'a' * 32}", tmp_path / f".r@1.5.{'a' * 32}"
    for file in (tmp_path / "r@1", leftover, of_another):
        file.write_bytes(b"key")
    assert erase(tmp_path / "r@1")
    assert list(tmp_path.iterdir()) == [of_another]


class TestARunThatCanNeverContinue:
    def test_loses_its_seal_and_its_secret(self, sealed: Store) -> None:
        with sealed.acquire("r") as lease:
            lease.finish(RunState.FAILED, DIVERGED)
        assert sealed.sealed("r", 2) is None
        assert not sealed.secret_file(sealed.run("r")).exists()
        assert not [file for file in files_of(sealed) if SECRET_SUM in file.read_bytes()]
        assert sealed.state_blob("r") == b"state"  # what was released stays
        assert [row.kind for row in sealed.journal("r")][-2:] == ["run.finished", "seal.erased"]
        assert [each.state for each in sealed.ledger.collections(run_id="r")] == ["spent", "reserved"]
        sealed.verify_journal()

    @pytest.mark.parametrize(
        ("state", "code"),
        [
            ("Failed", "run_failed"),
            ("Failed", "store"),
            ("Failed", "bug"),
            ("Cancelled", "cancelled"),
            ("TooFewClients", "too_few_clients"),
            ("BudgetExhausted", "budget_exhausted"),
        ],
    )
    def test_any_other_keeps_what_a_resume_finishes_from(self, sealed: Store, state: str, code: str) -> None:
        with sealed.acquire("r") as lease:
            lease.finish(RunState(state), {"code": code, "message": "x", "hint": None})
            lease.erase()
        sealed.finish_erasures()
        seal = sealed.sealed("r", 2)
        assert seal is not None and seal.data == SECRET_SUM
        assert sealed.secret_file(sealed.run("r")).exists()

    @pytest.mark.parametrize("moment", ["secret", "blob", "row"])
    def test_a_crash_in_between_is_made_good_when_the_store_is_opened(
        self, sealed: Store, open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        def killed(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt  # as a kill: nothing handles it

        with sealed.acquire("r") as lease, monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if moment == "secret":
                patch.setattr("fedrounds.fl_components.store.secrets.erase", killed)
            elif moment == "blob":
                patch.setattr(Blobs, "erase", killed)
            else:
                append = lease._append
                patch.setattr(lease, "_append", lambda c, kind, v: (killed if "erased" in kind else append)(c, kind, v))
            lease.finish(RunState.FAILED, DIVERGED)
        sealed.verify_journal()
        again = open_store()
        assert again.sealed("r", 2) is None
        assert not again.secret_file(again.run("r")).exists()
        assert not [file for file in files_of(again) if SECRET_SUM in file.read_bytes()]
        again.verify_journal()

    def test_blobs_that_cannot_be_erased_now_are_erased_later(
        self, sealed: Store, open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: Any) -> None:
            raise StoreError("the bucket does not answer")

        with monkeypatch.context() as patch:
            patch.setattr(Blobs, "erase", away)
            with sealed.acquire("r") as lease:
                lease.finish(RunState.FAILED, DIVERGED)
        assert sealed.run("r").state == "Failed"
        assert open_store().sealed("r", 2) is None


class TestDeleting:
    def test_files_and_rows_are_gone_and_charges_stay(self, sealed: Store) -> None:
        charges, budget = sealed.ledger.charges(), sealed.ledger.budget(Account("p"))
        sealed.delete_run("r", by="ada")
        assert files_of(sealed) == []
        assert not (sealed.home / "blobs" / "r").exists()
        assert (sealed.rounds("r"), sealed.sealed("r", 2)) == ([], None)
        assert sealed.ledger.charges() == charges
        assert sealed.ledger.budget(Account("p")) == budget
        run = sealed.run("r")
        assert (run.state, run.committed_round, run.name, run.error) == (RunState.DELETED, 1, "digits", None)
        assert len(sealed.ledger.spent("r")) == 1
        assert [each.run_id for each in sealed.runs()] == ["other"]
        assert [each.run_id for each in sealed.runs(deleted=True)] == ["other", "r"]
        last = list(sealed.journal("r"))[-1]
        assert (last.kind, last.content["by"], last.content["state"]) == ("run.deleted", "ada", "Running")
        sealed.verify_journal()
        assert sealed.state_blob("other") == b"state"

    @pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # PostgreSQL's own vacuum removes deleted rows
    def test_no_byte_of_what_was_withheld_is_left_in_sqlite(self, sealed: Store) -> None:
        sealed.delete_run("other", by="ada")
        sealed.delete_run("r", by="ada")
        sealed.compact()
        database = Path(sealed._database._url.database or "")
        for file in database.parent.glob(f"{database.name}*"):
            assert b"patient seven" not in file.read_bytes(), file

    def test_a_second_time_changes_nothing(self, sealed: Store) -> None:
        sealed.delete_run("r", by="ada")
        rows = sealed.verify_journal()
        sealed.delete_run("r", by="bob")
        assert sealed.verify_journal() == rows

    def test_a_deleted_run_is_no_run(self, sealed: Store, new_run: Callable[..., RunRecord]) -> None:
        sealed.delete_run("r", by="ada")
        with pytest.raises(RunNotFound, match="was deleted"):
            sealed.acquire("r")
        with pytest.raises(RunConflict, match="was deleted, and its charges stay"):
            new_run("r")
        assert sealed.latest_unfinished().run_id == "other"  # type: ignore[union-attr]
        assert sealed.runs(unfinished=True) == sealed.runs()

    def test_the_latest_model_is_that_of_a_run_that_exists(self, sealed: Store) -> None:
        for run_id in ("other", "r"):
            with sealed.acquire(run_id) as lease:
                lease.finish(RunState.BUDGET_EXHAUSTED)
        assert sealed.latest_model("digits").run_id == "other"  # type: ignore[union-attr]
        sealed.delete_run("other", by="ada")
        assert sealed.latest_model("digits").run_id == "r"  # type: ignore[union-attr]

    def test_one_that_a_process_works_on_is_refused(self, sealed: Store, start_holder: Callable[..., Any]) -> None:
        start_holder("r")
        with pytest.raises(LeaseHeld):
            sealed.delete_run("r", by="ada")
        assert sealed.run("r").state == "Running"
        assert SECRET_SUM in b"".join(file.read_bytes() for file in files_of(sealed))

    def test_an_unknown_one_is_not_found(self, store: Store) -> None:
        with pytest.raises(RunNotFound):
            store.delete_run("nobody", by="ada")

    @pytest.mark.parametrize("moment", ["secret", "blobs", "row"])
    def test_a_crash_in_between_is_made_good_when_the_store_is_opened(
        self, sealed: Store, open_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        def killed(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        update = Lease._update_run

        def killed_at_the_end(self: Lease, connection: Any, **values: Any) -> None:
            return killed() if values == {"initial_state_key": ""} else update(self, connection, **values)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            match moment:
                case "secret":
                    patch.setattr("fedrounds.fl_components.store.secrets.erase", killed)
                case "blobs":
                    patch.setattr(Blobs, "erase_run", killed)
                case "row":
                    patch.setattr(Lease, "_update_run", killed_at_the_end)
            sealed.delete_run("r", by="ada")
        sealed.verify_journal()
        again = open_store()
        assert files_of(again) == []
        assert again._rows(text("SELECT initial_state_key FROM runs WHERE run_id = 'r'"))[0][0] == ""  # type: ignore[arg-type]
        again.verify_journal()

    def test_a_silent_removal_is_found(self, sealed: Store) -> None:
        """Rounds that are gone, or a run that says that it was deleted, without the hub's signature under it."""
        for statements in (
            ["DELETE FROM rounds WHERE run_id = 'r'"],
            ["DELETE FROM rounds WHERE run_id = 'r'", "UPDATE runs SET state = 'Deleted' WHERE run_id = 'r'"],
            ["DELETE FROM seals WHERE run_id = 'r'"],
        ):
            with pytest.raises(JournalBroken), sealed._transaction() as connection:
                for statement in statements:
                    connection.execute(text(statement))
                reconcile(connection)
        sealed.delete_run("r", by="ada")
        for statement in (
            "UPDATE runs SET state = 'Completed' WHERE run_id = 'r'",
            "DELETE FROM charges WHERE run_id = 'r'",
            "UPDATE totals SET spent = '[]' WHERE run_id = 'r'",
        ):
            with pytest.raises(JournalBroken), sealed._transaction() as connection:
                connection.execute(text(statement))
                reconcile(connection)
