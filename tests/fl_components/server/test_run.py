"""Taking hold of a run: made once, resumed from what is stored, and let go again whatever happens."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedrounds.fl_components.config import config_digest
from fedrounds.fl_components.errors import ConfigError, LeaseHeld, RunCancelled, RunConflict, RunNotFound, StoreError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.opening import open_run, start_fresh_or_latest
from fedrounds.fl_components.store import Lease, Store

from . import rounds
from .conftest import StartRun, configured


def one_round(run: Any, round: int = 1) -> Any:
    state = stages.load(run, round)
    plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
    batch = stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
    collected = stages.admit(run, plan, stages.compress(run, plan, batch), None)
    return rounds.finish(run, state, plan, collected)


class TestOpen:
    def test_a_new_run_is_written_down(self, store: Store) -> None:
        config = configured(seed=5)
        with open_run(store, "r", config=config, source_folder="/experiments") as run:
            record = run.record
            assert (run.run_id, run.config) == ("r", config)
        assert (record.name, record.population, record.rounds, record.state) == ("ward", "ward", 3, "Pending")
        assert (record.config_digest, record.source_folder) == (config_digest(config), "/experiments")
        assert record.params_digest == run.federation.initial_state().params_digest
        assert record.engine["num_clients"] == 9
        assert record.ancestor is None

    def test_a_stored_run_needs_no_configuration(self, store: Store, start_run: StartRun) -> None:
        changes: dict[str, Any] = {
            "training": {"learning_rate": 0.3, "epochs": 2},
            "server_optimizer": {"kind": "fedadam"},
        }
        with start_run(**changes) as run:
            digest = one_round(run).params_digest
            run.lease.finish(RunState.COMPLETED)
        heard: list[str] = []
        with open_run(store, "r", notify=heard.append) as resumed:
            assert resumed.config == configured(**changes)
            assert resumed.state().params_digest == digest
            assert resumed.state().config_digest == config_digest(resumed.config)
        assert heard == []

    def test_the_data_of_a_run_go_with_it(self, store: Store) -> None:
        """At once, by counting references: the next cell of a sweep needs the memory."""
        gc.collect()
        gc.disable()
        try:
            run = open_run(store, "r", config=configured())
            one_round(run)
            run.close()
            federation = weakref.ref(run.federation)
            del run
            assert federation() is None
        finally:
            gc.enable()

    def test_no_such_run(self, store: Store) -> None:
        with pytest.raises(RunNotFound, match="there is no run 'r' in this store"):
            open_run(store, "r")

    def test_another_configuration(self, store: Store, start_run: StartRun) -> None:
        start_run().close()
        with pytest.raises(RunConflict, match="seed"):
            open_run(store, "r", config=configured(seed=1))
        open_run(store, "r", config=configured()).close()

    def test_nothing_is_written_for_what_does_not_fit(self, store: Store) -> None:
        model = {"kind": "module", "path": "torch.nn:Linear", "arguments": {"in_features": 1, "out_features": 1}}
        with pytest.raises(Exception, match="the model cannot take"):
            open_run(store, "r", config=configured(model=model))
        assert store.runs() == []

    def test_data_that_changed_since(self, store: Store, start_run: StartRun, monkeypatch: pytest.MonkeyPatch) -> None:
        start_run().close()
        monkeypatch.setattr(Federation, "facts", {"num_clients": 4})
        with pytest.raises(RunConflict, match="began with clients 9, now 4"):
            open_run(store, "r")

    def test_another_machine_is_told(self, store: Store, start_run: StartRun, monkeypatch: pytest.MonkeyPatch) -> None:
        start_run().close()
        monkeypatch.setattr("fedrounds.fl_components.training.facts._processor", lambda: "Abacus (beads)")
        heard: list[str] = []
        open_run(store, "r", notify=heard.append).close()
        assert len(heard) == 1
        assert heard[0].startswith("this machine differs from the one that began the run: processor was ")
        assert heard[0].endswith("is 'Abacus (beads)'; the last bits of the model may differ")


class TestLease:
    def test_only_one_holds_a_run(self, store: Store, start_run: StartRun) -> None:
        run = start_run()
        with pytest.raises(LeaseHeld):
            open_run(store, "r")
        run.close()
        open_run(store, "r").close()

    def test_it_is_let_go_when_opening_fails(
        self, store: Store, start_run: StartRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start_run().close()

        def fails(lease: Lease) -> int:
            raise StoreError("the folder of blobs cannot be read")

        with monkeypatch.context() as patched:
            patched.setattr(Lease, "collect_garbage", fails)
            with pytest.raises(StoreError, match="cannot be read"):
                open_run(store, "r")
        open_run(store, "r").close()


@pytest.mark.ci
def test_what_trains_ends_with_it(start_run: StartRun) -> None:
    """Its processes, and the examples that it holds: a sweep opens many, one after the other."""
    run, before = start_run(execution={"shard_size": 2, "processes": 2}), set(psutil.Process().children())
    one_round(run)
    started, executor = set(psutil.Process().children()) - before, weakref.ref(run.executor)
    assert len(started) == 2
    run.close()
    assert not any(process.is_running() for process in started)
    assert executor() is None


class TestStart:
    def test_latest_is_the_newest_model_of_that_name(self, store: Store, start_run: StartRun) -> None:
        with start_run("first") as run:
            params_D = run.state().params_D
            digest = one_round(run).params_digest
            run.lease.finish(RunState.COMPLETED)
        start_run("untrained").close()
        start_run("other", name="other").close()
        latest = {"kind": "logistic_regression", "start_from": "latest"}
        with start_run("second", model=latest, rounds=4) as run:
            assert run.record.params_digest == run.state().params_digest == digest
            assert run.record.ancestor == "run:first"
            assert run.state().round == 0
            assert not np.array_equal(run.state().params_D, params_D)

    def test_latest_of_a_first_run_is_fresh(self, store: Store) -> None:
        config = configured(model={"kind": "logistic_regression", "start_from": "latest"})
        assert start_fresh_or_latest(store)(assemble(config)) == (None, None)

    def test_a_model_of_another_shape_is_refused_before_anything_is_written(
        self, store: Store, start_run: StartRun
    ) -> None:
        with start_run("first") as run:
            one_round(run)
            run.lease.finish(RunState.COMPLETED)
        config = configured(model={"kind": "mlp", "hidden": [3], "start_from": "latest"})
        with pytest.raises(ConfigError, match=r"model\.start_from 'latest' has 650 parameters"):
            open_run(store, "second", config=config)
        assert store.find_run("second") is None

    def test_other_frozen_parameters_are_refused(self, store: Store, start_run: StartRun) -> None:
        """What was trained beside one frozen layer is nothing beside another."""
        with start_run("first") as run:
            one_round(run)
            run.lease.finish(RunState.COMPLETED)
        config = configured(model={"kind": "logistic_regression", "start_from": "latest"})
        federation = assemble(config)
        federation.module.register_buffer("scale", torch.ones(2))
        with pytest.raises(ConfigError, match="other frozen parameters or buffers"):
            start_fresh_or_latest(store)(federation)

    def test_a_resume_does_not_ask_where_to_start(self, store: Store, start_run: StartRun) -> None:
        def never(config: Any) -> Any:
            raise AssertionError("asked")

        start_run().close()
        open_run(store, "r", config=configured(), start=never).close()


def test_cancelling(start_run: StartRun) -> None:
    run = start_run()
    run.check_cancelled()
    run.cancelled.set()
    with pytest.raises(RunCancelled, match="run r was stopped on request") as caught:
        run.check_cancelled()
    assert caught.value.hint == "`fedrounds resume r` continues it"


def test_the_home_is_the_test_s_own(store: Store, home: Path) -> None:
    assert store.home == home
