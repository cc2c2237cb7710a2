"""What a run under a privacy claim draws from: the same until a round is committed, then beyond everybody's reach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.privacy import CentralPrivacy
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.values import SealedCohort
from fedrounds.flows.round import walk
from tests.fl_components.server import rounds
from tests.fl_components.server.wards import (
    FIELDS,
    Begin,
    collect,
    collected_of,
    secret_file,
)


def all_bytes(home: Path) -> bytes:
    """Of every file in the home, the database's log included."""
    return b"".join(path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file())


@pytest.fixture
def empty_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every coin says no, as it does for all clients of some rounds."""
    monkeypatch.setattr(Federation, "select", lambda *_: np.empty(0, np.int64))


class TestSecrets:
    def test_two_runs_of_one_configuration_differ(self, begin: Begin) -> None:
        """The seed decides nothing that is private."""
        results = [walk(stages, begin(run_id), 1) for run_id in ("a", "b")]
        assert results[0].params_digest != results[1].params_digest

    def test_cohorts_and_batches_are_not_drawn_from_the_seed(self, begin: Begin) -> None:
        hubs = [begin("a"), begin("b"), begin("c", privacy={"kind": "none"})]
        plans = [stages.select(run, stages.load(run, 1), stages.broadcast(run, stages.load(run, 1))) for run in hubs]
        seeds = [{(task.client_id, task.seed) for task in plan.cohort} for plan in plans]
        assert not seeds[0] & seeds[1] and not seeds[0] & seeds[2]
        cohorts = [
            [task.client_id for task in stages.select(run, run.state(), stages.broadcast(run, run.state())).cohort]
            for run in hubs
        ]
        assert len({tuple(cohort) for cohort in cohorts}) > 1

    def test_noise_is_drawn_when_the_seal_is_durable(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, sealed = begin(), []
        release = CentralPrivacy.release

        def released(self: CentralPrivacy, *rest: Any) -> Any:
            sealed.append(store.sealed("r", 1) is not None)
            return release(self, *rest)

        monkeypatch.setattr(CentralPrivacy, "release", released)
        walk(stages, run, 1)
        assert sealed == [True]

    def test_another_collection_or_run_has_other_noise(self, begin: Begin, store: Store) -> None:
        """Under one secret, which another run could only have by a copied file."""
        run = begin()
        state, plan, collected = collect(run, stages.load(run, 1))
        cohort = stages.aggregate(run, plan, state, collected)
        first = rounds.step(run, state, plan, cohort)
        again = rounds.step(run, state, replace(plan, collection=2), cohort)
        assert first.params_digest != again.params_digest
        key = run.key(1, "noise of the sum")
        for name in ("run_id", "population"):
            run.record = replace(store.run("r"), **{name: "another"})
            assert run.key(1, "noise of the sum") != key

    def test_two_databases_of_one_home_share_no_secret(self, tmp_path: Path) -> None:
        """Each may know a run of the same id."""
        digests = set()
        for name in ("one", "two"):
            url = f"sqlite:///{tmp_path / name}.db"
            with (
                Store.open(tmp_path / "home", database_url=url, blobs_url=str(tmp_path / name)) as store,
                open_run(store, "r", config=parse_config(FIELDS)) as run,
            ):
                digests.add(walk(stages, run, 1).params_digest)
        assert len(digests) == 2 and len(list((tmp_path / "home" / "secrets" / "runs").iterdir())) == 2

    def test_a_round_that_is_tried_again_is_the_same(self, begin: Begin, store: Store) -> None:
        run = begin()
        state = stages.load(run, 1)
        plans = [stages.select(run, state, stages.broadcast(run, state)) for _ in range(2)]
        assert plans[0] == plans[1]
        first = rounds.aggregate(run, *collect(run, state))
        again = rounds.aggregate(run, *collect(run, state))
        assert first.params_digest == again.params_digest

    def test_a_resume_finishes_from_the_seal(self, begin: Begin, store: Store) -> None:
        run = begin()
        state = stages.load(run, 1)
        expected = rounds.aggregate(run, *collect(run, state)).params_digest
        run.close()
        with open_run(store, "r") as resumed:
            assert resumed.sealed(1) is not None
            assert walk(stages, resumed, 1).params_digest == expected
        assert len(store.ledger.charges()) == 1

    def test_the_seal_cannot_be_read_without_the_key(self, begin: Begin, store: Store) -> None:
        run = begin()
        _, _, collected = collected_of(run)
        data = store.sealed("r", 1)
        assert data is not None
        with pytest.raises(StoreError):
            SealedCohort.from_bytes(data.data)
        assert collected.updates.tensors["sum"].tobytes()[:64] not in all_bytes(store.home)

    def test_after_a_commit_nobody_can_make_the_noise_again(self, begin: Begin, store: Store) -> None:
        """No byte of the home, the database and its log included, holds the old key or the old sum."""
        run = begin()
        assert run.secret is not None
        old = {json.loads(secret_file(store).read_text())["key"]}
        state, plan, collected = collected_of(run)
        noise = run.noise_keys(plan, {"sum": collected.updates.tensors["sum"], **state.clipping})
        keys = {noise(f"noise of the {what}") for what in ("sum", "count")} | {run.key(1, "seal")}
        rounds.finish(run, state, plan, collected)
        found = all_bytes(store.home)
        for key in {bytes.fromhex(each) for each in old} | keys:
            assert key not in found and key.hex().encode() not in found
        total_D = collected.updates.tensors["sum"]
        assert np.abs(total_D).max() > 0
        for start in range(0, len(total_D) - 8, 8):
            if np.abs(total_D[start : start + 8]).min() > 0:
                assert total_D[start : start + 8].tobytes() not in found
        with pytest.raises(StoreError, match="round 1 of this run has no key"):
            noise("noise of the sum")

    def test_a_process_that_ended_before_it_forgot_the_key(self, begin: Begin, store: Store) -> None:
        run = begin()
        file = secret_file(store)
        before = file.read_text()
        walk(stages, run, 1)
        run.close()
        file.write_text(before)  # as if it had been killed after its commit
        with open_run(store, "r") as resumed:
            assert json.loads(file.read_text())["round"] == 2
            walk(stages, resumed, 2)

    @pytest.mark.usefixtures("empty_cohorts")
    def test_two_empty_cohorts_get_different_noise(self, begin: Begin) -> None:
        run = begin(selection={"kind": "poisson", "sampling_rate": 0.12})
        moves = []
        for round in (1, 2):
            before_D = run.state().params_D
            walk(stages, run, round)
            moves.append(run.state().params_D - before_D)
        assert np.abs(moves[0]).max() > 0 and np.abs(moves[1]).max() > 0
        assert not np.array_equal(moves[0], moves[1])

    @pytest.mark.usefixtures("empty_cohorts")
    def test_no_cohort_is_too_small(self, begin: Begin) -> None:
        """A round that ended for want of updates would tell who came."""
        run = begin(selection={"kind": "poisson", "sampling_rate": 0.12})
        assert stages.select(run, stages.load(run, 1), stages.broadcast(run, stages.load(run, 1))).min_updates == 0

    @pytest.mark.usefixtures("empty_cohorts")
    def test_two_equal_counts_get_different_noise(self, begin: Begin) -> None:
        clipping = {"kind": "adaptive", "count_noise": 5.0}
        run = begin(
            selection={"kind": "poisson", "sampling_rate": 0.12}, privacy=FIELDS["privacy"] | {"clipping": clipping}
        )
        fractions = [walk(stages, run, round).metrics["privacy/unclipped_fraction"] for round in (1, 2, 3)]
        assert len(set(fractions)) == 3

    def test_a_run_without_its_secret_cannot_go_on(self, begin: Begin, store: Store) -> None:
        run = begin()
        walk(stages, run, 1)
        run.close()
        secret_file(store).unlink()
        with pytest.raises(StoreError, match=r"the secret of run r, .*, is missing in .*; the run began in ") as caught:
            open_run(store, "r")
        assert "fedrounds resume r --fresh-collection" in str(caught.value.hint)
