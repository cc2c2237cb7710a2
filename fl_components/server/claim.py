"""A run's privacy claim against what it and its population have spent: epsilons, and when a round would cost too
much."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fl_components.config import FederationConfig
from fl_components.errors import BudgetExhausted, ConfigError
from fl_components.privacy import CentralPrivacy, PrivacySpend, neighbouring_of
from fl_components.privacy.accountants import NAME, rdp_epsilon
from fl_components.privacy.events import Event, as_neighbouring, parse_event
from fl_components.server.federation import Federation
from fl_components.store import Budget, BudgetTerms, Store
from fl_components.store.ledger import of_another_population, unregistered

MOST_GROUPS: Final = 10_000
"""Of clients whose data are told from others' by one digest each."""


def events_of(spent: Mapping[str, int]) -> dict[Event, int]:
    """The store's count of events, {canonical JSON: how often}, as an accountant takes it."""
    return {parse_event(json.loads(text)): count for text, count in spent.items()}


def check_terms(population: str, terms: BudgetTerms, budget: Budget) -> None:
    """Raises `ConfigError` when a run's epsilons would not mean what its population's budget means."""
    ours = {name: getattr(terms, name) for name in ("delta", "unit", "neighbouring", "accountant")}
    differing = [
        f"{name} is {value}, its budget's is {getattr(budget, name)}"
        for name, value in ours.items()
        if getattr(budget, name) != value
    ]
    if differing:
        raise ConfigError(
            f"this run and the budget of population {population!r} do not speak of the same epsilon: "
            f"{'; '.join(differing)}",
            hint="set privacy.delta, and the selection (poisson: add_or_remove; a fixed cohort: replace_one; everyone: "
            "zero_out), as the budget says",
        )


def check_budget(
    config: FederationConfig, budget: Budget, population_spent: Mapping[str, int], run_spent: Mapping[str, int]
) -> None:
    """Raises `BudgetExhausted` when what will have been spent passes the population's budget, or the run's own
    limit."""
    assert isinstance(config.privacy, CentralPrivacy)
    for whose, limit, spent, hint in (
        (
            f"population {budget.population!r}",
            budget.epsilon,
            population_spent,
            f"an administrator may raise it: `fedrounds privacy budget set {budget.population} --epsilon E "
            "--reason ...`",
        ),
        ("this run", config.privacy.epsilon, run_spent, "another run may go on from its model, within the same budget"),
    ):
        epsilon = _epsilon(spent, budget)
        if limit is not None and not epsilon <= limit:
            raise BudgetExhausted(
                f"the next round would bring {whose} to an epsilon of {epsilon:.4g} at delta {budget.delta:g}, and its "
                f"limit is {limit:g}",
                hint=hint,
            )


def check_population(store: Store, federation: Federation) -> list[str]:
    """See that what a run learns from its clients would be paid for: that its population has a budget on the same
    terms, and that these clients are no other population's. Changes nothing; returns what tells the clients' data.

    Raises `StoreError` when there is no budget for private data, and `ConfigError` when it is another one's, or the run
    would draw on a population's data without being charged.
    """
    config, public = federation.config, federation.data.public
    name, budget = config.population, store.find_budget(config.population)
    digests = members_of(store, federation) if store.has_members() or not public else []
    owners = set(store.bound(digests).values())
    if budget is not None and not budget.demonstration and not public:
        owners.add(name)
    if owners and (public or not federation.is_charged):
        owner = min(owners)
        raise ConfigError(_why_not(federation, owner), hint=f"use population: {owner}, with privacy.kind central")
    if not federation.is_charged:
        return []
    if owners - {name}:
        raise of_another_population(name, min(owners - {name}))
    if budget is None and not public:
        raise unregistered(name)
    if budget is not None:
        check_terms(name, _terms_of(federation), budget)
        if budget.demonstration != public:
            told = ("a demonstration on public data", "private") if budget.demonstration else ("private", "public")
            raise ConfigError(
                f"population {name!r} is {told[0]}, and data {config.data.kind} are {told[1]}",
                hint="name another population" + (", and have an administrator set its budget" * (not public)),
            )
    return digests


def join_population(store: Store, federation: Federation, digests: Sequence[str], say: Callable[[str], None]) -> None:
    """Bind the clients' data to the population of a run that `check_population` has let pass. Public data register a
    demonstration instead."""
    config, central = federation.config, federation.central
    if central is None or not federation.is_charged:
        return
    if not federation.data.public:
        store.bind_members(config.population, digests)
    elif store.find_budget(config.population) is None:
        reason = f"a demonstration on public data ({config.data.kind}), as its first run was configured"
        store.set_budget(config.population, _terms_of(federation), reason=reason, by="fedrounds")
    num_clients = federation.data.num_clients
    if central.delta > 1 / num_clients:
        say(
            f"privacy.delta is {central.delta:g}, more than one in {num_clients} clients: a mechanism that gives one "
            f"of them away could claim as much; set it below {1 / num_clients:g}"
        )


def _terms_of(federation: Federation) -> BudgetTerms:
    """The terms under which a run's epsilons are told. Nothing limits what demonstrations come to together."""
    central = federation.central
    assert central is not None
    return BudgetTerms(
        epsilon=None,
        delta=central.delta,
        unit=central.unit,
        neighbouring=neighbouring_of(federation.sampling),
        accountant=NAME,
        demonstration=federation.data.public,
    )


def _why_not(federation: Federation, owner: str) -> str:
    config = federation.config
    if federation.data.public:
        return f"data {config.data.kind} are declared public, and belong to population {owner!r}, which has a budget"
    which = "privacy.kind is none" if federation.central is None else "privacy.simulate_noise_cohort is set"
    return (
        f"population {owner!r} has a privacy budget and this run would not be charged to it ({which}): its model would "
        "give away what the budget is there to keep"
    )


def members_of(store: Store, federation: Federation) -> list[str]:
    """What tells these clients' training data from others' to this hub, and to nobody else anything: a digest of each
    client's rows in any order, or where there are more than `MOST_GROUPS` clients of those of some neighbours.

    Of a client with one row there is none: that others hold the same is no sign that they are the same.
    """
    data, found = federation.data, []
    ranges = list(zip(data.train_rows.starts.tolist(), data.train_rows.stops.tolist(), strict=True))
    size = -(-len(ranges) // MOST_GROUPS)
    for first in range(0, len(ranges), size):
        rows = [row for start, stop in ranges[first : first + size] for row in range(start, stop)]
        if len(rows) > 1:
            contents = sorted(data.x_train[row].tobytes() + data.y_train[row].tobytes() for row in rows)
            found.append(hmac.new(store.keys.signing.secret, b"".join(contents), "sha256").hexdigest())
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Spending:
    """What a run and its population have come to. `remaining` is None where nothing limits the population."""

    run: PrivacySpend
    population: float
    remaining: float | None


def spending(budget: Budget, run_spent: Mapping[str, int]) -> Spending:
    """The epsilons of a run and of its population, by the terms of the population's budget."""
    population = _epsilon(budget.spent, budget)
    run = PrivacySpend(_epsilon(run_spent, budget), budget.delta, budget.unit, budget.neighbouring, budget.accountant)
    return Spending(run, population, None if budget.epsilon is None else max(0.0, budget.epsilon - population))


def simulated_epsilon(federation: Federation, rounds: int) -> float:
    """Of a run that trains a small cohort as if it were a large one: the large one's, with the same sampling rate of a
    larger population."""
    central, sampling = federation.central, federation.sampling
    assert central is not None and central.simulate_noise_cohort is not None
    larger = central.simulate_noise_cohort / sampling.cohort_size
    scaled = replace(
        sampling,
        population_size=round(sampling.population_size * larger),
        cohort_size=central.simulate_noise_cohort,
    )
    return rdp_epsilon({central.event(scaled): rounds}, neighbouring_of(sampling), central.delta)


def _epsilon(spent: Mapping[str, int], budget: Budget) -> float:
    return rdp_epsilon(events_of(spent), as_neighbouring(budget.neighbouring), budget.delta)
