"""The server runs rounds over a population of which it holds no rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.client import ClientExamples, run_round
from fedrounds.fl_components.config import parse_config
from fedrounds.fl_components.errors import BudgetExhausted, RunFailed
from fedrounds.fl_components.population import Population
from fedrounds.fl_components.server import stages
from fedrounds.fl_components.server.assembly import assemble
from fedrounds.fl_components.server.charging import check_budget
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.opening import open_run
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.server.specs import round_spec
from fedrounds.fl_components.store import Store
from fedrounds.fl_components.values import EncodedBatch, RoundPlan
from fedrounds.flows.round import walk
from tests.fl_components.server import wards

from .conftest import StartRun

CENTRAL = {
    "privacy": {"kind": "central", "clipping": {"kind": "fixed", "norm": 0.5}, "noise_multiplier": 1.0, "delta": 1e-3},
    "selection": {"kind": "poisson", "sampling_rate": 0.5},
}


def without_rows(federation: Federation) -> Federation:
    """The same federation, as a server sees clients that keep their examples."""
    population = federation.population
    registered = Population(
        list(population.client_ids), population.num_examples_n.copy(), population.is_public, population.attribute
    )
    return replace(federation, population=registered, clients=None, evaluation_set=None)


def answers(run: Run, plan: RoundPlan, frame: bytes, rows: Federation) -> EncodedBatch:
    """What the clients of a plan send; each has its own rows."""
    replies = [
        run_round(
            round_spec(run.federation, plan, task, run.source(plan.round)),
            frame,
            ClientExamples(*rows.simulated.data.train(task.index)),
        )
        for task in plan.cohort
    ]
    names = tuple(task.client_id for task in plan.cohort)
    return EncodedBatch(names, tuple(reply.frame for reply in replies), tuple(reply.loss for reply in replies))


def one_round(run: Run, round: int, rows: Federation) -> None:
    state = stages.load(run, round)
    sent = stages.broadcast(run, state)
    plan = stages.authorise(run, stages.select(run, state, sent))
    collected = stages.admit(run, plan, answers(run, plan, sent.frame, rows), None)
    cohort = stages.aggregate(run, plan, state, collected)
    state = stages.server_step(run, plan, state, sent, cohort)
    stages.commit(run, plan, state, cohort, stages.evaluate(run, state))


def test_rounds_without_rows_reach_the_same_parameters(store: Store, start_run: StartRun) -> None:
    with start_run("simulated") as run:
        rows = run.federation
        walk(stages, run, 1), walk(stages, run, 2)
        expected_D = run.state().params_D
    federation = without_rows(rows)
    with open_run(store, "registered", federation=federation) as run:
        one_round(run, 1, rows)
    with open_run(store, "registered", federation=federation) as run:  # as another process resumes it
        one_round(run, 2, rows)
        np.testing.assert_allclose(run.state().params_D, expected_D, rtol=0, atol=1e-6)
        result = run.committed(2)
    assert result is not None and result.metrics["clients/received"] == 9
    assert not any(name.startswith("eval/") for name in result.metrics)


def test_a_claim_is_charged_and_its_budget_held(store: Store) -> None:
    store.ledger.set_budget(Account("wards"), wards.TERMS, reason="a test", by="ada")
    rows = assemble(parse_config(wards.FIELDS | CENTRAL | {"data": wards.WARDS, "population": "wards"}))
    with open_run(store, "registered", federation=without_rows(rows)) as run:
        one_round(run, 1, rows)
        spent = store.ledger.budget(Account("wards"))
        assert spent is not None and sum(spent.spent.values()) == 1
        store.ledger.set_budget(Account("wards"), replace(wards.TERMS, epsilon=0.01), reason="a test", by="ada")
        with pytest.raises(BudgetExhausted):
            check_budget(run)
        with pytest.raises(BudgetExhausted):
            one_round(run, 2, rows)


def test_simulated_training_is_refused(store: Store, start_run: StartRun) -> None:
    with start_run("simulated") as run:
        federation = without_rows(run.federation)
    with open_run(store, "registered", federation=federation) as run:
        state = stages.load(run, 1)
        sent = stages.broadcast(run, state)
        plan = stages.select(run, state, sent)
        with pytest.raises(RunFailed, match="the clients of this population are not simulated"):
            stages.train(run, plan, sent, plan.waves[0])
