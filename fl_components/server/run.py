"""Run: one process's handle on a run, behind its lease."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedrounds.fl_components.arrays import Tensors, tensors_digest
from fedrounds.fl_components.config import FederationConfig
from fedrounds.fl_components.errors import RunCancelled
from fedrounds.fl_components.executors import Executor, RowMapper, map_inline, peak_memory_bytes
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rejections import Rejection
from fedrounds.fl_components.server.claim import RunClaim, run_claims
from fedrounds.fl_components.server.collection import Collection, UpdateStack
from fedrounds.fl_components.server.encoding import Codec
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.profile import Profile
from fedrounds.fl_components.server.restricted_log import withhold
from fedrounds.fl_components.server.workload import average_work_N, workload
from fedrounds.fl_components.store import Lease, RunRecord, RunSecret, Store, closed, opened
from fedrounds.fl_components.training import engine_environment
from fedrounds.fl_components.values import (
    Accumulator,
    CohortStatistics,
    RoundPlan,
    RoundResult,
    SealedCohort,
    ServerState,
    pack,
    unpack,
)

Listener = Callable[[str], None]

SEAL_BYTES: Final = 1 << 16
"""Room in a seal for what a round collected, besides the sum and what is kept of each client."""

BYTES_PER_CLIENT: Final = 1536
"""Room in a seal for each client of the largest possible cohort: an id of 100 characters and its rejection,
escaped as JSON."""

STACK_SHARE: Final = 0.2
"""The share of `execution.memory_mb` up to which a round's updates are kept in memory: waves take the rest."""

MAX_DETAIL: Final = 120
"""Characters of a rejection's detail that are sealed."""


def ignore(_: str) -> None:
    """Do nothing: the null listener."""


@dataclass(eq=False)
class Run:
    """A run that this process holds, made by `open_run`; a context manager.

    One thread drives it through the stages of its rounds (server/stages.py). Other threads may read `record`, set
    `cancelled` and call the listeners.

    Args:
      store: where the run is durable. It belongs to whoever opened it.
      lease: by which this process alone may write the run.
      federation: the configuration with its population and model.
      record: the run's row, as last read.
      on_stage: is called with the name of each stage as it begins.
      notify: is called with messages for people.
      profile: collects spans of time, where there is one.
      seconds: the time spent in each stage of the current round.
      cancelled: asks the run to stop before its next stage.
      secret: what the run draws from under a privacy claim.
      fresh_collection: whether the run was opened to collect its current round again, at a further charge.
    """

    store: Store
    lease: Lease
    federation: Federation
    record: RunRecord
    on_stage: Listener = ignore
    notify: Listener = ignore
    profile: Profile | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)
    secret: RunSecret | None = None
    fresh_collection: bool = False
    _round_began: float = 0.0

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def config(self) -> FederationConfig:
        return self.federation.config

    def begin_round(self) -> None:
        """Start the clocks of a round."""
        self.seconds.clear()
        self._round_began = time.perf_counter()

    @property
    def round_seconds(self) -> float:
        """Seconds since the current round began."""
        return time.perf_counter() - self._round_began

    def refresh(self) -> RunRecord:
        """Return the run's row, read again."""
        self.record = self.store.run(self.run_id)
        return self.record

    def state(self) -> ServerState:
        """Return the state after the last committed round."""
        return ServerState.from_bytes(self.store.state_blob(self.run_id))

    def committed(self, round: int) -> RoundResult | None:
        """Return the result of a round that is committed already, else None."""
        record = self.store.round(self.run_id, round)
        return RoundResult(round, record.params_digest, **record.result) if record is not None else None

    def participations(self, clients: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return in how many committed rounds the clients of these indices [N] took part, int64 [N]."""
        return np.array(self.store.participations(self.run_id, clients.tolist()), np.int64)

    def sealed(self, round: int) -> SealedCohort | None:
        """Return what an earlier attempt collected and sealed for this round, if it did."""
        seal = self.store.sealed(self.run_id, round)
        if seal is None:
            return None
        data = seal.data if self.secret is None else opened(self.key(round, "seal"), seal.data)
        return SealedCohort.from_bytes(data)

    def seal(self, plan: RoundPlan, cohort: SealedCohort) -> None:
        """Make durable what was collected. Under a claim it is unreadable once the round's key is gone."""
        if self.secret is None:
            data = cohort.to_bytes()
        else:
            rejected = {client_id: _shortened(reason) for client_id, reason in cohort.statistics.rejected.items()}
            # Nothing of the cohort may show in the length, which is that of one whole piece.
            of_clients = self.federation.largest_cohort * BYTES_PER_CLIENT if self.federation.hides_participation else 0
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
        """Return what a round's cohort and its clients draw from: the seed, or under a claim a secret.

        With the seed, which is public, it could be computed who was selected.
        """
        return self.config.seed if self.secret is None else self.key(round, "selection and training")

    def codec(self, plan: RoundPlan) -> Codec:
        """Return how the updates of a round travel."""
        seed = derive_key(self.source(plan.round), plan.round, "compression")
        return Codec(self.config.compression, seed, self.federation.update_layout)

    def training_digest(self, plan: RoundPlan) -> str:
        """Return the sha256 over what determines the updates of a round besides rows and keys; it is public."""
        training = self.config.training.resolve(plan.round, self.config.rounds)
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
        """Return the keys, by purpose, of the noise on `released`: all the values that the noise is for.

        Other values have other keys.
        """
        digest = tensors_digest(released)
        return lambda purpose: self.key(plan.round, purpose, plan.collection, digest)

    def key(self, round: int, purpose: str, *context: str | int) -> bytes:
        """Return the key of one purpose and context in a round, under a claim (store/secrets.py has all of them)."""
        assert self.secret is not None
        return self.secret.key(round, purpose, self.record.population, self.run_id, *context)

    @cached_property
    def claims(self) -> tuple[RunClaim, ...]:
        """The claims that the run's rounds are charged for."""
        return run_claims(self.federation)

    def check_cancelled(self) -> None:
        """Raise `RunCancelled` when the run was asked to stop."""
        if self.cancelled.is_set():
            raise RunCancelled(
                f"run {self.run_id} was stopped on request", hint=f"`fedrounds resume {self.run_id}` continues it"
            )

    @cached_property
    def executor(self) -> Executor:
        """Where simulated clients run: made when the first round needs it, for the remaining rounds."""
        executor = self.config.execution.executor(
            workload(self.federation),
            self.notify_restricted,
            work_N=average_work_N(self.federation),
            rounds=self.config.rounds - self.record.committed_round,
        )
        executor.on_shard = self._on_shard
        return executor

    @property
    def map_rows(self) -> RowMapper:
        """Maps a function over blocks of updates, wherever simulated clients run; else in this thread."""
        return map_inline if self.federation.clients is None else self.executor.map_rows

    def _on_shard(self, name: str, began: float, ended: float, process: int) -> None:
        if self.profile is not None and not self.federation.withholds:  # the number of shards reveals the cohort's size
            self.profile.add(name, "shard", began, ended, process)

    def notify_restricted(self, text: str) -> None:
        """Report a message that may reveal client data.

        Under a claim about private data it goes only to the restricted log. That it exists is not reported either: it
        may be due to one client.
        """
        if self.federation.withholds:
            withhold(self.store.home, self.run_id, text)
        else:
            self.notify(text)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure a span of time for the profile."""
        began = time.time()
        try:
            yield
        finally:
            if self.profile is not None:
                self.profile.add(name, "stage", began, time.time())

    @property
    def peak_memory_bytes(self) -> int:
        """The peak memory of this process and of those that train for it."""
        return self.executor.peak_memory_bytes if "executor" in self.__dict__ else peak_memory_bytes()

    def close(self) -> None:
        """End the executor, and release the lease."""
        try:
            executor: Executor | None = self.__dict__.pop("executor", None)  # with which the examples go
            if executor is not None:
                executor.close()
        finally:
            self.lease.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shortened(rejection: Rejection) -> Rejection:
    """Return the rejection with a detail that fits into a seal: ASCII, of at most `MAX_DETAIL` characters."""
    return replace(rejection, detail=rejection.detail.encode("ascii", "backslashreplace").decode()[:MAX_DETAIL])
