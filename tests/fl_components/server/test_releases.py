"""What a run under a privacy claim shows, keeps for its administrators, and never lets out."""

from __future__ import annotations

import json
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import ConfigError, DataError, ModelError, RunFailed
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.values import RoundResult
from fedrounds.flows.round import walk
from tests.fl_components.server.wards import (
    FIELDS,
    HERE,
    TERMS,
    WARDS,
    Begin,
)


class TestReleases:
    def run(self, begin: Begin, store: Store, run_id: str, path: str) -> tuple[list[RoundResult], str]:
        if store.ledger.budget(Account("wards")) is None:
            store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        run = begin(run_id, data=WARDS | {"path": f"{HERE}:{path}"}, selection={"kind": "poisson", "sampling_rate": 1})
        results = [walk(stages, run, round) for round in (1, 2, 3)]
        return results, json.dumps([row.content for row in store.journal(run_id)], sort_keys=True)

    def test_what_is_neither_public_nor_paid_for_stays_out_of_every_view(self, begin: Begin, store: Store) -> None:
        results, journal = self.run(begin, store, "r", "wards")
        shown = {
            "privacy/clipping_norm",
            "privacy/noise_stddev",
            "privacy/update_norm",
            "privacy/signal_to_noise",
            "privacy/epsilon",
            "privacy/epsilon_population",
            "privacy/epsilon_remaining",
        }
        for result in results:
            assert result.metrics.keys() == shown
            assert (result.rejected, result.seconds) == ({}, {})
        (first, *_) = store.rounds("r")
        assert first.result["metrics"].keys() == shown
        assert {"train/loss", "clients/received", "eval/accuracy"} <= first.withheld["metrics"].keys()
        assert "ward-" not in journal

    def test_public_data_withhold_nothing(self, begin: Begin) -> None:
        result = walk(stages, begin(), 1)
        assert {"train/loss", "clients/received", "time/train_s", "privacy/epsilon"} <= result.metrics.keys()
        assert result.withheld == {}

    def test_results_on_public_test_rows_are_shown(self, begin: Begin, store: Store) -> None:
        """On all of them together: a model that is paid for says nothing more by them. Not by client, whose names are
        not public, nor beside what the training labels alone would reach."""
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        run = begin(data=WARDS, evaluation={"public_test": True})
        result = walk(stages, run, 1)
        shown = {name for name in result.metrics if not name.startswith("privacy/")}
        assert shown == {"eval/loss", "eval/accuracy"}
        assert {"eval/client/ward-0/accuracy", "eval/baseline/pooled_majority"} <= result.withheld["metrics"].keys()

    def test_how_many_were_clipped_is_kept_beside_no_noisy_count(self, begin: Begin, store: Store) -> None:
        """The exact one would give away the noise of the other, which is in the store for ever."""
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        everybody = {"kind": "poisson", "sampling_rate": 1}
        for run_id, norm, expected in (("long", 1e6, 0.0), ("short", 1e-6, 1.0)):
            privacy = FIELDS["privacy"] | {"clipping": {"kind": "fixed", "norm": norm}}
            result = walk(stages, begin(run_id, data=WARDS, selection=everybody, privacy=privacy), 1)
            assert result.withheld["metrics"]["privacy/clipped_fraction"] == expected
            assert "privacy/clipped_fraction" not in result.metrics
        privacy = FIELDS["privacy"] | {"clipping": {"kind": "adaptive", "count_noise": 5.0}}
        result = walk(stages, begin("adaptive", data=WARDS, privacy=privacy), 1)
        assert "privacy/clipped_fraction" not in result.metrics | result.withheld["metrics"]

    def test_one_client_exchanged_changes_noised_values_alone(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same secret, one ward with other rows: every value, name, count and order that leaves is equal, but for
        the model, its digest, and what is computed from them."""
        seen = []
        monkeypatch.setattr("fedrounds.fl_components.store.secrets.entropy.token_bytes", lambda size: b"5" * size)
        for path in ("wards", "other_wards"):
            with Store.open(tmp_path / path) as store, ExitStack() as stack:
                config = parse_config(FIELDS | {"data": WARDS | {"path": f"{HERE}:{path}"}})
                store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
                run = stack.enter_context(open_run(store, "r", config=config))
                results = [walk(stages, run, round) for round in (1, 2, 3)]
                noised = {"privacy/update_norm", "privacy/signal_to_noise"}
                seen.append(
                    (
                        [{name: v for name, v in result.metrics.items() if name not in noised} for result in results],
                        [list(result.metrics) for result in results],
                        [(result.rejected, result.seconds) for result in results],
                        [(row.kind, _without_digests(row.content)) for row in store.journal()],
                        [(charge.event, charge.state) for charge in store.ledger.charges()],
                    )
                )
        assert seen[0] == seen[1]

    def test_messages_and_errors_name_nobody(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        run, heard = begin(data=WARDS), list[str]()
        run.notify = heard.append
        run.notify_restricted("a training process was lost; its work is repeated: clients ward-3, ward-4")
        file = store.home / "withheld" / "r.log"
        assert heard == [] and "ward-3" in file.read_text()

        def fails(*_: Any, **__: Any) -> Any:
            raise ModelError("the model failed while client ward-3 trained: ValueError: diagnosis sepsis")

        monkeypatch.setattr(run.executor, "train", fails)
        state = stages.load(run, 1)
        plan = stages.authorise(run, stages.select(run, state, stages.broadcast(run, state)))
        with pytest.raises(ModelError) as caught:
            stages.train(run, plan, stages.broadcast(run, state), plan.waves[0])
        assert caught.value.message == "the stage train failed; why is withheld under the privacy claim"
        assert "diagnosis sepsis" in file.read_text() and "sepsis" not in all_that_is_told(caught.value)
        assert file.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize(
        ("stage", "inside"),
        [
            ("select", "fedrounds.fl_components.server.federation.Federation.select"),
            ("compress", "fedrounds.fl_components.server.encoding.raw_update_bytes"),
            ("admit", "fedrounds.fl_components.server.run.Run.empty_collection"),
            ("aggregate", "fedrounds.fl_components.server.run.Run.seal"),
            ("server_step", "fedrounds.fl_components.server.run.Run.noise_keys"),
            ("evaluate", "fedrounds.fl_components.server.federation.Federation.evaluate"),
        ],
    )
    def test_so_do_errors_that_nobody_foresaw(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch, stage: str, inside: str
    ) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise ValueError("diagnosis sepsis in ward-3")

        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        run = begin(data=WARDS)
        monkeypatch.setattr(inside, fails)
        with pytest.raises(RunFailed) as caught:
            walk(stages, run, 1)
        assert caught.value.message == f"the stage {stage} failed; why is withheld under the privacy claim"
        assert "sepsis" not in all_that_is_told(caught.value)

    def test_nor_where_it_cannot_be_written_down(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise ValueError("diagnosis sepsis in ward-3")

        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        (store.home / "withheld").write_text("a file where a folder should be")
        run = begin(data=WARDS)
        run.notify_restricted("ward-3 is slow")
        monkeypatch.setattr("fedrounds.fl_components.server.federation.Federation.select", fails)
        with pytest.raises(RunFailed, match="the stage select failed") as caught:
            walk(stages, run, 1)
        assert "sepsis" not in all_that_is_told(caught.value) and "could not be written" in str(caught.value.hint)

    def test_so_do_data_that_cannot_be_used(self, begin: Begin, store: Store) -> None:
        store.ledger.set_budget(Account("wards"), TERMS, reason="x", by="ada")
        broken = WARDS | {"path": f"{HERE}:broken_wards"}
        with pytest.raises(DataError, match="loading the clients' data failed; why is withheld") as caught:
            begin(data=broken)
        assert "ward-7" not in all_that_is_told(caught.value)
        assert "ward-7" in (store.home / "withheld" / "r.log").read_text()
        with pytest.raises(DataError, match="ward-7"):
            begin(data=broken, privacy={"kind": "none"})
        with pytest.raises(ConfigError, match="cannot be a run id"):
            begin("../../escaped", data=broken)
        assert not list(store.home.parent.rglob("escaped*"))


def all_that_is_told(error: BaseException) -> str:
    """With what a log makes of it: its traceback, and all errors that it says it comes from."""
    return "".join(traceback.format_exception(error)) + str(getattr(error, "hint", ""))


def _without_digests(content: dict[str, Any]) -> dict[str, Any]:
    random = ("params_digest", "config_digest", "digests", "key_id", "data_id", "secret_id")
    folders = ("home", "secret_home")
    return {name: value for name, value in content.items() if name not in (*random, *folders)}
