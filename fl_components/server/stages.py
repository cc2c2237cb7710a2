"""The stages of a round, in the order of the walk (flows/round.py). Each takes the hub and values, and returns a value.

Only `authorise`, `aggregate` (its seal) and `commit` write, each of them so that doing it again changes nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from fedrounds.fl_components.aggregation import AdditiveRule
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.errors import Diverged, FedroundsError, RunFailed, TooFewClients
from fedrounds.fl_components.privacy.clipping import Clip, add_contributions
from fedrounds.fl_components.privacy.releases import Release, public, split_releases, withheld
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.encoding import admit_all
from fedrounds.fl_components.server.hub import Hub
from fedrounds.fl_components.server.withheld import withheld_error
from fedrounds.fl_components.training import ShardReport, StreamingSum, names_of
from fedrounds.fl_components.values import (
    Accumulator,
    ClientTask,
    CohortResult,
    EncodedBatch,
    RoundPlan,
    RoundResult,
    ServerState,
    UpdateBatch,
    UpdateSum,
    Weighted,
)
from fedrounds.fl_components.wire import decode_update

OF_CLIENTS = ("train", "compress", "admit", "evaluate")
"""Stages whose errors may tell of clients' data; so may errors of any stage that nobody foresaw."""

EXHAUSTED = Rejection(RejectionCode.BUDGET_EXHAUSTED, "the privacy budget of its examples is spent")

TOO_FEW_PAY = Rejection(
    RejectionCode.BUDGET_EXHAUSTED, "too few clients of the round have privacy budget left for their examples"
)

STRAGGLER = Rejection(RejectionCode.STRAGGLER, "it did not finish its local work")

LOWER_RATE = "begin another run with a lower training.learning_rate"

P = ParamSpec("P")
T = TypeVar("T")


def stage(function: Callable[Concatenate[Hub, P], T]) -> Callable[Concatenate[Hub, P], T]:
    """Announce the stage, and add its time to `hub.seconds` and to the profile."""

    @wraps(function)
    def timed(hub: Hub, /, *args: P.args, **kwargs: P.kwargs) -> T:
        hub.on_stage(function.__name__)
        with hub.span(function.__name__):
            began = time.perf_counter()
            try:
                return function(hub, *args, **kwargs)
            except Exception as error:
                foreseen = isinstance(error, FedroundsError) and function.__name__ not in OF_CLIENTS
                if foreseen or not hub.federation.withholds:
                    raise
                what = f"the stage {function.__name__}"
                raise withheld_error(hub.store.home, hub.run_id, what, error) from None  # its traceback has the text
            finally:
                hub.seconds[function.__name__] = hub.seconds.get(function.__name__, 0.0) + time.perf_counter() - began

    return timed


@stage
def load(hub: Hub, round: int) -> ServerState:
    """The state after round - 1. Raises `RunFailed` when the run is not that far."""
    hub.begin_round()
    state = hub.state()
    if state.round != round - 1:
        raise RunFailed(f"round {round} cannot begin: the last committed round of run {hub.run_id} is {state.round}")
    return state


@stage
def select(hub: Hub, state: ServerState) -> RoundPlan:
    """The plan of the next round: which clients, in what waves, each with the seed of its own draws."""
    config, data, round = hub.config, hub.federation.data, state.round + 1
    source, stragglers = hub.source(round), config.simulation.stragglers
    rows = hub.federation.select(round, hub.participations, source)
    seeds = [derive_key(source, round, "training", data.client_ids[row]) for row in rows.tolist()]
    cohort = tuple(
        ClientTask(
            client_id=data.client_ids[row],
            index=row,
            num_examples=data.num_examples(row),
            seed=seed,
            work=None if stragglers is None else stragglers.work(seed, config.training.num_units),
        )
        for row, seed in zip(rows.tolist(), seeds, strict=True)
    )
    return RoundPlan(
        run_id=hub.run_id,
        round=round,
        base_digest=hub.broadcast(state).digest,
        **_cut(hub, cohort),
        min_updates=0 if config.central is not None else config.selection.min_updates,
        clipping_norm=float(state.clipping["norm"][0]) if config.central is not None else None,
    )


def _cut(hub: Hub, cohort: tuple[ClientTask, ...]) -> dict[str, Any]:
    """A cohort in shards and waves, as a plan has it.

    How many waves there are can be counted by whoever sees the round's tasks. Where the cohort is withheld it follows
    from public values: as many as the largest cohort needs, each with an equal part of the actual one, perhaps empty.
    """
    config, federation = hub.config, hub.federation
    rule, num_parameters = config.execution, federation.num_parameters
    work_N = [config.training.num_samples_processed(task.num_examples) * num_parameters for task in cohort]
    additive = federation.additive is not None
    if federation.hides_participation:
        waves = rule.equal_waves(len(cohort), federation.largest_cohort, num_parameters, additive=additive)
        shards = tuple(
            slice(wave.start + shard.start, wave.start + shard.stop)
            for wave in waves
            for shard in rule.shards(work_N[wave])
        )
    else:
        shards = rule.shards(work_N)
        waves = rule.waves(shards, num_parameters, additive=additive)
    return {"cohort": cohort, "shards": shards, "waves": waves}


@stage
def authorise(hub: Hub, plan: RoundPlan) -> RoundPlan:
    """Reserve what the round will cost, before any client is contacted. The returned plan has the reservation's number,
    and lacks the clients whose own budgets are spent."""
    clients_pay = any(each.is_paid_by_clients for each in hub.claims)
    training = hub.training_digest(plan) if clients_pay else None
    charges = hub.charges([task.index for task in plan.cohort])
    collection = hub.with_payers(charges, lambda each: hub.lease.reserve(plan.round, each, training))
    plan = replace(plan, collection=collection)
    if not clients_pay:
        return plan
    paying = {account.client for account in hub.lease.paying(plan.round)} - {None}
    refused = [task for task in plan.cohort if task.client_id not in paying]
    if not refused:
        return plan
    say = hub.notify_restricted if hub.federation.hides_participation else hub.say
    why = EXHAUSTED if paying else TOO_FEW_PAY
    say(f"round {plan.round} is made without {names_of(refused)}: {why}")
    reasons = {task.client_id: why for task in refused}
    remaining = tuple(task for task in plan.cohort if task.client_id not in reasons)
    min_updates = plan.min_updates if remaining else 0
    return replace(plan, **_cut(hub, remaining), excluded=reasons, min_updates=min_updates)


@stage
def train(hub: Hub, plan: RoundPlan, state: ServerState, wave: slice) -> UpdateBatch | UpdateSum:
    """Local training of one wave, from the parameters as the clients receive them."""
    broadcast = hub.broadcast(state)
    tasks, additive, stragglers = plan.cohort[wave], hub.federation.additive, hub.config.simulation.stragglers
    dropped = [task for task in tasks if stragglers is not None and stragglers.drop and task.work is not None]
    absent = {task.client_id: STRAGGLER for task in dropped}
    shards = [
        hub.with_keys(plan, [task for task in plan.cohort[shard] if task.client_id not in absent])
        for shard in plan.shards
        if wave.start <= shard.start < wave.stop
    ]
    training = hub.config.training.in_round(plan.round, hub.config.rounds)
    rounds_left = hub.config.rounds - plan.round + 1
    streaming = (
        StreamingSum(additive, hub.federation.clip(plan), hub.config.admission) if additive is not None else None
    )
    trained = hub.trainer.train(training, broadcast.params_D, shards, streaming, rounds_left)
    batch = (
        _stack(np.empty((len(tasks), hub.federation.num_parameters), np.float32), trained)
        if additive is None
        else _add_up(additive, additive.init(hub.federation.num_coordinates), trained)
    )
    return replace(batch, download_bytes=len(broadcast.frame) * len(tasks), absent=absent)


def _stack(deltas_ND: Float32, trained: Iterable[tuple[ShardReport, Float32]]) -> UpdateBatch:
    """The shards' updates, one under the other."""
    client_ids: list[str] = []
    losses: list[Weighted] = []
    for report, shard_ND in trained:
        start, stop = len(client_ids), len(client_ids) + len(report.client_ids)
        deltas_ND[start:stop] = shard_ND[: stop - start]
        client_ids += report.client_ids
        losses += report.losses
    return UpdateBatch(tuple(client_ids), deltas_ND[: len(client_ids)], tuple(losses))


def _add_up(rule: AdditiveRule, partial: Accumulator, trained: Iterable[tuple[ShardReport, Float32]]) -> UpdateSum:
    """The shards' sums, in the order of the shards."""
    client_ids: list[str] = []
    loss = Weighted()
    rejected: dict[str, Rejection] = {}
    for report, sum_D in trained:
        partial = rule.add_sum(partial, sum_D, report.weight, report.count)
        for client_id, each in zip(report.client_ids, report.losses, strict=True):
            loss = loss if client_id in report.rejected else loss + each
        client_ids += report.client_ids
        rejected |= report.rejected
    return UpdateSum(tuple(client_ids), partial, loss, rejected=rejected)


@stage
def compress(hub: Hub, plan: RoundPlan, state: ServerState, batch: UpdateBatch | UpdateSum) -> EncodedBatch | UpdateSum:
    """One wave's updates as the bytes that travel; of updates that are added up already, one of each length."""
    codec = hub.codec(plan)
    if isinstance(batch, UpdateSum):
        delta_1D = batch.partial.tensors["sum"][None, : hub.federation.num_parameters].astype(np.float32)
        alike: dict[int, list[str]] = {}
        for client_id in batch.client_ids:
            alike.setdefault(len(json.dumps(client_id)), []).append(client_id)
        tasks = _tasks(plan, [ids[0] for ids in alike.values()])
        frames = [codec.encode(plan, [task], delta_1D)[0][0] for task in tasks]
        return replace(batch, frames=tuple(zip(frames, map(len, alike.values()), strict=True)))
    residuals_ND = hub.residuals(batch.client_ids) if hub.config.compression.error_feedback else None
    tasks = _tasks(plan, batch.client_ids)
    encoded, error, kept_ND = codec.encode(plan, tasks, batch.deltas_ND, residuals_ND, hub.trainer.spread)
    return EncodedBatch(batch.client_ids, encoded, batch.losses, batch.download_bytes, batch.absent, error, kept_ND)


def _tasks(plan: RoundPlan, client_ids: Sequence[str]) -> list[ClientTask]:
    tasks = {task.client_id: task for task in plan.cohort}
    return [tasks[client_id] for client_id in client_ids]


@stage
def admit(hub: Hub, plan: RoundPlan, batch: EncodedBatch | UpdateSum, collected: CohortResult | None) -> CohortResult:
    """Decode, check and take in one wave's updates, shard by shard; what is refused is kept with its reason."""
    rule = hub.config.aggregation
    collected = collected or CohortResult(
        rule.init(hub.federation.num_coordinates), selected=len(plan.excluded), rejected=plan.excluded
    )
    if isinstance(batch, UpdateSum):
        return _admit_sum(hub, plan, batch, collected)
    tasks, clip = _tasks(plan, batch.client_ids), hub.federation.clip(plan)
    # What is clipped counts whatever its norm is; what is not finite contributes zero.
    rejection = hub.config.admission.rejection if clip is None else admit_all
    deltas_ND, rejected = hub.codec(plan).decode(plan, tasks, batch.frames, rejection, hub.trainer.spread)
    partial, place_of = collected.partial, {task.client_id: place for place, task in enumerate(tasks)}
    for shard in plan.shards:
        places = [place_of[task.client_id] for task in plan.cohort[shard] if task.client_id in place_of]
        places = [place for place in places if place not in rejected]
        if places:
            examples_N = np.array([float(tasks[place].num_examples) for place in places])
            together = places == [*range(places[0], places[0] + len(places))]  # then there is no need for a copy
            own_ND = deltas_ND[places[0] : places[-1] + 1] if together else deltas_ND[places]
            if clip is None:
                partial = rule.add(partial, own_ND, examples_N)
            else:
                partial = _add_clipped(hub, partial, own_ND, examples_N, clip)
    loss = sum((batch.losses[place] for place in range(len(tasks)) if place not in rejected), collected.train_loss)
    reasons = {tasks[place].client_id: reason for place, reason in rejected.items()}
    residuals_ND = () if batch.residuals_ND is None else batch.residuals_ND
    # A client whose update is rejected keeps its earlier residual: what is not finite would stay so for ever.
    client_states = {
        tasks[place].client_id: hub.write_residual(residual_D)
        for place, residual_D in enumerate(residuals_ND)
        if place not in rejected
    }
    return replace(
        collected,
        partial=partial,
        train_loss=loss,
        compression_error=collected.compression_error + batch.error,
        client_states={**collected.client_states, **client_states},
        selected=collected.selected + len(batch.frames) + len(batch.absent),
        rejected={**collected.rejected, **batch.absent, **reasons},
        upload_bytes=collected.upload_bytes + sum(map(len, batch.frames)),
        download_bytes=collected.download_bytes + batch.download_bytes,
        largest_bytes=max([collected.largest_bytes, *map(len, batch.frames)]),
        slowest_s=max(collected.slowest_s, hub.slowest_s(tasks, list(map(len, batch.frames)), _download(batch))),
    )


def _add_clipped(hub: Hub, partial: Accumulator, deltas_ND: Float32, examples_N: Float64, clip: Clip) -> Accumulator:
    """Under a claim about clients: the server clips what it decoded, whatever compression made of it."""
    rule = hub.config.aggregation
    assert isinstance(rule, AdditiveRule) and rule.max_weight is not None
    weights_N, sum_D1 = rule.weigh(examples_N), np.zeros(hub.federation.num_coordinates)
    layers = torch.from_numpy(deltas_ND).split_with_sizes([math.prod(shape) for shape in hub.federation.shapes], dim=1)
    add_contributions(sum_D1, layers, torch.from_numpy(weights_N / rule.max_weight), clip)
    return rule.add_sum(partial, sum_D1, float(weights_N.sum()), len(deltas_ND))


def _admit_sum(hub: Hub, plan: RoundPlan, batch: UpdateSum, collected: CohortResult) -> CohortResult:
    """Take in updates that were checked and added up where they were made."""
    codec, upload_bytes = hub.codec(plan), sum(len(frame) * count for frame, count in batch.frames)
    for frame, _ in batch.frames:
        codec.decode(plan, _tasks(plan, [decode_update(frame, len(frame)).client_id]), [frame], admit_all)
    each = [upload_bytes // max(1, len(batch.client_ids))] * len(batch.client_ids)
    return replace(
        collected,
        partial=collected.partial + batch.partial,
        train_loss=collected.train_loss + batch.loss,
        selected=collected.selected + len(batch.client_ids) + len(batch.absent),
        rejected={**collected.rejected, **batch.rejected, **batch.absent},
        upload_bytes=collected.upload_bytes + upload_bytes,
        download_bytes=collected.download_bytes + batch.download_bytes,
        largest_bytes=max([collected.largest_bytes, *(len(frame) for frame, _ in batch.frames)]),
        slowest_s=max(collected.slowest_s, hub.slowest_s(_tasks(plan, batch.client_ids), each, _download(batch))),
    )


def _download(batch: EncodedBatch | UpdateSum) -> int:
    """Bytes, of each client."""
    return batch.download_bytes // max(1, len(batch.client_ids) + len(batch.absent))


@stage
def aggregate(hub: Hub, plan: RoundPlan, state: ServerState, collected: CohortResult) -> ServerState:
    """Seal what was collected, then move the server's parameters by it.

    Raises `TooFewClients` before the seal when too little was admitted, and `Diverged` after it when the new parameters
    or the state of the server optimiser are not finite.
    """
    received = collected.partial.count
    if received < plan.min_updates:
        reasons = Counter(rejection.code for rejection in collected.rejected.values())
        told = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())) or "none was rejected"
        raise TooFewClients(
            f"round {plan.round}: {received} of {collected.selected} updates could be used and "
            f"selection.min_updates is {plan.min_updates} ({told})",
            hint=LOWER_RATE if {"not_finite", "norm_too_large"} & reasons.keys() else None,
        )
    hub.seal(plan, replace(collected, seconds=dict(hub.seconds)))
    clipping, central = state.clipping, hub.federation.central
    if central is None:
        mean_D = hub.config.aggregation.aggregate(collected.partial)
    else:  # noise only now: it must never be drawn for two different sums
        sum_D1 = collected.partial.tensors["sum"]
        keys = hub.noise_keys(plan, {"sum": sum_D1, **clipping})
        mean_D, clipping = central.release(sum_D1, clipping, hub.federation.sampling, keys)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, in words
            params_D, optimizer = hub.config.server_optimizer.update(state.params_D, -mean_D, state.server_optimizer)
        if not np.isfinite(params_D).all():
            raise Diverged(
                "the server's parameters are no longer finite",
                hint="begin another run with a lower server_optimizer.learning_rate",
            )
    except Diverged as error:
        diverged = Diverged(f"round {plan.round}: {error.message}", hint=error.hint)
        hub.lease.finish(RunState.FAILED, diverged.as_data())  # which erases the seal and the key that opens it
        raise diverged from error
    return replace(
        state,
        round=plan.round,
        params_D=params_D,
        server_optimizer=optimizer,
        clipping=clipping,
        broadcast=hub.broadcast(state).held,
    )


@stage
def evaluate(hub: Hub, state: ServerState) -> dict[str, float]:
    """The metrics of the new parameters; none in a round that is not evaluated."""
    if state.round % hub.config.evaluation.every and state.round != hub.config.rounds:
        return {}
    baselines = {f"eval/baseline/{name}": value for name, value in hub.federation.baselines.items()}
    return hub.federation.evaluate(state.params_D) | baselines


@stage
def commit(
    hub: Hub, plan: RoundPlan, state: ServerState, collected: CohortResult, evaluated: dict[str, float]
) -> RoundResult:
    """Make the round visible: the state, then one transaction for the round, the run's pointer and the charge."""
    claim = {}
    if hub.federation.central is not None:
        assert plan.clipping_norm is not None
        claim = hub.federation.central.metrics(state.clipping, plan.clipping_norm, hub.federation.num_parameters)
        claim |= hub.federation.central.clipped_fraction(collected.partial.tensors["sum"], collected.partial.count)
    if hub.config.claims:
        claim |= hub.epsilons()
    result = round_result(
        state,
        collected,
        hub.config.evaluation.releases(evaluated) | claim,
        hub.seconds,
        hub.round_seconds,
        hub.peak_memory_bytes,
        withholds=hub.federation.withholds,
        hides_participation=hub.federation.hides_participation,
    )
    hub.lease.commit(
        plan.round,
        state=state.to_bytes(),
        params_digest=state.params_digest,
        result={
            "metrics": dict(result.metrics),
            "rejected": dict(result.rejected),
            "seconds": dict(result.seconds),
            "left_out": list(result.left_out),
        },
        withheld=result.withheld,
        participants=[task.index for task in plan.cohort] if hub.config.selection.uses_history else (),
    )
    if hub.secret is not None:
        hub.secret.advance(plan.round + 1)  # what was sealed and drawn in this round is now beyond everybody's reach
    return result


def round_result(
    state: ServerState,
    collected: CohortResult,
    found: dict[str, Release],
    seconds: dict[str, float],
    round_s: float,
    peak_memory_bytes: int,
    *,
    withholds: bool,
    hides_participation: bool,
) -> RoundResult:
    """What a round's row, MLflow and people are told, and what a privacy claim withholds from them. Its own commit is
    not in `seconds`: it is not over yet.

    `found` is what the evaluation and the claim have found, each with the reason why it may be seen. `round_s` is the
    wall-clock time since the round was loaded, so what is between the stages counts as well; what an earlier attempt
    spent before its seal is added.
    """
    seconds = {**collected.seconds, **{name: s for name, s in seconds.items() if name != "commit"}}
    rejected = Counter[str](rejection.code for rejection in collected.rejected.values())
    of_examples = {
        "train/loss": collected.train_loss.mean,
        **{f"time/{name}_s": s for name, s in seconds.items()},
        "time/round_s": round_s + sum(collected.seconds.values()),
        "memory/peak_mb": peak_memory_bytes / 1e6,
    }
    of_cohort = {  # what comes of updates that are private themselves may be told
        "clients/selected": collected.selected,
        "clients/received": collected.partial.count,
        "clients/rejected": len(collected.rejected),
        "communication/upload_bytes": collected.upload_bytes,
        "communication/download_bytes": collected.download_bytes,
        "communication/largest_update_bytes": collected.largest_bytes,
        "communication/error": collected.compression_error.mean,
    }
    if collected.slowest_s:
        of_cohort["communication/simulated_s"] = collected.slowest_s
    if collected.partial.count:
        sent = collected.partial.count * len(state.params_D)
        of_cohort["communication/bits_per_parameter"] = 8 * collected.upload_bytes / sent
    told = withheld if hides_participation else public
    metrics = found | {name: withheld(value) for name, value in of_examples.items()}
    metrics |= {name: told(value) for name, value in of_cohort.items()}
    finite = {  # a loss may not be; an epsilon is never dropped
        name: each for name, each in metrics.items() if np.isfinite(each.value) or name.startswith("privacy/")
    }
    shown, kept = split_releases(finite, withholds=withholds)
    return RoundResult(
        round=state.round,
        params_digest=state.params_digest,
        metrics={name: float(value) for name, value in shown.items()},
        rejected={} if hides_participation else rejected,
        left_out=[]
        if hides_participation
        else [each for each, reason in collected.rejected.items() if reason.code == RejectionCode.BUDGET_EXHAUSTED],
        seconds={} if withholds else seconds,
        withheld={"metrics": kept, "rejected": rejected, "seconds": seconds} if withholds else {},
    )
