"""The scheduler over workers of a simulated transport: whatever the order of events, every result comes in its turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import ModelError, RunFailed
from fedrounds.fl_components.executors.scheduler import (
    MAX_ATTEMPTS,
    Job,
    JobResult,
    Message,
    Scheduler,
    Transport,
    Worker,
)

Event = tuple[Worker, Message]


class Simulation(Transport):
    """Workers whose events are drawn at random: at each poll one of them is ready, done with its first bundle, or lost.

    `kills` says whether a worker dies of the job that it runs.
    """

    noun, loss_hint, start_hint, block_rows = "workers", "start better ones", "repair them", 0

    def __init__(
        self,
        num_workers: int,
        depth: int,
        bundle_size: int,
        seed: int,
        kills: Callable[[int], bool] = lambda job: False,
    ) -> None:
        self.workers: list[Worker] = []
        self.depth, self.bundle_size = depth, bundle_size
        self._num_workers, self._random, self._kills = num_workers, random.Random(seed), kills
        self.most_ahead = self.taken = self.num_started = 0
        self.bundles: list[tuple[int, ...]] = []
        self.begin(None)

    def begin(self, params_D: Float32 | None) -> None:
        while len(self.workers) < self._num_workers:
            self.num_started += 1
            self.workers.append(Worker(f"worker {self.num_started}"))

    def submit(self, worker: Worker, bundle: tuple[Job, ...]) -> None:
        assert worker.is_ready and len(worker.bundles) <= self.depth and 0 < len(bundle) <= self.bundle_size
        self.bundles.append(tuple(job.index for job in bundle))
        self.most_ahead = max(self.most_ahead, bundle[-1].index - self.taken)

    def poll(self, *, block: bool = True) -> list[Event]:
        self.begin(None)
        busy = [worker for worker in self.workers if worker.bundles or not worker.is_ready]
        if not block or not busy:
            return []
        worker = self._random.choice(busy)
        if not worker.is_ready:
            return [(worker, Message())]
        bundle = worker.bundles[0]
        if any(self._kills(job.index) for job in bundle):
            return [(worker, Message(lost="SIGKILL"))]
        return [(worker, Message(tuple(JobResult(job.index, job.index, None, 0, 0, 0) for job in bundle)))]

    def abandon(self, worker: Worker) -> None:
        self.remove(worker)

    def remove(self, worker: Worker) -> None:
        self.workers.remove(worker)

    def close(self) -> None:
        self.workers.clear()


def jobs(count: int) -> list[Job]:
    return [Job(index, lambda engine, params_D, array: None, 1) for index in range(count)]


def describe(jobs: Sequence[Job]) -> str:
    return f"jobs {[job.index for job in jobs]}"


simulations = {
    "num_workers": st.integers(1, 4),
    "depth": st.integers(1, 3),
    "bundle_size": st.integers(1, 5),
    "seed": st.integers(0, 2**32),
}


@given(num_jobs=st.integers(0, 40), lost=st.lists(st.integers(0, 39), max_size=12), **simulations)
def test_results_come_in_order_and_run_ahead_by_a_limited_number(
    num_jobs: int, lost: list[int], num_workers: int, depth: int, bundle_size: int, seed: int
) -> None:
    """Also when workers die, as long as no job kills too many of them."""
    kills = {job: min(lost.count(job), MAX_ATTEMPTS - 1) for job in set(lost)}

    def kill(job: int) -> bool:
        kills[job] = kills.get(job, 0) - 1
        return kills[job] >= 0

    transport, messages = Simulation(num_workers, depth, bundle_size, seed, kill), list[str]()
    scheduler = Scheduler(transport, messages.append)
    try:
        results = []
        for result in scheduler.run(jobs(num_jobs), None, describe):
            results.append(result.value)
            transport.taken = result.index + 1
    except RunFailed as error:  # jobs of one bundle are blamed together
        assert bundle_size > 1 and "while they ran the same job" in error.message
        return
    assert results == list(range(num_jobs))
    assert transport.most_ahead < 2 * depth * num_workers * bundle_size
    assert all(" was lost (SIGKILL)" in message for message in messages)


@given(poisonous=st.integers(0, 19), **simulations)
def test_the_job_that_kills_every_worker_is_named_alone(
    poisonous: int, num_workers: int, depth: int, bundle_size: int, seed: int
) -> None:
    transport, messages = Simulation(num_workers, depth, bundle_size, seed, lambda job: job == poisonous), list[str]()
    with pytest.raises(RunFailed, match=rf"^3 workers were lost .* the same job: jobs \[{poisonous}\]$") as caught:
        list(Scheduler(transport, messages.append).run(jobs(20), None, describe))
    assert caught.value.hint == "start better ones"
    assert len(messages) == MAX_ATTEMPTS - 1 and all(
        "; its work is repeated: jobs [" in message for message in messages
    )
    assert all(str(poisonous) in message for message in messages)


def scheduler_of(events: list[list[Event]], workers: list[Worker]) -> tuple[Scheduler, list[str]]:
    """A scheduler whose transport reports these events, poll by poll."""
    transport, messages = Simulation(0, 1, 1, 0), list[str]()
    transport.workers = workers
    pending = iter(events)
    transport.poll = lambda *, block=True: next(pending)  # type: ignore[method-assign]
    return Scheduler(transport, messages.append), messages


def test_workers_that_are_lost_before_they_are_ready() -> None:
    workers = [Worker(f"worker {number}") for number in range(MAX_ATTEMPTS)]
    scheduler, messages = scheduler_of([[(worker, Message(lost="exit code 1"))] for worker in workers], list(workers))
    with pytest.raises(RunFailed, match=r"3 workers were lost before they were ready \(exit code 1\)") as caught:
        list(scheduler.run(jobs(1), None, describe))
    assert caught.value.hint == "repair them"
    assert messages == ["worker 0 was lost (exit code 1)", "worker 1 was lost (exit code 1)"]


def test_a_worker_that_gets_ready_in_between_starts_the_count_again() -> None:
    lost = [Worker(f"worker {number}") for number in range(MAX_ATTEMPTS)]
    good = Worker("good")
    loss = Message(lost="exit code 1")
    events: list[list[Event]] = [[(lost[0], loss), (lost[1], loss)], [(good, Message())], [(lost[2], loss)]]
    events += [[(good, Message((JobResult(0, "done", None, 0, 0, 0),)))]]
    scheduler, messages = scheduler_of(events, [*lost, good])
    assert [result.value for result in scheduler.run(jobs(1), None, describe)] == ["done"]
    assert len(messages) == 3


def test_notes_are_said_once_and_problems_are_raised() -> None:
    first, second = Worker("first"), Worker("second")
    note = Message(notes=("the model has an unknown layer",))
    problem = Message(problem="the model failed while client c1 trained", hint="correct the model")
    scheduler, messages = scheduler_of([[(first, note), (second, note)], [(first, problem)]], [first, second])
    with pytest.raises(ModelError, match="client c1") as caught:
        list(scheduler.run(jobs(1), None, describe))
    assert caught.value.hint == "correct the model" and messages == ["the model has an unknown layer"]
    assert scheduler._transport.workers == [second]  # the other one may have no engine


def test_the_job_whose_turn_it_is_comes_first_when_workers_are_lost() -> None:
    """One worker runs less far ahead than two: job 1 must not wait behind job 4."""
    a, b, c = (Worker(name) for name in "abc")

    def done(worker: Worker, job: int) -> list[Event]:
        return [(worker, Message((JobResult(job, job, None, 0, 0, 0),)))]

    ready: list[Event] = [(a, Message()), (b, Message())]  # they get jobs 0 and 1, then a gets those that follow
    lost: list[Event] = [(b, Message(lost="SIGKILL")), (a, Message(lost="SIGKILL")), (c, Message())]
    events = [ready, done(a, 0), done(a, 2), done(a, 3), lost, done(c, 1), done(c, 4)]
    scheduler, messages = scheduler_of(events, [a, b, c])
    assert [result.value for result in scheduler.run(jobs(5), None, describe)] == [0, 1, 2, 3, 4]
    assert [message[-3:] for message in messages] == ["[1]", "[4]"]
    assert scheduler._transport.bundles == [(job,) for job in (0, 1, 2, 3, 4, 1, 4)]  # type: ignore[attr-defined]


def test_the_second_report_of_a_loss_is_ignored() -> None:
    """Dask reports each of a lost worker's bundles, and that the worker is gone."""
    lost, good = Worker("lost"), Worker("good")
    ready: list[Event] = [(lost, Message())]
    events = [ready, [(lost, Message(lost="gone")), (lost, Message(lost="gone"))], [(good, Message())]]
    events += [[(good, Message((JobResult(0, "done", None, 0, 0, 0),)))]]
    scheduler, messages = scheduler_of(events, [lost, good])
    assert [result.value for result in scheduler.run(jobs(1), None, describe)] == ["done"]
    assert messages == ["lost was lost (gone); its work is repeated: jobs [0]"]


@pytest.mark.parametrize("num_taken", [1, 3])
def test_a_round_that_is_given_up_abandons_the_workers_that_have_jobs(num_taken: int) -> None:
    transport = Simulation(2, 2, 1, 0)
    results = Scheduler(transport, print).run(jobs(20), np.zeros(1, np.float32), describe)
    for _ in range(num_taken):
        next(results)
    before = list(transport.workers)
    busy = [worker for worker in before if worker.bundles]
    results.close()  # type: ignore[attr-defined]
    assert busy and not set(busy) & set(transport.workers)
    assert all(not worker.bundles for worker in before)
