"""The stages of a round, in the order of the walk (flows/round.py). Each takes the run and values, and returns a value.

Only `authorise`, `aggregate` (its seal) and `commit` write, each of them so that doing it again changes nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from fedrounds.fl_components.aggregation import LinearAggregator
from fedrounds.fl_components.arrays import Float32, Float64, Tensors
from fedrounds.fl_components.client import RESIDUAL
from fedrounds.fl_components.compression import CodecContext
from fedrounds.fl_components.errors import Diverged, FedroundsError, RunFailed, TooFewClients
from fedrounds.fl_components.layout import DELTA, PARAMS
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.broadcast import EncodedBroadcast, encode_broadcast
from fedrounds.fl_components.server.charging import charge_payers, charges_of_round, epsilons
from fedrounds.fl_components.server.collection import Collection, UpdateStack, add_updates
from fedrounds.fl_components.server.restricted_log import withheld_error
from fedrounds.fl_components.server.results import round_result
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.server.schedule import schedule
from fedrounds.fl_components.server.simulation import simulated_clients, slowest_s
from fedrounds.fl_components.training import ShardReport, StreamingSum, names_of, next_kept
from fedrounds.fl_components.values import (
    Accumulator,
    ClientTask,
    CohortStatistics,
    EncodedBatch,
    RoundPlan,
    RoundResult,
    SealedCohort,
    ServerState,
    UpdateBatch,
    UpdateSum,
    Weighted,
)

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


def stage(function: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
    """Announce the stage, and add its time to `hub.seconds` and to the profile."""

    @wraps(function)
    def timed(run: Run, /, *args: P.args, **kwargs: P.kwargs) -> T:
        run.on_stage(function.__name__)
        with run.span(function.__name__):
            began = time.perf_counter()
            try:
                return function(run, *args, **kwargs)
            except Exception as error:
                foreseen = isinstance(error, FedroundsError) and function.__name__ not in OF_CLIENTS
                if foreseen or not run.federation.withholds:
                    raise
                what = f"the stage {function.__name__}"
                raise withheld_error(run.store.home, run.run_id, what, error) from None  # its traceback has the text
            finally:
                run.seconds[function.__name__] = run.seconds.get(function.__name__, 0.0) + time.perf_counter() - began

    return timed


@stage
def load(run: Run, round: int) -> ServerState:
    """The state after round - 1. Raises `RunFailed` when the run is not that far."""
    run.begin_round()
    state = run.state()
    if state.round != round - 1:
        raise RunFailed(f"round {round} cannot begin: the last committed round of run {run.run_id} is {state.round}")
    return state


@stage
def broadcast(run: Run, state: ServerState) -> EncodedBroadcast:
    """Return the parameters, and the other channels, as the clients receive them."""
    layout = run.federation.broadcast_layout
    seed = derive_key(run.config.seed, state.round + 1, "broadcast")  # of public numbers
    values_M = layout.join({PARAMS: state.params_D, **state.channels})
    context = CodecContext([seed], seed, layout.shapes)
    return encode_broadcast(run.config.broadcast, layout.channels, values_M, state.broadcast, context)


@stage
def select(run: Run, state: ServerState, sent: EncodedBroadcast) -> RoundPlan:
    """Return the plan of the next round: which clients, in what waves, each with a seed for its draws."""
    config, population, round = run.config, run.federation.population, state.round + 1
    source, stragglers = run.source(round), config.simulation.stragglers
    indices = run.federation.select(round, run.participations, source).tolist()
    seeds = [derive_key(source, round, "training", population.client_ids[index]) for index in indices]
    cohort = tuple(
        ClientTask(
            client_id=population.client_ids[index],
            index=index,
            num_examples=population.num_examples(index),
            seed=seed,
            work=None if stragglers is None else stragglers.work(seed, config.training.num_units),
        )
        for index, seed in zip(indices, seeds, strict=True)
    )
    return RoundPlan(
        run_id=run.run_id,
        round=round,
        base_digest=sent.digest,
        download_bytes=len(sent.frame),
        **schedule(run.federation, cohort),
        min_updates=0 if config.central is not None else config.selection.min_updates,
        clipping_norm=float(state.clipping["norm"][0]) if config.central is not None else None,
    )


@stage
def authorise(run: Run, plan: RoundPlan) -> RoundPlan:
    """Reserve what the round will cost, before any client is contacted.

    The returned plan has the reservation's number, and lacks the clients whose own budgets are spent.
    """
    clients_pay = any(each.is_paid_by_clients for each in run.claims)
    training = run.training_digest(plan) if clients_pay else None
    charges = charges_of_round(run, [task.index for task in plan.cohort])
    collection = charge_payers(run, charges, lambda each: run.lease.reserve(plan.round, each, training))
    plan = replace(plan, collection=collection)
    if not clients_pay:
        return plan
    paying = {account.client for account in run.lease.paying(plan.round)} - {None}
    refused = [task for task in plan.cohort if task.client_id not in paying]
    if not refused:
        return plan
    say = run.notify_restricted if run.federation.hides_participation else run.notify
    why = EXHAUSTED if paying else TOO_FEW_PAY
    say(f"round {plan.round} is made without {names_of(refused)}: {why}")
    reasons = {task.client_id: why for task in refused}
    remaining = tuple(task for task in plan.cohort if task.client_id not in reasons)
    min_updates = plan.min_updates if remaining else 0
    return replace(plan, **schedule(run.federation, remaining), excluded=reasons, min_updates=min_updates)


@stage
def train(run: Run, plan: RoundPlan, sent: EncodedBroadcast, wave: slice) -> UpdateBatch | UpdateSum:
    """Return the updates of one wave's local training, from the parameters as the clients receive them."""
    tasks, rule, stragglers = plan.cohort[wave], run.federation.streamed, run.config.simulation.stragglers
    dropped = [task for task in tasks if stragglers is not None and stragglers.drop and task.work is not None]
    absent = {task.client_id: STRAGGLER for task in dropped}
    shards = [
        simulated_clients(run, plan, [task for task in plan.cohort[shard] if task.client_id not in absent])
        for shard in plan.shards
        if wave.start <= shard.start < wave.stop
    ]
    training = run.config.training.resolve(plan.round, run.config.rounds)
    streaming = StreamingSum(rule, run.federation.admission(plan)) if rule is not None else None
    trained = run.executor.train(training, sent.base_M, shards, streaming)
    num_coordinates = run.federation.update_layout.size
    batch = (
        _stack(np.empty((len(tasks), num_coordinates), np.float32), trained)
        if rule is None or streaming is None
        else _add_up(rule, rule.start(streaming.size(num_coordinates)), trained)
    )
    return replace(batch, absent=absent)


def _stack(updates_NM: Float32, trained: Iterable[tuple[ShardReport, Float32]]) -> UpdateBatch:
    """Return the shards' updates, one under the other."""
    client_ids: list[str] = []
    losses: list[Weighted] = []
    for report, shard_NM in trained:
        start, stop = len(client_ids), len(client_ids) + len(report.client_ids)
        updates_NM[start:stop] = shard_NM[: stop - start]
        client_ids += report.client_ids
        losses += report.losses
    return UpdateBatch(tuple(client_ids), updates_NM[: len(client_ids)], tuple(losses))


def _add_up(rule: LinearAggregator, total: Accumulator, trained: Iterable[tuple[ShardReport, Float32]]) -> UpdateSum:
    """Return the shards' sums, added in the order of the shards."""
    client_ids: list[str] = []
    loss = Weighted()
    rejected: dict[str, Rejection] = {}
    for report, sum_M in trained:
        total = rule.add_sum(total, sum_M, report.weight, report.count)
        for client_id, client_loss in zip(report.client_ids, report.losses, strict=True):
            loss = loss if client_id in report.rejected else loss + client_loss
        client_ids += report.client_ids
        rejected |= report.rejected
    return UpdateSum(tuple(client_ids), total, loss, rejected=rejected)


@stage
def compress(run: Run, plan: RoundPlan, batch: UpdateBatch | UpdateSum) -> EncodedBatch | UpdateSum:
    """Return one wave's updates as the bytes that travel; of summed updates, how many bytes would travel."""
    codec, layout = run.codec(plan), run.federation.update_layout
    if isinstance(batch, UpdateSum):
        return replace(batch, frame_bytes=tuple(map(codec.fixed_update_bytes, batch.client_ids)))
    objective, feedback = run.config.training.objective, run.config.compression.error_feedback
    states = run.client_states(batch.client_ids) if run.federation.keeps_client_states else []
    new_states: list[dict[str, Float32]] = (
        [
            next_kept(objective, state, layout.split(update_M))
            for state, update_M in zip(states, batch.updates_NM, strict=True)
        ]
        if states
        else []
    )
    residuals_NM = None
    if feedback:
        residuals_NM = np.zeros_like(batch.updates_NM)
        for residual_M, state in zip(residuals_NM, states, strict=True):
            residual_M[:] = state.get(RESIDUAL, 0)
    tasks = _tasks(plan, batch.client_ids)
    frames, error, residuals_NM = codec.encode(plan, tasks, batch.updates_NM, residuals_NM, run.map_rows)
    if residuals_NM is not None:
        for state, residual_M in zip(new_states, residuals_NM, strict=True):
            state[RESIDUAL] = residual_M
    return EncodedBatch(batch.client_ids, frames, batch.losses, batch.absent, error, tuple(new_states))


def _tasks(plan: RoundPlan, client_ids: Sequence[str]) -> list[ClientTask]:
    tasks = {task.client_id: task for task in plan.cohort}
    return [tasks[client_id] for client_id in client_ids]


@stage
def admit(run: Run, plan: RoundPlan, batch: EncodedBatch | UpdateSum, collected: Collection | None) -> Collection:
    """Return the collection with one wave's updates, decoded and checked; each rejection has its reason."""
    collected = collected or run.empty_collection(plan)
    statistics = collected.statistics
    if isinstance(batch, UpdateSum):
        assert isinstance(collected.updates, Accumulator)
        updates: Accumulator | UpdateStack = collected.updates + batch.total
        frame_bytes, received = batch.frame_bytes, batch.total.count
        rejected, loss, error = batch.rejected, batch.loss, Weighted()
        client_states: dict[str, str] = {}
    else:
        tasks, admission = _tasks(plan, batch.client_ids), run.federation.admission(plan)
        updates_NM, reasons = run.codec(plan).decode(plan, tasks, batch.frames, admission, run.map_rows)
        updates = add_updates(run.federation, plan, collected.updates, tasks, updates_NM, reasons)
        frame_bytes, received = tuple(map(len, batch.frames)), len(tasks) - len(reasons)
        rejected, error = {tasks[place].client_id: reason for place, reason in reasons.items()}, batch.error
        loss = sum((batch.losses[place] for place in range(len(tasks)) if place not in reasons), Weighted())
        # A client whose update is rejected keeps its earlier state: what is not finite would stay so for ever.
        client_states = {
            tasks[place].client_id: run.write_client_state(state)
            for place, state in enumerate(batch.client_states)
            if place not in reasons
        }
    num_selected = len(batch.client_ids) + len(batch.absent)
    round_s = slowest_s(run, _tasks(plan, batch.client_ids), frame_bytes, plan.download_bytes)
    return Collection(
        updates,
        replace(
            statistics,
            selected=statistics.selected + num_selected,
            received=statistics.received + received,
            rejected={**statistics.rejected, **batch.absent, **rejected},
            train_loss=statistics.train_loss + loss,
            compression_error=statistics.compression_error + error,
            client_states={**statistics.client_states, **client_states},
            upload_bytes=statistics.upload_bytes + sum(frame_bytes),
            download_bytes=statistics.download_bytes + plan.download_bytes * num_selected,
            largest_bytes=max(statistics.largest_bytes, *frame_bytes, 0),
            slowest_s=max(statistics.slowest_s, round_s),
        ),
    )


@stage
def aggregate(run: Run, plan: RoundPlan, state: ServerState, collected: Collection) -> SealedCohort:
    """Combine the admitted updates, and seal the outcome: what is sealed is never collected again.

    Under a claim about clients the exact sum is sealed, and noise is drawn only after that: it must never be drawn for
    two different sums.

    Raises:
      TooFewClients: fewer updates were admitted than `selection.min_updates`, or than the aggregator needs.
    """
    statistics, rule = collected.statistics, run.config.aggregation
    _check_enough(plan, statistics, rule.num_needed)
    statistics = replace(statistics, seconds=dict(run.seconds))
    if isinstance(collected.updates, UpdateStack):
        result = rule.combine(collected.updates.updates(), state.aggregator)
        reasons = {name: Rejection(RejectionCode.EXCLUDED, why) for name, why in result.excluded.items()}
        statistics = replace(
            statistics,
            rejected={**statistics.rejected, **reasons},
            metrics={f"aggregation/{name}": value for name, value in result.metrics.items()},
        )
        new_state = {f"state.{name}": tensor for name, tensor in result.state.items()}
        tensors: Tensors = {"aggregate": result.aggregate_M, **new_state}
    elif run.federation.central is not None:
        tensors = {"sum": collected.updates.tensors["sum"]}
    else:
        assert isinstance(rule, LinearAggregator)
        tensors = {"aggregate": rule.finish(collected.updates)}
    cohort = SealedCohort(tensors, statistics)
    run.seal(plan, cohort)
    return cohort


def _check_enough(plan: RoundPlan, statistics: CohortStatistics, num_needed: int) -> None:
    received = statistics.received
    if received >= plan.min_updates and (received >= num_needed or received == 0):
        return
    reasons = Counter(rejection.code for rejection in statistics.rejected.values())
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items())) or "none was rejected"
    needed = (
        f"selection.min_updates is {plan.min_updates}"
        if received < plan.min_updates
        else f"the aggregator needs {num_needed}"
    )
    raise TooFewClients(
        f"round {plan.round}: {received} of {statistics.selected} updates could be used and {needed} ({counts})",
        hint=LOWER_RATE if {"not_finite", "norm_too_large"} & reasons.keys() else None,
    )


@stage
def server_step(
    run: Run, plan: RoundPlan, state: ServerState, sent: EncodedBroadcast, cohort: SealedCohort
) -> ServerState:
    """Return the state after the round: the server's parameters moved by the aggregate, with noise under a claim.

    Raises:
      Diverged: the new parameters or the state of the server optimiser are not finite.
    """
    federation, clipping = run.federation, state.clipping
    if federation.central is None:
        aggregate_M = cohort.tensors["aggregate"]
    else:
        sum_M1 = cohort.tensors["sum"]
        keys = run.noise_keys(plan, {"sum": sum_M1, **clipping})
        aggregate_M, clipping = federation.central.release(sum_M1, clipping, federation.sampling, keys)
    aggregate = federation.update_layout.split(aggregate_M)
    delta_D, optimizer = aggregate.pop(DELTA), run.config.server_optimizer
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, in words
            params_D, optimizer_state = optimizer.update(state.params_D, -delta_D, state.server_optimizer)
        if not np.isfinite(params_D).all():
            raise Diverged(
                "the server's parameters are no longer finite",
                hint="begin another run with a lower server_optimizer.learning_rate",
            )
    except Diverged as error:
        diverged = Diverged(f"round {plan.round}: {error.message}", hint=error.hint)
        run.lease.finish(RunState.FAILED, diverged.as_data())  # which erases the seal and the key that opens it
        raise diverged from error
    return replace(
        state,
        round=plan.round,
        params_D=params_D,
        server_optimizer=optimizer_state,
        aggregator=cohort.aggregator_state,
        channels=_next_channels(run, state.channels, aggregate, cohort.statistics.received),
        clipping=clipping,
        broadcast=sent.held,
    )


def _next_channels(run: Run, channels: Tensors, aggregate: Mapping[str, Float64], received: int) -> Tensors:
    """Return what the server sends besides the parameters in the next round."""
    if not channels:
        return {}
    # How many updates came is private where the cohort is: the expected number takes its place.
    num_updates = run.federation.sampling.cohort_size if run.federation.central is not None else received
    share = num_updates / run.federation.population.size
    return run.config.training.objective.next_received(channels, aggregate, share)


@stage
def evaluate(run: Run, state: ServerState) -> dict[str, float]:
    """The metrics of the new parameters; none in a round that is not evaluated."""
    if state.round % run.config.evaluation.every and state.round != run.config.rounds:
        return {}
    baselines = {f"eval/baseline/{name}": value for name, value in run.federation.baselines.items()}
    return run.federation.evaluate(state.params_D) | baselines


@stage
def commit(
    run: Run, plan: RoundPlan, state: ServerState, cohort: SealedCohort, evaluated: dict[str, float]
) -> RoundResult:
    """Make the round visible: the state, then one transaction for the round, the run's pointer and the charge."""
    claim = {}
    if run.federation.central is not None:
        assert plan.clipping_norm is not None
        num_coordinates = run.federation.update_layout.size
        claim = run.federation.central.metrics(state.clipping, plan.clipping_norm, num_coordinates)
        claim |= run.federation.central.clipped_fraction(cohort.tensors["sum"], cohort.statistics.received)
    if run.config.claims:
        claim |= epsilons(run)
    result = round_result(
        state,
        cohort.statistics,
        run.config.evaluation.releases(evaluated) | claim,
        run.seconds,
        run.round_seconds,
        run.peak_memory_bytes,
        withholds=run.federation.withholds,
        hides_participation=run.federation.hides_participation,
    )
    run.lease.commit(
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
        participants=[task.index for task in plan.cohort] if run.config.selection.uses_history else (),
    )
    if run.secret is not None:
        run.secret.advance(plan.round + 1)  # what was sealed and drawn in this round is now beyond everybody's reach
    return result
