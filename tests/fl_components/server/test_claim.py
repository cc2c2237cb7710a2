"""A run under a privacy claim: what it costs, what it shows, and what nobody can find afterwards."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_components.config import parse_config
from fl_components.errors import BudgetExhausted, ConfigError, DataError, ModelError, RunConflict, RunFailed, StoreError
from fl_components.privacy import CentralPrivacy
from fl_components.privacy.accountants import rdp_epsilon
from fl_components.privacy.events import Gaussian, PoissonSampled
from fl_components.server import stages
from fl_components.server.claim import members_of
from fl_components.server.federation import assemble
from fl_components.server.hub import Hub, open_hub
from fl_components.store import BudgetTerms, Store
from fl_components.values import Collected, RoundResult, ServerState
from flows.round import walk
from tests.support import PRIVATE

NUM_CLIENTS = 9
FIELDS = PRIVATE | {
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": NUM_CLIENTS}},
    "execution": {"processes": 1, "shard_size": 3},
}
WARDS = {"kind": "function", "path": f"{__name__}:wards", "num_classes": 2}
TERMS = BudgetTerms(
    epsilon=100.0, delta=1e-3, unit="client", neighbouring="add_or_remove", accountant="RDP", demonstration=False
)
EVENT = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1.5))


def wards(
    exchanged: int | None = None, reverse: bool = False, shortened: int | None = None
) -> dict[str, tuple[Any, ...]]:
    """Nine wards with rows of their own; one of them may have entirely other ones, and fewer, or one row alone."""
    found = {}
    for ward in range(NUM_CLIENTS):
        generator = np.random.default_rng(99 if ward == exchanged else ward)
        sizes = (3, 2) if ward == exchanged else (20, 5)
        x_train, x_test = (generator.normal(size=(size, 4)).astype(np.float32) for size in sizes)
        if reverse:
            x_train = x_train[::-1].copy()
        if ward == shortened:
            x_train = x_train[:1]
        found[f"ward-{ward}"] = (x_train, x_train.sum(1) > 0, x_test, x_test.sum(1) > 0)
    return found


def other_wards() -> dict[str, tuple[Any, ...]]:
    return wards(exchanged=4)


def broken_wards() -> dict[str, tuple[Any, ...]]:
    found = wards()
    x_train, y_train, *rest = found["ward-7"]
    found["ward-7"] = (x_train, np.where(np.arange(len(y_train)) == 3, 42, y_train), *rest)
    return found


Begin = Callable[..., Hub]


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store.open() as opened:
        yield opened


@pytest.fixture
def begin(store: Store) -> Iterator[Begin]:
    """Opens a run with changes to FIELDS."""
    with ExitStack() as stack:

        def opened(run_id: str = "r", **changes: Any) -> Hub:
            config = parse_config(FIELDS | changes)
            return stack.enter_context(open_hub(store, run_id, config=config))

        yield opened


def all_bytes(home: Path) -> bytes:
    """Of every file in the home, the database's log included."""
    return b"".join(path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file())


def secret_file(store: Store) -> Path:
    (file,) = (store.home / "secrets" / "runs").iterdir()
    return file


class TestSpending:
    def test_each_round_is_charged_and_told(self, begin: Begin, store: Store) -> None:
        hub = begin()
        for round in (1, 2, 3):
            result = walk(stages, hub, round)
            expected = rdp_epsilon({EVENT: round}, "add_or_remove", 1e-3)
            assert result.metrics["privacy/epsilon"] == pytest.approx(expected)
        assert [charge.state for charge in store.charges(population="wards")] == ["spent"] * 3
        assert all(charge.event == EVENT.model_dump() for charge in store.charges())
        store.verify_journal()

    def test_a_population_ends_where_its_budget_does(self, begin: Begin, store: Store) -> None:
        epsilon = rdp_epsilon({EVENT: 3}, "add_or_remove", 1e-3)
        store.set_budget("wards", replace(TERMS, epsilon=epsilon), reason="x", by="ada")
        first, second = begin("a", data=WARDS), begin("b", data=WARDS)
        walk(stages, first, 1), walk(stages, first, 2), walk(stages, second, 1)
        for hub, round in ((first, 3), (second, 2)):
            with pytest.raises(BudgetExhausted, match="the next round would bring population 'wards' to an epsilon of"):
                walk(stages, hub, round)
        budget = store.find_budget("wards")
        assert budget is not None and sum(budget.spent.values()) == 3

    def test_the_limit_is_exact(self, begin: Begin, store: Store) -> None:
        """A hair below what two rounds come to is the end after one; it is told before the round is begun."""
        epsilon = rdp_epsilon({EVENT: 2}, "add_or_remove", 1e-3)
        hub = begin(privacy=FIELDS["privacy"] | {"epsilon": epsilon * (1 - 1e-9)})
        hub.check_budget()
        walk(stages, hub, 1)
        with pytest.raises(BudgetExhausted):
            hub.check_budget()
        with pytest.raises(BudgetExhausted):
            walk(stages, hub, 2)

    def test_no_noise_to_speak_of_is_no_way_around_a_budget(self, begin: Begin) -> None:
        """Where the accountant's arithmetic ends, epsilon is beyond every limit, not nothing."""
        for noise in (1e-154, 1e-200, 1e-4, 1e13):
            with pytest.raises(ConfigError, match="noise_multiplier"):
                begin(privacy=FIELDS["privacy"] | {"noise_multiplier": noise})
        tiny = PoissonSampled(sampling_rate=0.5, event=Gaussian(noise_multiplier=1e-154))
        assert rdp_epsilon({EVENT: 1000, tiny: 1}, "add_or_remove", 1e-3) > 1e300

    def test_a_run_ends_where_its_own_limit_does(self, begin: Begin) -> None:
        epsilon = rdp_epsilon({EVENT: 2}, "add_or_remove", 1e-3)
        hub = begin(privacy=FIELDS["privacy"] | {"epsilon": epsilon})
        walk(stages, hub, 1), walk(stages, hub, 2)
        with pytest.raises(BudgetExhausted, match="would bring this run to an epsilon of"):
            walk(stages, hub, 3)

    def test_nothing_is_trained_when_it_is_refused(self, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = begin(privacy=FIELDS["privacy"] | {"epsilon": 1e-6})
        monkeypatch.setattr(stages, "train", None)
        with pytest.raises(BudgetExhausted):
            walk(stages, hub, 1)

    def test_a_simulated_cohort_is_in_no_ledger(self, begin: Begin, store: Store) -> None:
        hub = begin(privacy=FIELDS["privacy"] | {"simulate_noise_cohort": 450})
        result = walk(stages, hub, 1)
        assert store.budgets() == [] and store.run("r").spent == []
        assert "privacy/epsilon" not in result.metrics
        assert result.metrics["privacy/epsilon_simulated"] == pytest.approx(
            rdp_epsilon({EVENT: 1}, "add_or_remove", 1e-3)
        )


class TestPopulations:
    def test_private_data_need_a_budget_that_somebody_has_set(self, begin: Begin, store: Store) -> None:
        with pytest.raises(StoreError, match="population 'wards' has no privacy budget"):
            begin(data=WARDS)
        assert store.runs() == []
        store.set_budget("wards", TERMS, reason="the board agreed", by="ada")
        begin(data=WARDS)

    def test_public_data_register_a_demonstration(self, begin: Begin, store: Store) -> None:
        begin()
        budget = store.find_budget("wards")
        assert budget is not None and budget.demonstration and budget.epsilon is None

    def test_private_data_never_hide_behind_a_demonstration(self, begin: Begin) -> None:
        begin().close()
        with pytest.raises(ConfigError, match="is a demonstration on public data, and data function are private"):
            begin("s", data=WARDS)

    def test_a_client_has_one_budget(self, begin: Begin, store: Store) -> None:
        """Also beside others: eight of these nine wards have spent already."""
        store.set_budget("wards", TERMS, reason="x", by="ada"), store.set_budget("other", TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        with pytest.raises(ConfigError, match="data of population 'other' belong to population 'wards'"):
            begin("b", data=WARDS | {"path": f"{__name__}:other_wards"}, population="other")

    def test_a_population_may_get_new_data(self, begin: Begin, store: Store) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        walk(stages, begin("a", data=WARDS), 1)
        walk(stages, begin("b", data=WARDS | {"path": f"{__name__}:other_wards"}), 1)
        assert sum(store.find_budget("wards").spent.values()) == 2  # type: ignore[union-attr]

    @pytest.mark.parametrize("population", ["wards", "elsewhere"])
    @pytest.mark.parametrize(
        ("privacy", "why"),
        [
            ({"kind": "none"}, "privacy.kind is none"),
            (FIELDS["privacy"] | {"simulate_noise_cohort": 450}, "privacy.simulate_noise_cohort is set"),
        ],
    )
    def test_nobody_learns_from_its_clients_without_being_charged(
        self, begin: Begin, store: Store, privacy: dict[str, Any], why: str, population: str
    ) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        with pytest.raises(ConfigError, match=f"population 'wards' has a privacy budget .* not be charged .*{why}"):
            begin("b", data=WARDS, privacy=privacy, population=population)

    @pytest.mark.parametrize("population", ["wards", "elsewhere"])
    @pytest.mark.parametrize("privacy", [{"kind": "none"}, FIELDS["privacy"]], ids=["no claim", "claim"])
    def test_what_has_a_budget_is_not_declared_public(
        self, begin: Begin, store: Store, privacy: dict[str, Any], population: str
    ) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        begin("a", data=WARDS).close()
        with pytest.raises(ConfigError, match="are declared public, and belong to population 'wards'"):
            begin("b", data=WARDS | {"public": True}, privacy=privacy, population=population)

    def test_what_is_refused_binds_nothing(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else the population that the data do belong to could not have them any more."""
        store.set_budget("wards", TERMS, reason="x", by="ada")
        for run_id, changes in (("bad id !", {}), ("r", {"rounds": 2, "selection": {"kind": "uniform"}})):
            with pytest.raises(ConfigError):
                begin(run_id, data=WARDS, **changes)
        assert not store.has_members()
        begin(data=WARDS).close()
        twice = {f"{name}{n}": (x + n, *rest) for name, (x, *rest) in wards().items() for n in (0, 1)}
        monkeypatch.setattr(f"{__name__}.wards", lambda: twice)
        before = list(store.journal())
        with pytest.raises(RunConflict, match="began with clients 9, now 18"):
            open_hub(store, "r")
        assert [row.kind for row in store.journal()] == [row.kind for row in before]

    def test_a_run_that_is_over_may_be_opened_to_repair_what_is_shown_of_it(self, begin: Begin, store: Store) -> None:
        hub = begin(data=WARDS, privacy={"kind": "none"}, rounds=1)
        walk(stages, hub, 1)
        hub.close()
        store.set_budget("wards", TERMS, reason="x", by="ada")
        open_hub(store, "r").close()
        with pytest.raises(ConfigError, match="would not be charged"):
            begin("s", data=WARDS, privacy={"kind": "none"})

    def test_one_row_is_nobody(self, store: Store) -> None:
        """Unrelated clients with the same single row are not one client; the order of rows is no difference."""

        def federation(data: dict[str, Any]) -> Any:
            return assemble(parse_config(FIELDS | {"data": WARDS | {"path": f"{__name__}:wards", "arguments": data}}))

        whole = members_of(store, federation({}))
        assert len(whole) == NUM_CLIENTS
        assert members_of(store, federation({"reverse": True})) == whole
        assert len(members_of(store, federation({"shortened": 2}))) == NUM_CLIENTS - 1

    def test_public_data_draw_on_no_private_budget(self, begin: Begin, store: Store) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        with pytest.raises(ConfigError, match="population 'wards' is private, and data digits are public"):
            begin()

    def test_a_resume_is_held_to_the_same(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """The function gives the data of other clients now, who have a budget of their own."""
        store.set_budget("wards", TERMS, reason="x", by="ada"), store.set_budget("other", TERMS, reason="x", by="ada")
        begin(data=WARDS).close()
        others = {name: (x_train + 1, *rest) for name, (x_train, *rest) in wards().items()}
        monkeypatch.setattr(f"{__name__}.other_wards", lambda: others)
        begin("o", data=WARDS | {"path": f"{__name__}:other_wards"}, population="other").close()
        monkeypatch.setattr(f"{__name__}.wards", lambda: others)
        with pytest.raises(ConfigError, match="data of population 'wards' belong to population 'other'"):
            open_hub(store, "r")

    def test_a_resume_on_other_terms_is_refused(self, begin: Begin, store: Store) -> None:
        """Nothing was spent, so an administrator could change them in between."""
        store.set_budget("wards", TERMS, reason="x", by="ada")
        begin(data=WARDS).close()
        store.set_budget("wards", replace(TERMS, neighbouring="replace_one"), reason="x", by="ada")
        with pytest.raises(ConfigError, match="neighbouring is add_or_remove, its budget's is replace_one"):
            open_hub(store, "r")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"privacy": FIELDS["privacy"] | {"delta": 1e-4}}, "delta is 0.0001, its budget's is 0.001"),
            ({"selection": {"kind": "uniform"}}, "neighbouring is zero_out, its budget's is add_or_remove"),
        ],
    )
    def test_other_terms_are_refused(self, begin: Begin, store: Store, changes: dict[str, Any], words: str) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        with pytest.raises(ConfigError, match=words):
            begin(data=WARDS, **changes)

    def test_a_delta_that_promises_little_is_remarked_on(self, store: Store) -> None:
        heard: list[str] = []
        config = parse_config(FIELDS | {"privacy": FIELDS["privacy"] | {"delta": 0.2}})
        open_hub(store, "r", config=config, say=heard.append).close()
        assert any("privacy.delta is 0.2, more than one in 9 clients" in said for said in heard)


class TestSecrets:
    def test_two_runs_of_one_configuration_differ(self, begin: Begin) -> None:
        """The seed decides nothing that is private."""
        results = [walk(stages, begin(run_id), 1) for run_id in ("a", "b")]
        assert results[0].params_digest != results[1].params_digest

    def test_cohorts_and_batches_are_not_drawn_from_the_seed(self, begin: Begin) -> None:
        hubs = [begin("a"), begin("b"), begin("c", privacy={"kind": "none"})]
        plans = [stages.select(hub, stages.load(hub, 1)) for hub in hubs]
        seeds = [{(task.client_id, task.seed) for task in plan.cohort} for plan in plans]
        assert not seeds[0] & seeds[1] and not seeds[0] & seeds[2]
        cohorts = [[task.client_id for task in stages.select(hub, hub.state()).cohort] for hub in hubs]
        assert len({tuple(cohort) for cohort in cohorts}) > 1

    def test_noise_is_drawn_when_the_seal_is_durable(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub, sealed = begin(), []
        release = CentralPrivacy.release

        def released(self: CentralPrivacy, *rest: Any) -> Any:
            sealed.append(store.sealed("r", 1) is not None)
            return release(self, *rest)

        monkeypatch.setattr(CentralPrivacy, "release", released)
        walk(stages, hub, 1)
        assert sealed == [True]

    def test_another_collection_or_run_has_other_noise(self, begin: Begin, store: Store) -> None:
        """Under one secret, which another run could only have by a copied file."""
        hub = begin()
        plan, state, collected = collect(hub, stages.load(hub, 1))
        first = stages.aggregate(hub, plan, state, collected)
        again = stages.aggregate(hub, replace(plan, collection=2), state, collected)
        assert first.params_digest != again.params_digest
        key = hub.key(1, "noise of the sum")
        for name in ("run_id", "population"):
            hub.run = replace(store.run("r"), **{name: "another"})
            assert hub.key(1, "noise of the sum") != key

    def test_two_databases_of_one_home_share_no_secret(self, tmp_path: Path) -> None:
        """Each may know a run of the same id."""
        digests = set()
        for name in ("one", "two"):
            url = f"sqlite:///{tmp_path / name}.db"
            with (
                Store.open(tmp_path / "home", database_url=url, blobs_url=str(tmp_path / name)) as store,
                open_hub(store, "r", config=parse_config(FIELDS)) as hub,
            ):
                digests.add(walk(stages, hub, 1).params_digest)
        assert len(digests) == 2 and len(list((tmp_path / "home" / "secrets" / "runs").iterdir())) == 2

    def test_a_round_that_is_tried_again_is_the_same(self, begin: Begin, store: Store) -> None:
        hub = begin()
        state = stages.load(hub, 1)
        plans = [stages.select(hub, state) for _ in range(2)]
        assert plans[0] == plans[1]
        first = stages.aggregate(hub, *collect(hub, state))
        again = stages.aggregate(hub, *collect(hub, state))
        assert first.params_digest == again.params_digest

    def test_a_resume_finishes_from_the_seal(self, begin: Begin, store: Store) -> None:
        hub = begin()
        state = stages.load(hub, 1)
        expected = stages.aggregate(hub, *collect(hub, state)).params_digest
        hub.close()
        with open_hub(store, "r") as resumed:
            assert resumed.sealed(1) is not None
            assert walk(stages, resumed, 1).params_digest == expected
        assert len(store.charges()) == 1

    def test_the_seal_cannot_be_read_without_the_key(self, begin: Begin, store: Store) -> None:
        hub = begin()
        _, _, collected = collected_of(hub)
        data = store.sealed("r", 1)
        assert data is not None
        with pytest.raises(StoreError):
            Collected.from_bytes(data.data)
        assert collected.partial.tensors["sum"].tobytes()[:64] not in all_bytes(store.home)

    def test_after_a_commit_nobody_can_make_the_noise_again(self, begin: Begin, store: Store) -> None:
        """No byte of the home, the database and its log included, holds the old key or the old sum."""
        hub = begin()
        assert hub.secret is not None
        old = {secret_file(store).read_text().split('"key": "')[1][:64]}
        keys = {hub.key(1, f"collection 1 noise of the {what}") for what in ("sum", "count")} | {hub.key(1, "seal")}
        state, plan, collected = collected_of(hub)
        state = stages.aggregate(hub, plan, state, collected)
        stages.commit(hub, plan, state, collected, {})
        found = all_bytes(store.home)
        for key in {bytes.fromhex(each) for each in old} | keys:
            assert key not in found and key.hex().encode() not in found
        total_D = collected.partial.tensors["sum"]
        assert np.abs(total_D).max() > 0
        for start in range(0, len(total_D) - 8, 8):
            if np.abs(total_D[start : start + 8]).min() > 0:
                assert total_D[start : start + 8].tobytes() not in found
        with pytest.raises(StoreError, match="round 1 of this run has no key"):
            hub.key(1, "collection 1 noise of the sum")

    def test_a_process_that_ended_before_it_forgot_the_key(self, begin: Begin, store: Store) -> None:
        hub = begin()
        file = secret_file(store)
        before = file.read_text()
        walk(stages, hub, 1)
        hub.close()
        file.write_text(before)  # as if it had been killed after its commit
        with open_hub(store, "r") as resumed:
            assert json.loads(file.read_text())["round"] == 2
            walk(stages, resumed, 2)

    def test_two_empty_cohorts_get_different_noise(self, begin: Begin) -> None:
        hub = begin(selection={"kind": "poisson", "sampling_rate": 1e-9})
        moves = []
        for round in (1, 2):
            before_D = hub.state().params_D
            walk(stages, hub, round)
            moves.append(hub.state().params_D - before_D)
        assert np.abs(moves[0]).max() > 0 and np.abs(moves[1]).max() > 0
        assert not np.array_equal(moves[0], moves[1])

    def test_no_cohort_is_too_small(self, begin: Begin) -> None:
        """A round that ended for want of updates would tell who came."""
        hub = begin(selection={"kind": "poisson", "sampling_rate": 1e-9})
        assert stages.select(hub, stages.load(hub, 1)).min_updates == 0

    def test_two_equal_counts_get_different_noise(self, begin: Begin) -> None:
        clipping = {"kind": "adaptive", "count_noise": 5.0}
        hub = begin(
            selection={"kind": "poisson", "sampling_rate": 1e-9}, privacy=FIELDS["privacy"] | {"clipping": clipping}
        )
        fractions = [walk(stages, hub, round).metrics["privacy/unclipped_fraction"] for round in (1, 2, 3)]
        assert len(set(fractions)) == 3

    def test_a_run_without_its_secret_cannot_go_on(self, begin: Begin, store: Store) -> None:
        hub = begin()
        walk(stages, hub, 1)
        hub.close()
        secret_file(store).unlink()
        with pytest.raises(StoreError, match=r"the secret of this run, .*, is not here"):
            open_hub(store, "r")


def collect(hub: Hub, state: ServerState) -> Any:
    plan = stages.authorise(hub, stages.select(hub, state))
    collected = None
    for wave in plan.waves:
        collected = stages.admit(hub, plan, stages.compress(hub, plan, stages.train(hub, plan, state, wave)), collected)
    return plan, state, collected


def collected_of(hub: Hub) -> Any:
    state = stages.load(hub, 1)
    plan, _, collected = collect(hub, state)
    stages.aggregate(hub, plan, state, collected)
    return state, plan, collected


class TestReleases:
    def run(self, begin: Begin, store: Store, run_id: str, path: str) -> tuple[list[RoundResult], str]:
        if store.find_budget("wards") is None:
            store.set_budget("wards", TERMS, reason="x", by="ada")
        hub = begin(
            run_id, data=WARDS | {"path": f"{__name__}:{path}"}, selection={"kind": "poisson", "sampling_rate": 1}
        )
        results = [walk(stages, hub, round) for round in (1, 2, 3)]
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

    def test_one_client_exchanged_changes_noised_values_alone(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same secret, one ward with other rows: every value, name, count and order that leaves is equal, but for
        the model, its digest, and what is computed from them."""
        seen = []
        monkeypatch.setattr("fl_components.store.secrets.entropy.token_bytes", lambda size: b"5" * size)
        for path in ("wards", "other_wards"):
            with Store.open(tmp_path / path) as store, ExitStack() as stack:
                config = parse_config(FIELDS | {"data": WARDS | {"path": f"{__name__}:{path}"}})
                store.set_budget("wards", TERMS, reason="x", by="ada")
                hub = stack.enter_context(open_hub(store, "r", config=config))
                results = [walk(stages, hub, round) for round in (1, 2, 3)]
                noised = {"privacy/update_norm", "privacy/signal_to_noise"}
                seen.append(
                    (
                        [{name: v for name, v in result.metrics.items() if name not in noised} for result in results],
                        [list(result.metrics) for result in results],
                        [(result.rejected, result.seconds) for result in results],
                        [(row.kind, _without_digests(row.content)) for row in store.journal()],
                        [(charge.event, charge.state) for charge in store.charges()],
                    )
                )
        assert seen[0] == seen[1]

    def test_messages_and_errors_name_nobody(self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        hub, heard = begin(data=WARDS), list[str]()
        hub.say = heard.append
        hub.say_of_clients("a training process died; its shard is trained again: clients ward-3, ward-4")
        file = store.home / "withheld" / "r.log"
        assert heard == [] and "ward-3" in file.read_text()

        def fails(*_: Any, **__: Any) -> Any:
            raise ModelError("the model failed while client ward-3 trained: ValueError: age is 93")

        monkeypatch.setattr(hub.trainer, "train", fails)
        state = stages.load(hub, 1)
        plan = stages.authorise(hub, stages.select(hub, state))
        with pytest.raises(ModelError) as caught:
            stages.train(hub, plan, state, plan.waves[0])
        assert caught.value.message == "the stage train failed; why is withheld under the privacy claim"
        assert "age is 93" in file.read_text() and "93" not in all_that_is_told(caught.value)
        assert file.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize(
        ("stage", "inside"),
        [
            ("select", "fl_components.server.federation.Federation.select"),
            ("compress", "fl_components.server.stages.encode_update"),
            ("admit", "fl_components.server.stages._admit_sum"),
            ("aggregate", "fl_components.server.hub.Hub.seal"),
            ("evaluate", "fl_components.server.federation.Federation.evaluate"),
        ],
    )
    def test_so_do_errors_that_nobody_foresaw(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch, stage: str, inside: str
    ) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise ValueError("age is 93 in ward-3")

        store.set_budget("wards", TERMS, reason="x", by="ada")
        hub = begin(data=WARDS)
        monkeypatch.setattr(inside, fails)
        with pytest.raises(RunFailed) as caught:
            walk(stages, hub, 1)
        assert caught.value.message == f"the stage {stage} failed; why is withheld under the privacy claim"
        assert "93" not in all_that_is_told(caught.value)

    def test_nor_where_it_cannot_be_written_down(
        self, begin: Begin, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise ValueError("age is 93 in ward-3")

        store.set_budget("wards", TERMS, reason="x", by="ada")
        (store.home / "withheld").write_text("a file where a folder should be")
        hub = begin(data=WARDS)
        hub.say_of_clients("ward-3 is slow")
        monkeypatch.setattr("fl_components.server.federation.Federation.select", fails)
        with pytest.raises(RunFailed, match="the stage select failed") as caught:
            walk(stages, hub, 1)
        assert "93" not in all_that_is_told(caught.value) and "could not be written" in str(caught.value.hint)

    def test_so_do_data_that_cannot_be_used(self, begin: Begin, store: Store) -> None:
        store.set_budget("wards", TERMS, reason="x", by="ada")
        broken = WARDS | {"path": f"{__name__}:broken_wards"}
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
    return {name: value for name, value in content.items() if name not in ("params_digest", "config_digest", "members")}


def test_what_is_refused_when_the_clients_are_counted(begin: Begin, store: Store) -> None:
    """Of data whose number of clients the configuration does not tell: nine, of whom half are drawn."""
    store.set_budget("wards", TERMS, reason="x", by="ada")
    with pytest.raises(ConfigError, match="or select more than 15 clients a round"):
        begin(data=WARDS, privacy=FIELDS["privacy"] | {"clipping": {"kind": "adaptive"}})
    assert store.runs() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": {"weights": "num_examples"}}, "num_examples without a cap"),
        ({"selection": {"kind": "poisson", "sampling_rate": 0.5, "min_updates": 1}}, "tells who came"),
        ({"selection": {"kind": "fair", "cohort_size": 3}}, "no privacy accounting is known"),
        ({"selection": {"kind": "fair", "cohort_size": 3}, "data": WARDS}, "no privacy accounting is known"),
        (
            {"selection": {"cohort_size": 3, "availability": {"kind": "bernoulli", "probability": 0.5}}},
            "no privacy accounting is known",
        ),
        (
            {"privacy": {"kind": "central", "noise_multiplier": 1.0, "clipping": {"kind": "adaptive"}}},
            "select more than 10 clients a round",
        ),
        (
            {
                "privacy": {
                    "kind": "central",
                    "noise_multiplier": 1.0,
                    "clipping": {"kind": "fixed", "norm": 1},
                    "seed": 3,
                }
            },
            "privacy has no seed for its noise",
        ),
    ],
)
def test_what_is_refused_when_it_is_read(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(FIELDS | changes)
    parse_config(FIELDS | {"aggregation": {"max_examples": 50}})
