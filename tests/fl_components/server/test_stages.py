"""The stages of a round on a real store."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrounds.fl_components.errors import ConfigError, RunFailed, StoreError, TooFewClients
from fedrounds.fl_components.privacy.releases import public
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.collection import Collection
from fedrounds.fl_components.server.profile import Profile, check_writable
from fedrounds.fl_components.server.results import round_result
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.values import Accumulator, CohortStatistics, ServerState, UpdateBatch, Weighted
from fedrounds.fl_components.wire import Download, encode_params

from .conftest import StartRun
from .rounds import aggregate, begin, collect, finish, step


class TestSelect:
    def test_the_plan(self, start_run: StartRun) -> None:
        run = start_run(selection={"cohort_size": 4, "min_updates": 2})
        state, plan = begin(run)
        assert (plan.run_id, plan.round, plan.base_digest) == ("r", 1, state.params_digest)
        assert (plan.min_updates, plan.collection) == (2, 1)
        indices = [task.index for task in plan.cohort]
        assert len(set(indices)) == 4
        most_first = sorted(indices, key=lambda index: (-run.federation.population.num_examples(index), index))
        assert indices == most_first
        for task in plan.cohort:
            assert task.client_id == run.federation.population.client_ids[task.index]
            assert task.num_examples == run.federation.population.num_examples(task.index)
        assert len({task.seed for task in plan.cohort}) == 4

    def test_it_depends_on_seed_and_round_only(self, start_run: StartRun) -> None:
        selection = {"cohort_size": 4}
        first = begin(start_run("one", selection=selection))[1]
        again = begin(start_run("two", selection=selection, name="other"))[1]
        other = begin(start_run("three", selection=selection, seed=1))[1]
        assert first.cohort == again.cohort
        assert {task.seed for task in first.cohort}.isdisjoint(task.seed for task in other.cohort)

    def test_clients_with_the_most_examples_come_first(self, start_run: StartRun) -> None:
        """So that those that train together have about as much to do."""
        partition = {"kind": "quantity_skew", "num_clients": 9, "sigma": 1.0}
        run = start_run(data={"kind": "digits", "partition": partition}, selection={"cohort_size": 6})
        sizes = [
            task.num_examples
            for task in stages.select(run, stages.load(run, 1), stages.broadcast(run, stages.load(run, 1))).cohort
        ]
        assert len(set(sizes)) > 3 and sizes == sorted(sizes, reverse=True)


class TestAuthorise:
    def test_the_charge_is_written_before_any_client_is_contacted(self, start_run: StartRun, store: Store) -> None:
        _, plan = begin(start_run())
        (charge,) = store.ledger.collections(run_id="r")
        assert (charge.round, charge.collection, charge.state) == (1, 1, "reserved")
        assert plan.collection == 1

    def test_again_it_is_the_same_reservation(self, start_run: StartRun, store: Store) -> None:
        run = start_run()
        _, plan = begin(run)
        assert stages.authorise(run, plan) == plan
        assert len(store.ledger.collections(run_id="r")) == 1


class TestBytes:
    def test_what_is_counted_was_really_encoded(self, open_single: StartRun) -> None:
        run = open_single()
        state, plan = begin(run)
        (wave,) = plan.waves
        encoded = stages.compress(run, plan, stages.train(run, plan, stages.broadcast(run, state), wave))
        collected = stages.admit(run, plan, encoded, None)
        download = Download(plan.base_digest, None, ("params",), {"values": state.params_D})
        assert collected.statistics.download_bytes == 9 * len(encode_params(download))
        assert (
            collected.statistics.upload_bytes == sum(map(len, encoded.frames)) > 9 * 4 * run.federation.num_parameters
        )


class TestAddedUpAtOnce:
    """Where nothing looks at single updates, these are added up as they come."""

    @pytest.mark.parametrize(
        "changes", [{}, {"aggregation": {"weights": "uniform"}}, {"admission": {"max_update_norm": "the median"}}]
    )
    def test_it_is_what_single_updates_come_to(self, start_run: StartRun, changes: dict[str, Any]) -> None:
        collected, after = [], []
        if "max_update_norm" in str(changes):
            run = start_run("norms", single=True)
            state, plan = begin(run)
            norms = np.linalg.norm(
                stages.train(run, plan, stages.broadcast(run, state), plan.waves[0]).updates_NM, axis=1
            )
            changes = {"admission": {"max_update_norm": float(np.median(norms)) * 1.0001}}
        for name, single in (("one", False), ("two", True)):
            run = start_run(name, single=single, **changes)
            state, plan = begin(run)
            collection = collect(run, state, plan)
            collected.append(collection.statistics)
            after.append(aggregate(run, state, plan, collection))
        together, alone = collected
        assert together.rejected == alone.rejected
        assert (0 < len(alone.rejected) < 9) == ("max_update_norm" in str(changes))
        assert together.received == alone.received == 9 - len(alone.rejected)
        assert together.train_loss.weight == alone.train_loss.weight
        assert together.train_loss.mean == pytest.approx(alone.train_loss.mean, rel=1e-12)
        for name in ("selected", "upload_bytes", "download_bytes"):
            assert getattr(together, name) == getattr(alone, name) > 0
        np.testing.assert_allclose(after[0].params_D, after[1].params_D, rtol=0, atol=1e-6)
        assert np.abs(after[0].params_D - state.params_D).max() > 1e-3

    def test_a_cohort_is_one_wave_whatever_the_memory(self, start_run: StartRun) -> None:
        run = start_run(model={"kind": "mlp", "hidden": [500]}, execution={"memory_mb": 1, "shard_size": 2})
        assert len(begin(run)[1].waves) == 1


class TestWaves:
    @pytest.mark.parametrize("poisoned", [(), ("client-0000", "client-0001", "client-0006")])
    def test_memory_changes_no_bit(self, open_single: StartRun, poisoned: tuple[str, ...]) -> None:
        outcomes = []
        model = {"kind": "mlp", "hidden": [500]}  # 0.75 MB a client with all its copies
        for name, memory_mb, waves in (("a", 1, 5), ("b", 4, 2), ("c", 1000, 1)):
            run = open_single(name, model=model, execution={"memory_mb": memory_mb, "shard_size": 2})
            state, plan = begin(run)
            assert len(plan.waves) == waves
            collected = collect(run, state, plan, poisoned)
            assert set(collected.statistics.rejected) == set(poisoned)
            cohort = stages.aggregate(run, plan, state, collected)
            cohort = replace(cohort, statistics=replace(cohort.statistics, seconds={}))
            outcomes.append((cohort.to_bytes(), step(run, state, plan, cohort).params_digest))
        assert outcomes[0] == outcomes[1] == outcomes[2]


class TestAggregate:
    def test_a_poisoned_client_leaves_the_mean_of_the_others(self, open_single: StartRun) -> None:
        run = open_single()
        state, plan = begin(run)
        batch: UpdateBatch = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
        good = [row for row, client_id in enumerate(batch.client_ids) if client_id != "client-0004"]
        weights_N = [plan.cohort[row].num_examples for row in good]
        expected_D = state.params_D + np.average(batch.updates_NM[good].astype(np.float64), axis=0, weights=weights_N)
        collected = collect(run, state, plan, poisoned=("client-0004",))
        after = aggregate(run, state, plan, collected)
        assert (after.round, after.config_digest) == (1, state.config_digest)
        np.testing.assert_allclose(after.params_D, expected_D, rtol=1e-6, atol=1e-7)
        assert np.abs(after.params_D - state.params_D).max() > 1e-3

    def test_it_seals_before_it_moves_the_parameters(self, open_single: StartRun) -> None:
        run = open_single()
        state, plan = begin(run)
        collected = collect(run, state, plan)
        assert run.sealed(1) is None
        cohort = stages.aggregate(run, plan, state, collected)
        sealed = run.sealed(1)
        assert sealed is not None
        stages_before = {"load", "broadcast", "select", "authorise", "train", "compress", "admit"}
        assert sealed.statistics.seconds.keys() == stages_before
        assert sealed.to_bytes() == cohort.to_bytes()
        # A resume that finds the seal comes to the same bits, and a later collection does not replace it.
        after = step(run, state, plan, cohort)
        assert step(run, state, plan, sealed).params_digest == after.params_digest
        stages.aggregate(run, plan, state, collect(run, state, plan, poisoned=("client-0001",)))
        kept = run.sealed(1)
        assert kept is not None
        assert kept.to_bytes() == sealed.to_bytes()

    @pytest.mark.parametrize(
        ("poisoned", "junk", "sentence", "hint"),
        [
            (
                9,
                0,
                "round 1: 0 of 9 updates could be used and selection.min_updates is 7 (not_finite: 9)",
                "begin another run with a lower training.learning_rate",
            ),
            (
                2,
                1,
                "round 1: 6 of 9 updates could be used and selection.min_updates is 7 (not_finite: 2, undecodable: 1)",
                "begin another run with a lower training.learning_rate",
            ),
            (0, 3, "round 1: 6 of 9 updates could be used and selection.min_updates is 7 (undecodable: 3)", None),
        ],
    )
    def test_too_few_clients(
        self, open_single: StartRun, poisoned: int, junk: int, sentence: str, hint: str | None
    ) -> None:
        run = open_single(selection={"min_updates": 7})
        state, plan = begin(run)
        batch = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
        batch.updates_NM[:poisoned] = np.nan
        encoded = stages.compress(run, plan, batch)
        frames = (*encoded.frames[: 9 - junk], *[b"junk"] * junk)
        collected = stages.admit(run, plan, replace(encoded, frames=frames), None)
        with pytest.raises(TooFewClients) as caught:
            stages.aggregate(run, plan, state, collected)
        assert (caught.value.message, caught.value.hint) == (sentence, hint)
        assert run.sealed(1) is None

    def test_just_enough_clients(self, open_single: StartRun) -> None:
        run = open_single(selection={"min_updates": 8})
        state, plan = begin(run)
        assert aggregate(run, state, plan, collect(run, state, plan, ("client-0000",))).round == 1

    def test_parameters_that_are_no_longer_finite(self, open_single: StartRun) -> None:
        training = {"learning_rate": 20.0, "batch_size": 64, "steps": 2}
        run = open_single(training=training, server_optimizer={"kind": "fedavg", "learning_rate": 3e38})
        state, plan = begin(run)
        with pytest.raises(RunFailed, match=r"round 1: the server's parameters are no longer finite") as caught:
            aggregate(run, state, plan, collect(run, state, plan))
        assert caught.value.hint == "begin another run with a lower server_optimizer.learning_rate"


class TestCommit:
    def test_a_round_becomes_visible_whole(self, open_single: StartRun, store: Store) -> None:
        run = open_single()
        state, plan = begin(run)
        result = finish(run, state, plan, collect(run, state, plan, ("client-0002",)))
        record = store.round("r", 1)
        assert record is not None
        assert run.committed(1) == result
        assert record.result["metrics"] == result.metrics
        assert run.refresh().committed_round == 1
        assert run.state().params_digest == result.params_digest == record.params_digest
        assert [charge.state for charge in store.ledger.collections(run_id="r")] == ["spent"]
        assert run.committed(2) is None
        assert run.sealed(1) is None
        assert result.rejected == {"not_finite": 1}
        assert (result.metrics["clients/selected"], result.metrics["clients/received"]) == (9, 8)
        assert result.metrics["clients/rejected"] == 1

    def test_rounds_follow_each_other(self, open_single: StartRun) -> None:
        run = open_single()
        with pytest.raises(RunFailed, match="round 2 cannot begin: the last committed round of run r is 0"):
            stages.load(run, 2)
        digests = [finish(run, *(begun := begin(run, n)), collect(run, *begun)).params_digest for n in (1, 2, 3)]
        assert len(set(digests)) == 3
        with pytest.raises(RunFailed, match="round 3 cannot begin"):
            stages.load(run, 3)

    def test_nothing_is_committed_without_a_reservation(self, open_single: StartRun) -> None:
        run = open_single()
        state = stages.load(run, 1)
        plan = stages.select(run, state, stages.broadcast(run, state))
        with pytest.raises(StoreError, match="nothing is reserved"):
            stages.aggregate(run, plan, state, collect(run, state, plan))


class TestEvaluate:
    def test_every_so_many_rounds_and_after_the_last(self, start_run: StartRun) -> None:
        run = start_run(evaluation={"every": 2}, rounds=5)
        state = stages.load(run, 1)
        evaluated = [round for round in range(1, 6) if stages.evaluate(run, replace(state, round=round))]
        assert evaluated == [2, 4, 5]

    def test_baselines_stand_beside(self, start_run: StartRun) -> None:
        run = start_run()
        metrics = stages.evaluate(run, replace(stages.load(run, 1), round=1))
        assert metrics["eval/baseline/pooled_majority"] == run.federation.baselines["pooled_majority"]
        assert 0 <= metrics["eval/accuracy"] <= 1
        assert "eval/client/client-0008/loss" in metrics


class TestRoundResult:
    state = ServerState(4, np.ones(3, np.float32), {}, "")

    def test_values_that_are_not_finite_are_left_out_but_no_epsilon(self) -> None:
        collected = CohortStatistics(
            selected=2,
            rejected={name: Rejection(RejectionCode.NOT_FINITE, "x") for name in ("a", "b")},
            upload_bytes=10,
            download_bytes=20,
            largest_bytes=5,
        )
        found = {"eval/loss": public(float("inf")), "eval/accuracy": public(0.5)}
        found["privacy/epsilon"] = public(float("inf"))  # which nobody may take for none
        result = round_result(
            self.state,
            collected,
            found,
            {},
            round_s=7.0,
            peak_memory_bytes=3_000_000,
            withholds=False,
            hides_participation=False,
        )
        assert result.metrics == {
            "eval/accuracy": 0.5,
            "privacy/epsilon": float("inf"),
            "clients/selected": 2,
            "clients/received": 0,
            "clients/rejected": 2,
            "communication/upload_bytes": 10,
            "communication/largest_update_bytes": 5,
            "communication/download_bytes": 20,
            "time/round_s": 7,
            "memory/peak_mb": 3,
        }
        assert (result.round, result.params_digest) == (4, self.state.params_digest)
        assert result.rejected == {"not_finite": 2}

    def test_seconds_of_a_sealed_attempt_are_kept(self) -> None:
        collected = CohortStatistics(received=1, train_loss=Weighted(1.0, 2.0), seconds={"load": 1.0, "train": 8.0})
        seconds = {"load": 0.5, "aggregate": 2.0, "commit": 4.0}
        result = round_result(
            self.state,
            collected,
            {},
            seconds,
            round_s=3.0,
            peak_memory_bytes=0,
            withholds=False,
            hides_participation=False,
        )
        assert result.seconds == {"load": 0.5, "train": 8.0, "aggregate": 2.0}
        assert result.metrics["time/round_s"] == 3 + 1 + 8
        assert result.metrics["time/train_s"] == 8
        assert result.metrics["train/loss"] == 0.5


def test_a_stage_is_announced_and_timed_even_when_it_fails(start_run: StartRun) -> None:
    run, heard = start_run(), []
    run.on_stage = heard.append
    state, plan = begin(run)
    with pytest.raises(TooFewClients):
        stages.aggregate(run, plan, state, Collection(Accumulator({}, 0), CohortStatistics()))
    assert heard == ["load", "broadcast", "select", "authorise", "aggregate"] == list(run.seconds)
    stages.load(run, 1)
    assert list(run.seconds) == ["load"]


class TestProfile:
    def test_stages_and_shards_are_spans(self, start_run: StartRun, tmp_path: Path) -> None:
        run = start_run()
        run.profile = Profile()
        began = time.time()
        finish(run, *(begun := begin(run)), collect(run, *begun))
        run.profile.write(tmp_path / "trace.json")
        trace = json.loads((tmp_path / "trace.json").read_text())
        (name, *spans) = trace["traceEvents"]
        assert name == {"ph": "M", "name": "process_name", "pid": os.getpid(), "args": {"name": "the run"}}
        stage_names = [span["name"] for span in spans if span["cat"] == "stage"]
        assert stage_names == [
            *("load", "broadcast", "select", "authorise", "train", "compress", "admit"),
            *("aggregate", "server_step", "evaluate", "commit"),
        ]
        (train,) = (span for span in spans if span["name"] == "train")
        shards = [span for span in spans if span["cat"] == "shard"]
        assert [span["name"] for span in shards][:2] == ["2 clients from client-0000", "2 clients from client-0002"]
        assert len(shards) == 5
        for span in spans:
            assert span["ph"] == "X" and span["pid"] == os.getpid()
            assert began <= span["ts"] / 1e6 <= (span["ts"] + span["dur"]) / 1e6 <= time.time()
        for shard in shards:
            assert train["ts"] <= shard["ts"] and shard["ts"] + shard["dur"] <= train["ts"] + train["dur"]

    def test_another_process_has_a_track_of_its_own(self) -> None:
        profile = Profile()
        profile.add("shard", "shard", 1.0, 2.0, process=4242)
        profile.add("train", "stage", 0.5, 2.5)
        trace = profile.trace()["traceEvents"]
        names = {each["pid"]: each["args"]["name"] for each in trace if each["ph"] == "M"}
        assert names == {os.getpid(): "the run", 4242: "training process 1"}

    def test_a_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot be written to .*nowhere.*: No such file or directory"):
            check_writable(tmp_path / "nowhere" / "trace.json")
        check_writable(tmp_path / "trace.json")
        assert not (tmp_path / "trace.json").exists()
