"""Hub: what one run needs in the process that drives it, behind its lease."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Float32, Tensors, tensors_digest
from fedrounds.fl_components.config import FederationConfig, config_digest, is_moved, parse_config
from fedrounds.fl_components.errors import (
    BudgetExhausted,
    ConfigError,
    Diverged,
    ModelError,
    RunCancelled,
    RunConflict,
    RunNotFound,
    StoreError,
)
from fedrounds.fl_components.executors import Executor, peak_memory_bytes
from fedrounds.fl_components.privacy.releases import Release, public
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rejections import Rejection
from fedrounds.fl_components.reports import privacy_report
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.claim import (
    RunClaim,
    check_population,
    delta_warnings,
    join_population,
    run_claims,
)
from fedrounds.fl_components.server.collection import Collection, UpdateStack
from fedrounds.fl_components.server.encoding import Codec
from fedrounds.fl_components.server.federation import Federation, assemble
from fedrounds.fl_components.server.profile import Profile
from fedrounds.fl_components.server.rows import changed_clients, data_facts, digest_key
from fedrounds.fl_components.server.withheld import withheld_error, withhold
from fedrounds.fl_components.store import (
    Charges,
    Lease,
    RunRecord,
    RunSecret,
    Sighting,
    Store,
    can_never_continue,
    check_run_id,
    closed,
    destroy_secrets,
    fresh_collection,
    home,
    last_seen,
    opened,
    place_of_secrets,
)
from fedrounds.fl_components.training import engine_environment
from fedrounds.fl_components.values import (
    Accumulator,
    ClientTask,
    CohortStatistics,
    RoundPlan,
    RoundResult,
    SealedCohort,
    ServerState,
    SimulatedClient,
    pack,
    unpack,
)

Say = Callable[[str], None]
T = TypeVar("T")
Start = Callable[[Federation], tuple[Float32 | None, str | None]]

SEAL_BYTES: Final = 1 << 16
"""Room in a seal for what a round collected, besides the sum and what is kept of each client."""

BYTES_OF_CLIENT: Final = 1536
"""Room in a seal for each client of the largest possible cohort: an id of 100 characters and its rejection,
escaped as JSON."""

STACK_SHARE: Final = 0.2
"""The share of `execution.memory_mb` up to which a round's updates are kept in memory: waves take the rest."""

LONGEST_DETAIL: Final = 120
"""Characters of a rejection's detail that are sealed."""

NAMED: Final = 5
"""Clients that an error names."""


def nobody_listens(_: str) -> None:
    """The null listener."""


@dataclass(eq=False)
class Hub:
    """A run that this process holds: its store, its lease, its federation. Made by `open_hub`; a context manager.

    `seconds` is the time spent in each stage of the round in hand; `cancelled` asks the run to stop before its next
    stage; `on_stage` is told the name of each stage as it begins, `say` what people should know;
    `profile`, where there is one, gets the spans of time; `secret` is there under a privacy claim.
    """

    store: Store
    lease: Lease
    federation: Federation
    run: RunRecord
    on_stage: Say = nobody_listens
    say: Say = nobody_listens
    profile: Profile | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)
    secret: RunSecret | None = None
    _round_began: float = 0.0
    _fresh_collection: bool = False

    @property
    def run_id(self) -> str:
        return self.run.run_id

    @property
    def config(self) -> FederationConfig:
        return self.federation.config

    def begin_round(self) -> None:
        """Start the clocks of a round."""
        self.seconds.clear()
        self._round_began = time.perf_counter()

    @property
    def round_seconds(self) -> float:
        """Seconds since the round in hand began."""
        return time.perf_counter() - self._round_began

    def refresh(self) -> RunRecord:
        """Read the run's row again."""
        self.run = self.store.run(self.run_id)
        return self.run

    def state(self) -> ServerState:
        """The state after the last committed round."""
        return ServerState.from_bytes(self.store.state_blob(self.run_id))

    def committed(self, round: int) -> RoundResult | None:
        """The result of a round that is committed already."""
        record = self.store.round(self.run_id, round)
        return RoundResult(round, record.params_digest, **record.result) if record is not None else None

    def participations(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """In how many committed rounds the clients in these rows [N] took part, int64 [N]."""
        return np.array(self.store.participations(self.run_id, clients.tolist()), np.int64)

    def sealed(self, round: int) -> SealedCohort | None:
        """Return what an earlier attempt collected and sealed for this round, if it did."""
        seal = self.store.sealed(self.run_id, round)
        if seal is None:
            return None
        data = seal.data if self.secret is None else opened(self.key(round, "seal"), seal.data)
        return SealedCohort.from_bytes(data)

    def seal(self, plan: RoundPlan, cohort: SealedCohort) -> None:
        """Make what was collected durable, under a claim so that nobody can read it once the round's key is gone."""
        if self.secret is None:
            data = cohort.to_bytes()
        else:
            rejected = {client_id: _shortened(reason) for client_id, reason in cohort.statistics.rejected.items()}
            # Nothing of the cohort may show in the length, which is that of one whole piece.
            of_clients = self.federation.largest_cohort * BYTES_OF_CLIENT if self.federation.hides_participation else 0
            of_tensors = sum(tensor.nbytes for tensor in cohort.tensors.values())
            data = closed(
                self.key(plan.round, "seal"),
                replace(cohort, statistics=replace(cohort.statistics, rejected=rejected)).to_bytes(),
                multiple=of_tensors + SEAL_BYTES + of_clients,
            )
        self.lease.seal(plan.round, plan.collection, data, cohort.statistics.client_states)

    def client_states(self, client_ids: Sequence[str]) -> list[Tensors]:
        """Return what each of these clients keeps from its last round; empty for one that took part in none."""
        blobs = self.store.client_states(self.run_id, client_ids)
        return [unpack(blobs[client_id])[0] if client_id in blobs else {} for client_id in client_ids]

    def write_client_state(self, state: Tensors) -> str:
        """Make what a client keeps for its next round durable, and return its key."""
        return self.lease.write_client_state(pack(state, {}))

    def empty_collection(self, plan: RoundPlan) -> Collection:
        """Return the collection of a round before its first wave."""
        rule, num_coordinates = self.federation.summed, self.federation.update_layout.size
        if rule is not None:
            updates: Accumulator | UpdateStack = rule.start(num_coordinates + (self.federation.central is not None))
        else:
            memory_bytes = int(self.config.execution.memory_mb * 1e6 * STACK_SHARE)
            updates = UpdateStack(len(plan.cohort), num_coordinates, memory_bytes, self.store.home)
        statistics = CohortStatistics(selected=len(plan.excluded), rejected=plan.excluded)
        return Collection(updates, statistics)

    def source(self, round: int) -> int | bytes:
        """What a round's cohort and its clients draw from: the seed, or under a claim a secret, since who was selected
        must not be computable."""
        return self.config.seed if self.secret is None else self.key(round, "selection and training")

    def codec(self, plan: RoundPlan) -> Codec:
        """Return how the updates of a round travel."""
        seed = derive_key(self.source(plan.round), plan.round, "compression")
        return Codec(self.config.compression, seed, self.federation.update_layout)

    def slowest_s(self, tasks: Sequence[ClientTask], upload_bytes: Sequence[int], download_bytes: int) -> float:
        """The simulated time of the slowest of these clients, where a network is simulated."""
        network, training = self.config.simulation.network, self.config.training
        if network is None or not tasks:
            return 0.0
        seconds_N = network.seconds(
            np.array([task.index for task in tasks]),
            seed=self.config.seed,
            examples_N=[training.num_samples_processed(task.num_examples) for task in tasks],
            upload_bytes_N=upload_bytes,
            download_bytes=download_bytes,
        )
        return float(seconds_N.max())

    def simulated_clients(self, plan: RoundPlan, tasks: Sequence[ClientTask]) -> list[SimulatedClient]:
        """Return the clients of these tasks, with what each of them holds itself.

        A client that answers for its examples has a secret of the round, which serves no other purpose and is gone with
        the round's key. A client whose rows or training differ has another one.
        """
        keys: list[bytes | None] = [None] * len(tasks)
        if self.federation.example_level is not None:
            training = self.training_digest(plan)
            rows = [self.federation.digest_of_client(task.index).hex() for task in tasks]
            keys = [
                self.key(plan.round, "examples", plan.collection, task.client_id, training, digest)
                for task, digest in zip(tasks, rows, strict=True)
            ]
        kept: Sequence[Tensors] = [{}] * len(tasks)
        if self.config.training.objective.channels:
            kept = self.client_states([task.client_id for task in tasks])
        return [SimulatedClient.of(task, key, state) for task, key, state in zip(tasks, keys, kept, strict=True)]

    def training_digest(self, plan: RoundPlan) -> str:
        """The sha256 over what determines the clients' updates of a round besides their rows and keys; it is public."""
        training = self.config.training.in_round(plan.round, self.config.rounds)
        facts = {
            "base": plan.base_digest,
            "training": training.model_dump(mode="json"),
            "stragglers": self.config.simulation.model_dump(mode="json")["stragglers"],
            "device": getattr(self.config.execution, "device", None),
            "model": self.federation.model_digest,
            "engine": engine_environment(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def noise_keys(self, plan: RoundPlan, released: Tensors) -> Callable[[str], bytes]:
        """The keys, by purpose, of the noise on `released`: all the values that the noise is for. Other values have
        other keys."""
        digest = tensors_digest(released)
        return lambda purpose: self.key(plan.round, purpose, plan.collection, digest)

    def key(self, round: int, purpose: str, *context: str | int) -> bytes:
        """The key of one purpose and context in a round, under a claim (store/secrets.py has all of them)."""
        assert self.secret is not None
        return self.secret.key(round, purpose, self.run.population, self.run_id, *context)

    def open_secret(self, fresh_collection: bool) -> None:
        """Open the secret that the run draws from; with `fresh_collection` replace it by a new one.

        Raises `StoreError` where it is missing, or where this home has seen more of the run than the database has: it
        was restored from a backup, and what came after it was released all the same.
        """
        folder, run = self.store.secrets_folder, self.run
        sightings = [Sighting(each.where, anchor=each) for each in self.store.own_anchors()]
        reason, assumed = "requested", run.secret_id
        try:
            assert assumed is not None
            self.secret = RunSecret.open(folder, self.run_id, assumed)
        except StoreError as error:
            reason = "the secret is missing"
            if not fresh_collection:
                raise StoreError(
                    f"{error.message}; the run began in {run.secret_home}",
                    hint=self._instead("resume it in that home, or restore the file from a backup"),
                ) from error
        self._fresh_collection = fresh_collection
        if fresh_collection:
            self._start_afresh(reason, sightings)
        else:
            self.check_history(sightings)
            self._settle_secrets()  # an earlier process may have ended before it did

    def _settle_secrets(self) -> None:
        """Bring the run's secret to the round in hand, remember in it what is charged, and destroy all others."""
        assert self.secret is not None
        self.secret.advance(self.refresh().committed_round + 1)
        self.secret.count(self.store.ledger.num_spent(self.run_id), self.store.identity())
        destroy_secrets(self.store.secrets_folder, self.run_id, database=self.secret.database, but=self.secret.id)

    def forget_keys(self) -> None:
        """Forget the keys of a run whose rounds are all committed: an earlier process may have ended before it did."""
        if self.run.secret_id is not None:
            with suppress(StoreError):  # the file is gone: so are the keys
                secret = RunSecret.open(self.store.secrets_folder, self.run_id, self.run.secret_id)
                secret.advance(self.run.committed_round + 1)

    def check_history(self, sightings: Sequence[Sighting]) -> None:
        """Compare the run with what is known of it outside the database.

        Raises `StoreError` when more was seen of it than the database has. Where a fresh collection was asked for, what
        was seen is charged instead, unless it is already.
        """
        run = self.refresh()
        if not self.config.claims or run.committed_round == run.rounds:
            return
        ahead, uncharged = self._ahead(sightings), self.store.uncharged_releases(self.run_id)
        if not ahead and not uncharged:
            return
        if self._fresh_collection:
            self._start_afresh("the history was cut", sightings)
            return
        evidence = [
            f"{each.where} shows its round {each.round}"
            if each.anchor is None or each.round > run.committed_round
            else f"{each.where} has a row {each.anchor.rows} that this journal does not have"
            for each in ahead
        ]
        if uncharged:
            releases, last = last_seen(self.store.secrets_folder, self.run_id, self.store.identity())
            evidence.append(
                f"the run's secret shows its round {last}, {releases} releases in all, of which {uncharged} "
                f"{'is' if uncharged == 1 else 'are'} not charged"
            )
        raise StoreError(
            f"the database is older than what was seen of run {self.run_id}, whose last committed round is "
            f"{run.committed_round} here: {'; '.join(evidence)}. It was restored from a backup, and what came after it "
            "was released all the same",
            hint=self._instead("put the newer database back, and check it with `fedrounds journal verify`"),
        )

    def _ahead(self, sightings: Sequence[Sighting]) -> list[Sighting]:
        """Those that the database does not account for."""
        known = self._accounted_round()
        anchors = [each.anchor for each in sightings if each.anchor is not None]
        lost = self.store.lost(anchors, self.run_id) if anchors else []
        return [each for each in sightings if each.round > known or each.anchor in lost]

    def _accounted_round(self) -> int:
        """The last round whose charges the journal has, if anything was released of it."""
        earlier = self.store.fresh_collections(self.run_id)
        return max([self.run.committed_round, *(int(each["released"]) for each in earlier)])

    def _start_afresh(self, reason: str, sightings: Sequence[Sighting]) -> None:
        """Charge what may have been released of the run, and replace its secret."""
        federation, ahead = self.federation, self._ahead(sightings)
        known, released = self._accounted_round(), max([0, *(each.round for each in ahead)])
        lost = max(released - known, self.store.uncharged_releases(self.run_id, of_any_database=True), 0)
        if lost and any(each.is_paid_by_clients for each in self.claims):
            lost, released = lost + 1, released + 1  # clients may have sent their updates of the next one
        _, last = last_seen(self.store.secrets_folder, self.run_id)
        secret = RunSecret.create(self.store.secrets_folder, self.run_id, self.store.identity())
        settled = self.lease.start_afresh(
            secret_id=secret.id,
            secret_home=place_of_secrets(self.store.home),
            reason=reason,
            charges=self.charges(range(federation.data.num_clients)),
            lost=lost,
            released=max(released, known, last),
            sightings=ahead,
        )
        self.secret = secret
        self._settle_secrets()
        self.store.anchor()
        self.say(
            f"round {self.run.committed_round + 1} of run {self.run_id} is collected afresh, with a new secret; "
            f"charges settled as spent: {settled}"
        )

    def _instead(self, otherwise: str) -> str:
        return fresh_collection(self.run_id, otherwise)

    @cached_property
    def claims(self) -> tuple[RunClaim, ...]:
        """The claims that the run's rounds are charged for."""
        return run_claims(self.federation)

    def epsilons(self) -> dict[str, Release]:
        """Return what the run has spent with the round in hand, and what its accounts have left."""
        run = self.refresh()
        report = privacy_report(self.store, run, self.config, rounds=run.committed_round + 1)
        return {name: public(value) for name, value in report.metrics.items()}

    def charges(self, cohort: Sequence[int]) -> list[Charges]:
        """Return what a round with the clients in these rows costs under each claim.

        All clients are charged where who was selected must not be shown: what each has spent is. Those that have no
        budget yet get one here.
        """
        rows = range(self.federation.data.num_clients) if self.federation.hides_participation else cohort
        requests = [each.charges(rows) for each in self.claims]
        accounts = {account for each in requests for account in each.events if account.client is not None}
        self.store.ledger.register(accounts)
        return requests

    def check_budget(self) -> None:
        """Raise `BudgetExhausted` when the next round would be refused: before it is begun, so that no view shows it as
        one that failed. The reservation itself decides."""
        run = self.refresh()
        round = run.committed_round + 1
        if not self.claims or self.store.ledger.is_reserved(run.run_id, round):  # by an attempt that ended
            return
        cohort: list[int] = []
        if any(each.is_paid_by_clients for each in self.claims):
            cohort = self.federation.select(round, self.participations, self.source(round)).tolist()
        self.with_payers(self.charges(cohort), lambda charges: self.store.ledger.check(run.run_id, charges))

    def with_payers(self, charges: Sequence[Charges], act: Callable[[Sequence[Charges]], T]) -> T:
        """Return what `act` returns for the charges of a round; for those of no client where too few of the cohort can
        pay, but enough other clients can. Raises `BudgetExhausted` where they cannot."""
        try:
            return act(charges)
        except BudgetExhausted:
            can_skip = [each.can_skip_round(self.store) for each in self.claims]
            if not any(can_skip):
                raise
            pairs = zip(charges, can_skip, strict=True)
            return act([replace(each, events={}, least=0) if skipped else each for each, skipped in pairs])

    def check_cancelled(self) -> None:
        """Raises `RunCancelled` when the run was asked to stop."""
        if self.cancelled.is_set():
            raise RunCancelled(
                f"run {self.run_id} was stopped on request", hint=f"`fedrounds resume {self.run_id}` goes on with it"
            )

    @cached_property
    def executor(self) -> Executor:
        """Where the clients run: made when the first round needs it, for the rounds that are left then."""
        executor = self.config.execution.executor(
            self.federation.workload(),
            self.notify_restricted,
            work_N=self.federation.average_work_N,
            rounds=self.config.rounds - self.run.committed_round,
        )
        executor.on_shard = self._on_shard
        return executor

    def _on_shard(self, name: str, began: float, ended: float, process: int) -> None:
        if self.profile is not None and not self.federation.withholds:  # how many there are tells of the cohort
            self.profile.add(name, "shard", began, ended, process)

    def notify_restricted(self, text: str) -> None:
        """Say what names clients or tells of their data: under a claim about private data to those alone who may read
        this home. Not even that there is something to read: that may be due to one client."""
        if self.federation.withholds:
            withhold(self.store.home, self.run_id, text)
        else:
            self.say(text)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A span of time in the profile."""
        began = time.time()
        try:
            yield
        finally:
            if self.profile is not None:
                self.profile.add(name, "stage", began, time.time())

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory that this process and those that train for it held so far."""
        return self.executor.peak_memory_bytes if "executor" in self.__dict__ else peak_memory_bytes()

    def close(self) -> None:
        """End what trains, and give the lease back. The store belongs to whoever opened it."""
        try:
            executor: Executor | None = self.__dict__.pop("executor", None)  # with which the examples go
            if executor is not None:
                executor.close()
        finally:
            self.lease.release()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shortened(rejection: Rejection) -> Rejection:
    """The rejection with a detail of so few characters of ASCII that they have room in a seal."""
    return replace(rejection, detail=rejection.detail.encode("ascii", "backslashreplace").decode()[:LONGEST_DETAIL])


def start_fresh_or_latest(store: Store) -> Start:
    """Resolves `model.start_from` as far as the store alone can: `fresh`, and `latest` of this experiment."""

    def start(federation: Federation) -> tuple[Float32 | None, str | None]:
        config = federation.config
        ancestor = store.latest_model(config.name) if config.model.start_from == "latest" else None
        if ancestor is None:
            return None, None
        if ancestor.engine["constants_digest"] != federation.facts["constants_digest"]:
            raise ConfigError(
                f"model.start_from is 'latest', but run {ancestor.run_id} trained beside other frozen parameters or "
                "buffers than this model has: its trained parameters would not fit them",
                hint="use the seed and the model of that run, or start_from: fresh",
            )
        state = ServerState.from_bytes(store.state_blob(ancestor.run_id))
        return state.params_D, f"run:{ancestor.run_id}"

    return start


def open_hub(
    store: Store,
    run_id: str,
    *,
    config: FederationConfig | None = None,
    source_folder: str = "",
    sweep_id: str | None = None,
    start: Start | None = None,
    say: Say = nobody_listens,
    fresh_collection: bool = False,
    accept_changed_data: bool = False,
) -> Hub:
    """Take hold of a run, creating it when `config` is given and it does not exist yet.

    Everything is loaded and checked before anything is written.

    Args:
      fresh_collection: of a run under a privacy claim, whatever may have been released of the round in hand counts as
        spent; the round is collected again at a further charge, with noise from a new secret.
      accept_changed_data: a run without a claim may continue with other rows than it began with.

    Raises what `assemble` raises, `RunConflict` when the run exists with another configuration or began with other
    data, `RunNotFound`, `LeaseHeld`, and `StoreError` when the run's secret is missing or its history was cut.
    """
    check_run_id(run_id)
    run = store.find_run(run_id)
    if run is not None:
        check_can_continue(run)
    if config is not None:
        federation = assembled(store, run_id, config, source_folder)
    elif run is not None:
        federation = federation_of(store, run)
    else:
        raise RunNotFound(f"there is no run {run_id!r} in this store", hint="`fedrounds runs` lists them")
    has_rounds = run is None or run.committed_round < run.rounds  # else only what views show of it is put right
    data = check_population(store, federation) if has_rounds else None
    if config is not None:
        fields, digest = json.loads(config.model_dump_json()), config_digest(config)
        if run is None:
            run = _create_run(store, run_id, federation, digest, source_folder, sweep_id, start)
        elif is_moved(run.config, fields, run.source_folder, source_folder):
            digest = run.config_digest
        run = store.check_same(run, fields, digest, sweep_id)
    assert run is not None
    _check_model(run, federation)
    accepted: dict[str, str] = {}
    if has_rounds:
        accepted = _check_data(store, run, federation, accept_changed_data)
        join_population(store, federation, run.run_id, data, say)
    _warn_of_another_engine(run, say)
    lease = store.acquire(run_id, say=say)
    try:
        hub = Hub(store, lease, federation, store.run(run_id), say=say)
        if accepted:
            lease.accept_data(accepted)
            say(f"run {run_id} continues with other rows than it began with, as requested")
        if federation.config.claims and has_rounds:
            hub.open_secret(fresh_collection)
        elif not fresh_collection:
            hub.forget_keys()
        else:
            what = "has no round to go" if federation.config.claims else "makes no privacy claim"
            raise ConfigError(
                f"--fresh-collection is given, and run {run_id} {what}: there is nothing to pay for",
                hint=f"`fedrounds resume {run_id}` without it",
            )
        lease.collect_garbage()
        hub.refresh()
        return hub
    except BaseException:
        lease.release()  # its heartbeat would hold the run for as long as this process lives
        raise


def _create_run(
    store: Store,
    run_id: str,
    federation: Federation,
    digest: str,
    source_folder: str,
    sweep_id: str | None,
    start: Start | None,
) -> RunRecord:
    """The new run; under a claim with a secret of its own, which is durable before the run is."""
    config = federation.config
    params_D, ancestor = (start or start_fresh_or_latest(store))(federation)
    state = federation.initial_state(params_D)
    secret = RunSecret.create(store.secrets_folder, run_id, store.identity()) if config.claims else None
    run = None
    try:
        run = store.create_run(
            run_id=run_id,
            name=config.name,
            population=config.population,
            rounds=config.rounds,
            config=json.loads(config.model_dump_json()),
            config_digest=digest,
            initial_state=state.to_bytes(),
            params_digest=state.params_digest,
            ancestor=ancestor,
            engine=engine_environment()
            | federation.facts
            | data_facts(federation.data, digest_key(store))
            | {"delta_warnings": delta_warnings(federation)},
            source_folder=source_folder,
            sweep_id=sweep_id,
            secret_id=secret.id if secret is not None else None,
            secret_home=place_of_secrets(store.home) if secret is not None else None,
        )
        return run
    finally:
        if secret is not None and (run is None or run.secret_id != secret.id):  # another process was first
            secret.destroy()


def federation_of(store: Store, run: RunRecord) -> Federation:
    """The federation of a run that exists, loaded anew. Raises what `assemble` raises."""
    return assembled(store, run.run_id, parse_config(run.config), run.source_folder)


def assembled(store: Store, run_id: str, config: FederationConfig, source_folder: str) -> Federation:
    """What `assemble` returns. Under a claim about private data its errors say no more than that loading failed: the
    file of what is withheld from `run_id` has the text."""
    return _assembled(store.home, run_id, config, source_folder)


def assembled_for_a_look(config: FederationConfig, source_folder: str) -> Federation:
    """The same where there is no run: what is withheld goes to the file of the experiment's name."""
    return _assembled(home(), config.name, config, source_folder)


def _assembled(folder: Path, whose: str, config: FederationConfig, source_folder: str) -> Federation:
    try:
        return assemble(config, source_folder or None)
    except (ConfigError, ModelError):  # of what is public: a model is checked with synthetic rows
        raise
    except Exception as error:
        if not config.claims or config.data.is_public:
            raise
        raise withheld_error(folder, whose, "loading the clients' data", error) from None


def check_can_continue(run: RunRecord) -> None:
    """Raises `RunNotFound` for a run that was deleted, and the error of one that no resume can take any further."""
    if run.state == RunState.DELETED:
        raise RunNotFound(f"run {run.run_id!r} was deleted", hint="begin another run")
    if can_never_continue(run.state, run.error):
        assert run.error is not None
        raise Diverged(f"run {run.run_id} can never continue: {run.error['message']}", hint=run.error["hint"])


def _check_model(run: RunRecord, federation: Federation) -> None:
    """Raises `RunConflict` when the model is not the one that the run began with, or not for as many clients."""
    for name, value in federation.facts.items():
        if run.engine[name] != value:
            what = name.removeprefix("num_").replace("_", " ")
            raise RunConflict(
                f"run {run.run_id!r} began with {what} {_short(run.engine[name])}, now {_short(value)}: "
                "its data or its model has changed",
                hint="put the data and the code back as they were, or begin another run",
            )


def _check_data(store: Store, run: RunRecord, federation: Federation, accepts: bool) -> dict[str, str]:
    """Raises `RunConflict` when the rows are not those that the run began with. What is returned, where anything, are
    the facts of other rows, which a run without a claim `accepts`."""
    facts = data_facts(federation.data, digest_key(store))
    if run.engine["data_digest"] == facts["data_digest"]:
        return {}
    if accepts and not federation.config.claims:
        return facts
    hint = "put the data back as they were, or begin another run"
    if federation.config.claims:
        hint += "; under a privacy claim a run cannot continue with other rows"
    else:
        hint += f"; or `fedrounds resume {run.run_id} --accept-changed-data` continues with the rows as they are now"
    raise RunConflict(f"run {run.run_id!r} began with other rows: {_which_changed(run, federation, facts)}", hint=hint)


def _which_changed(run: RunRecord, federation: Federation, facts: Mapping[str, str]) -> str:
    if federation.withholds:
        return "which clients' have changed is withheld"
    changed = changed_clients(federation.data, run.engine, facts)
    if not changed:
        return "their values, their order or the clients' names have changed"
    named = ", ".join(map(repr, changed[:NAMED])) + (f" and {len(changed) - NAMED} more" * (len(changed) > NAMED))
    return f"those of {len(changed)} client{'s' * (len(changed) > 1)} have changed: {named}"


def _short(value: int | str) -> str:
    return str(value)[:12]


def _warn_of_another_engine(run: RunRecord, say: Say) -> None:
    changed = {name: value for name, value in engine_environment().items() if run.engine.get(name) != value}
    if changed:
        facts = "; ".join(f"{name} was {run.engine.get(name)!r}, is {value!r}" for name, value in changed.items())
        say(f"this machine differs from the one that began the run: {facts}; the last bits of the model may differ")
