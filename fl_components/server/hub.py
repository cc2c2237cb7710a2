"""Hub: what one run needs in the process that drives it, behind its lease."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fl_components.compression import Known
from fl_components.config import FederationConfig, config_digest, parse_config
from fl_components.errors import BudgetExhausted, ConfigError, RunCancelled, RunConflict, RunNotFound
from fl_components.privacy.releases import Release, public
from fl_components.randomness import derive_key
from fl_components.server.claim import (
    check_budget,
    check_client_budget,
    check_demonstration,
    check_population,
    example_spending,
    example_terms,
    join_population,
    simulated_epsilon,
    spending,
)
from fl_components.server.encoding import Codec, Sent, send
from fl_components.server.federation import Federation, assemble
from fl_components.server.profile import Profile
from fl_components.server.withheld import withheld_error, withhold
from fl_components.store import (
    Budget,
    ExampleCharges,
    Lease,
    RunRecord,
    RunSecret,
    Store,
    check_run_id,
    closed,
    opened,
)
from fl_components.store.ledger import EACH_CLIENT, from_pairs, of_client, plus
from fl_components.training import Trainer, engine_facts, peak_memory_bytes
from fl_components.values import ClientTask, Collected, Float32, RoundPlan, RoundResult, ServerState

Say = Callable[[str], None]
Start = Callable[[Federation], tuple[Float32 | None, str | None]]

LOOKED_AT: Final = 500
"""Clients whose budgets are read at a time."""


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
    _sent: tuple[int, Sent] | None = None

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

    def sealed(self, round: int) -> Collected | None:
        """What an earlier attempt collected and sealed for this round, if it did."""
        seal = self.store.sealed(self.run_id, round)
        if seal is None:
            return None
        data = seal.data if self.secret is None else opened(self.key(round, "seal"), seal.data)
        return Collected.from_bytes(data)

    def seal(self, plan: RoundPlan, collected: Collected) -> None:
        """Make what was collected durable, under a claim so that nobody can read it once the round's key is gone."""
        data = collected.to_bytes()
        if self.secret is not None:
            data = closed(self.key(plan.round, "seal"), data)
        self.lease.seal(plan.round, plan.collection, data)

    def source(self, round: int) -> int | bytes:
        """What a round's cohort and its clients draw from: the seed, or under a claim a secret, since who was selected
        must not be computable."""
        return self.config.seed if self.secret is None else self.key(round, "selection and training")

    def codec(self, plan: RoundPlan) -> Codec:
        """How the updates of a round travel."""
        return Codec(
            rule=self.config.compression,
            round_seed=derive_key(self.source(plan.round), plan.round, "compression"),
            shapes=self.federation.shapes,
        )

    def broadcast(self, state: ServerState) -> Sent:
        """The parameters of the round after `state`, as the clients receive them."""
        if self._sent is None or self._sent[0] != state.round:
            seed = derive_key(self.config.seed, state.round + 1, "broadcast")  # of public numbers
            known = Known([seed], seed, self.federation.shapes)
            self._sent = state.round, send(self.config.broadcast, state.params_D, state.broadcast, known)
        return self._sent[1]

    def slowest_s(self, tasks: Sequence[ClientTask], upload_bytes: Sequence[int], download_bytes: int) -> float:
        """The simulated time of the slowest of these clients, where a network is simulated."""
        network, training = self.config.network, self.config.training
        if network is None or not tasks:
            return 0.0
        seconds_N = network.seconds(
            np.array([task.index for task in tasks]),
            seed=self.config.seed,
            examples_N=[training.num_stepped(task.num_examples) for task in tasks],
            upload_bytes_N=upload_bytes,
            download_bytes=download_bytes,
        )
        return float(seconds_N.max())

    def with_keys(self, plan: RoundPlan, tasks: Sequence[ClientTask]) -> Sequence[ClientTask]:
        """The tasks with the simulated clients' own secrets, where they answer for their examples: no other purpose's
        keys, and gone with the round's."""
        if self.federation.example_level is None:
            return tasks
        purpose = f"collection {plan.collection} examples of client"
        return [replace(task, key=self.key(plan.round, f"{purpose} {task.client_id}")) for task in tasks]

    def key(self, round: int, purpose: str) -> bytes:
        """The key of one purpose in a round, under a claim."""
        assert self.secret is not None
        return self.secret.key(round, f"{self.run.population} {self.run_id} {purpose}")

    def epsilons(self) -> dict[str, Release]:
        """What the run has come to with the round in hand, and what its population has left."""
        return self._client_epsilons() | self._example_epsilons()

    def _example_epsilons(self) -> dict[str, Release]:
        told = example_spending(self.store, self.run)
        if told is None:
            return {}
        assert told.run.epsilon is not None
        found = {"epsilon": told.run.epsilon, "epsilon_population": told.population}
        if told.remaining is not None:
            found["epsilon_remaining"] = told.remaining
        found |= {f"client/{name}": epsilon for name, epsilon in (told.clients or {}).items()}
        return {f"privacy/example/{name}": public(value) for name, value in found.items()}

    def _client_epsilons(self) -> dict[str, Release]:
        central, run = self.federation.central, self.refresh()
        if central is None:
            return {}
        if not self.federation.is_charged:
            return {"privacy/epsilon_simulated": public(simulated_epsilon(self.federation, run.committed_round + 1))}
        budget = self.store.find_budget(run.population)
        assert budget is not None
        told = spending(budget, from_pairs(run.spent))
        assert told.run.epsilon is not None
        epsilons = {"privacy/epsilon": public(told.run.epsilon), "privacy/epsilon_population": public(told.population)}
        if told.remaining is not None:
            epsilons["privacy/epsilon_remaining"] = public(told.remaining)
        return epsilons

    def check_budget(self) -> None:
        """Raises `BudgetExhausted` when the next round would be refused: before it is begun, so that no view shows it
        as one that failed. The reservation itself decides (`guard`, `example_charges`)."""
        run = self.refresh()
        round = run.committed_round + 1
        if self.store.is_reserved(run.run_id, round):  # by an attempt that ended
            return
        if self.federation.is_charged:
            budget, spent = self.store.find_budget(run.population), from_pairs(run.spent)
            assert budget is not None
            event = self.config.privacy.event(self.federation.sampling).model_dump()
            self.guard(budget, plus(budget.spent, event), plus(spent, event))
        if self.federation.example_level is not None:
            cohort = self.federation.select(round, self.participations, self.source(round))
            wanted = self.example_charges(cohort.tolist())
            assert wanted is not None
            try:
                self.store.check_examples(run.run_id, wanted)
            except BudgetExhausted:
                if not self.goes_on_without_a_cohort():
                    raise

    def example_charges(self, cohort: Sequence[int]) -> ExampleCharges | None:
        """What a round costs the clients in these rows for their examples, where they answer for these. All clients pay
        where who was selected must not be told: what each has spent is.

        Those that have no budget yet get one here.
        """
        federation, rule = self.federation, self.federation.example_level
        if rule is None:
            return None
        rows = range(federation.data.num_clients) if federation.withholds_cohort else cohort
        names = {row: of_client(self.run.population, federation.data.client_ids[row]) for row in rows}
        self.store.register_clients(self.run.population, list(names.values()))
        terms = example_terms(federation)
        return ExampleCharges(
            events={name: federation.example_event(row).model_dump() for row, name in names.items()},
            guard=lambda budget, by_all, by_run: check_client_budget(terms, budget, by_all),
            least=len(names) if rule.when_exhausted == "end" else self._least_that_pay,
        )

    @property
    def _least_that_pay(self) -> int:
        return max(1, self.config.selection.min_updates)

    def goes_on_without_a_cohort(self) -> bool:
        """Whether a round whose cohort cannot pay for its examples is made with nobody, since enough of all clients
        can: other rounds draw others. They are looked through until that many are found."""
        federation, rule = self.federation, self.federation.example_level
        if rule is None or rule.when_exhausted == "end":
            return False
        terms, found = example_terms(federation), 0
        of_all = self.store.find_budget(self.run.population + EACH_CLIENT)
        assert of_all is not None
        for first in range(0, federation.data.num_clients, LOOKED_AT):
            rows = range(first, min(first + LOOKED_AT, federation.data.num_clients))
            names = {row: of_client(self.run.population, federation.data.client_ids[row]) for row in rows}
            budgets = self.store.find_budgets(names.values())
            for row, name in names.items():
                budget = budgets.get(name, of_all)  # one that never took part has spent nothing
                try:
                    check_client_budget(terms, budget, plus(budget.spent, federation.example_event(row).model_dump()))
                except BudgetExhausted:
                    continue
                found += 1
                if found == self._least_that_pay:
                    return True
        return False

    def guard(self, budget: Budget, population_spent: Mapping[str, int], run_spent: Mapping[str, int]) -> None:
        """Raises `BudgetExhausted` when a reservation would pass the run's own limit or what its population may
        spend."""
        check_demonstration(self.federation, budget)
        check_budget(self.config, budget, population_spent, run_spent)

    def check_cancelled(self) -> None:
        """Raises `RunCancelled` when the run was asked to stop."""
        if self.cancelled.is_set():
            raise RunCancelled(
                f"run {self.run_id} was stopped on request", hint=f"`fedrounds resume {self.run_id}` goes on with it"
            )

    @cached_property
    def trainer(self) -> Trainer:
        """What trains the clients: made when the first round needs it."""
        trainer = self.config.execution.trainer(self.federation.workload(), self.say_of_clients)
        trainer.on_shard = self._on_shard
        return trainer

    def _on_shard(self, name: str, began: float, ended: float, process: int) -> None:
        if self.profile is not None and not self.federation.withholds:  # how many there are tells of the cohort
            self.profile.add(name, "shard", began, ended, process)

    def say_of_clients(self, text: str) -> None:
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
        return self.trainer.peak_memory_bytes if "trainer" in self.__dict__ else peak_memory_bytes()

    def close(self) -> None:
        """End what trains, and give the lease back. The store belongs to whoever opened it."""
        try:
            trainer: Trainer | None = self.__dict__.pop("trainer", None)  # with which the examples go
            if trainer is not None:
                trainer.close()
        finally:
            self.lease.release()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
) -> Hub:
    """Take hold of a run, creating it when `config` is given and it does not exist yet.

    Everything is loaded and checked before anything is written. Raises what `assemble` raises, `RunConflict` when the
    run exists with another configuration, `RunNotFound`, and `LeaseHeld`.
    """
    check_run_id(run_id)
    run = store.find_run(run_id)
    if config is not None:
        federation = _assembled(store, run_id, config, source_folder)
    elif run is not None:
        federation = federation_of(store, run)
    else:
        raise RunNotFound(f"there is no run {run_id!r} in this store", hint="`fedrounds runs` lists them")
    has_rounds = run is None or run.committed_round < run.rounds  # else only what views show of it is put right
    data = check_population(store, federation) if has_rounds else None
    if config is not None:
        params_D, ancestor = (start or start_fresh_or_latest(store))(federation) if run is None else (None, None)
        state = federation.initial_state(params_D)
        run = store.create_run(
            run_id=run_id,
            name=config.name,
            population=config.population,
            rounds=config.rounds,
            config=json.loads(config.model_dump_json()),
            config_digest=config_digest(config),
            initial_state=state.to_bytes(),
            params_digest=state.params_digest,
            ancestor=ancestor,
            engine=engine_facts() | federation.facts,
            source_folder=source_folder,
            sweep_id=sweep_id,
        )
    assert run is not None
    _check_unchanged(run, federation)
    if has_rounds:
        join_population(store, federation, run.run_id, data, say)
    _warn_of_another_engine(run, say)
    lease = store.acquire(run_id, say=say)
    try:
        lease.collect_garbage()
        secret = None
        if federation.config.claims:
            secret = run_secret(store, run)
            secret.advance(store.run(run_id).committed_round + 1)  # an earlier process may have ended before it did
        return Hub(store, lease, federation, store.run(run_id), say=say, secret=secret)
    except BaseException:
        lease.release()  # its heartbeat would hold the run for as long as this process lives
        raise


def federation_of(store: Store, run: RunRecord) -> Federation:
    """The federation of a run that exists, loaded anew. Raises what `assemble` raises."""
    return _assembled(store, run.run_id, parse_config(run.config), run.source_folder)


def _assembled(store: Store, run_id: str, config: FederationConfig, source_folder: str) -> Federation:
    try:
        return assemble(config, source_folder or None)
    except ConfigError:
        raise
    except Exception as error:
        if not config.claims or config.data.is_public:
            raise
        raise withheld_error(store.home, run_id, "loading the clients' data", error) from None


def run_secret(store: Store, run: RunRecord) -> RunSecret:
    """The secret of a run under a claim, made when nothing of the run is committed yet. Its file is this run's alone:
    another database may know another run of that id."""
    file = store.home / "secrets" / "runs" / f"{run.run_id}@{run.created_at!r}"
    return RunSecret.create(file) if run.committed_round == 0 else RunSecret.open(file)


def _check_unchanged(run: RunRecord, federation: Federation) -> None:
    for name, value in federation.facts.items():
        if run.engine[name] != value:
            what = name.removeprefix("num_").replace("_", " ")
            raise RunConflict(
                f"run {run.run_id!r} began with {what} {_short(run.engine[name])}, now {_short(value)}: "
                "its data or its model has changed",
                hint="put the data and the code back as they were, or begin another run",
            )


def _short(value: int | str) -> str:
    return str(value)[:12]


def _warn_of_another_engine(run: RunRecord, say: Say) -> None:
    changed = {name: value for name, value in engine_facts().items() if run.engine.get(name) != value}
    if changed:
        told = "; ".join(f"{name} was {run.engine.get(name)!r}, is {value!r}" for name, value in changed.items())
        say(f"this machine differs from the one that began the run: {told}; the last bits of the model may differ")
