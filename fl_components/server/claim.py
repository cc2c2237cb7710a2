"""A run's privacy claim against what it and its population have spent: epsilons, and when a round would cost too
much."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from fedrounds.fl_components.config import FederationConfig
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError
from fedrounds.fl_components.privacy import CentralPrivacy, PrivacySpend, neighbouring_of
from fedrounds.fl_components.privacy.accountants import NAME, rdp_epsilon
from fedrounds.fl_components.privacy.events import Event, Neighbouring, as_neighbouring, parse_event
from fedrounds.fl_components.privacy.example_level import NEIGHBOURING, UNIT
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.ownership import KeyedData, keyed, matches
from fedrounds.fl_components.store import Budget, BudgetTerms, Owners, RunRecord, Store
from fedrounds.fl_components.store.ledger import EACH_CLIENT, of_another_population, of_client, unregistered_error

MAX_SHOWN: Final = 100
"""Clients whose epsilons are told one by one."""


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
            hint="set training.privacy.delta as the budget says"
            if terms.unit == UNIT
            else "set privacy.delta, and the selection (poisson: add_or_remove; a fixed cohort: replace_one; everyone: "
            "zero_out), as the budget says",
        )


def check_client_budget(terms: BudgetTerms, budget: Budget, spent: Mapping[str, int]) -> None:
    """Raises `BudgetExhausted` when what will have been spent on a client's examples passes its own budget, and
    `ConfigError` when the two do not speak of the same epsilon."""
    check_terms(budget.population, terms, budget)
    if terms.demonstration and not budget.demonstration:
        raise ConfigError(
            f"population {budget.population!r} has become private, and this run's data are public",
            hint="name another population",
        )
    epsilon = epsilon_of(spent, budget)
    if not math.isfinite(epsilon):
        raise BudgetExhausted(
            f"after the next round no epsilon would hold for the examples of client {budget.population!r} at delta "
            f"{budget.delta:g}: too many of its batches would have been cut",
            hint="begin another run with a larger training.privacy.max_batch_size, or without it",
        )
    if budget.epsilon is not None and epsilon > budget.epsilon:
        raise BudgetExhausted(
            f"the next round would bring the examples of client {budget.population!r} to an epsilon of {epsilon:.4g} "
            f"at delta {budget.delta:g}, and their limit is {budget.epsilon:g}",
            hint="an administrator may raise it: `fedrounds privacy budget set "
            f"{shlex.quote(budget.population)} --epsilon E --reason ...`",
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
        epsilon = epsilon_of(spent, budget)
        if limit is not None and not epsilon <= limit:
            raise BudgetExhausted(
                f"the next round would bring {whose} to an epsilon of {epsilon:.4g} at delta {budget.delta:g}, and its "
                f"limit is {limit:g}",
                hint=hint,
            )


def check_population(store: Store, federation: Federation) -> KeyedData | None:
    """See that what a run learns from its clients would be paid for: that its population has a budget on the same
    terms, and that these data are no other population's. Changes nothing but for the first key of fingerprints; returns
    the digests of the data, or None where they need not be remembered.

    Raises `StoreError` when there is no budget for private data or this home lacks a key, and `ConfigError` when it is
    another one's, or the run would draw on a population's data without being charged.
    """
    config, public = federation.config, federation.data.public
    store.check_keys()
    well_known = public and config.data.is_well_known
    data = None
    if not well_known or store.has_bindings():
        every_client = federation.example_level is not None
        data = keyed(federation.data.fingerprints(every_client=every_client), store.fingerprint_key())
    name, budgets = config.population, _budgets_of(store, config.population)
    wanted = _terms_of(federation)
    _check_owners(store, federation, data, store.owners(data.digests()) if data is not None else {})
    for whose, terms in wanted.items():
        budget = budgets.get(whose)
        if budget is None and not public:
            raise unregistered_error(whose)
        if budget is not None:
            check_terms(whose, terms, budget)
            check_demonstration(federation, budget)
    if name + EACH_CLIENT in wanted and not public:
        _check_named_budgets(store, federation)
    return None if well_known else data


def check_demonstration(federation: Federation, budget: Budget) -> None:
    """Raises `ConfigError` when the population's budget is a demonstration on public data and these are private, or the
    other way round."""
    public = federation.data.public
    if budget.demonstration != public:
        budgets, data = ("a demonstration on public data", "private") if budget.demonstration else ("private", "public")
        raise ConfigError(
            f"population {budget.population!r} is {budgets}, and data {federation.config.data.kind} are {data}",
            hint="name another population"
            + (
                ", or have an administrator set a budget for this one: `fedrounds privacy budget set "
                f"{shlex.quote(budget.population)} --epsilon E --reason ...`"
            )
            * (not public),
        )


def _check_owners(store: Store, federation: Federation, data: KeyedData | None, owners: Owners) -> None:
    """Raises `ConfigError` where the data, or those of one client, belong to another population or another client, or
    would be used without being charged to their population."""
    public, name, wanted = federation.data.public, federation.config.population, _terms_of(federation)
    found = matches(data, owners) if data is not None else set()
    populations = {match.population for match in found}
    if not public and any(not each.demonstration for each in _budgets_of(store, name).values()):
        populations.add(name)
    for owner in sorted(populations):
        _check_pays(federation, owner, _budgets_of(store, owner))
    if wanted and populations - {name}:
        raise of_another_population(name, min(populations - {name}))
    if name + EACH_CLIENT in wanted and not public:
        for match in sorted(found, key=lambda each: (each.client, each.owner)):
            if match.client and match.owner and match.client != match.owner:
                raise ConfigError(
                    f"the examples of client {of_client(name, match.client)!r} are for the most part those of "
                    f"{of_client(name, match.owner)!r}, which answers for them with a budget of its own",
                    hint="a client keeps its name, and its examples, in all runs on its population",
                )


def _check_named_budgets(store: Store, federation: Federation) -> None:
    """Raises `ConfigError` where a budget was set for a client by a name that differs from a client's by its spelling
    alone: the limit would apply to no client."""
    name = federation.config.population
    named = {whose.partition("/")[2] for whose, by_name in store.clients_of(name).items() if by_name} - {"*"}
    unused = named - set(federation.data.client_ids) - store.clients_known(name)
    by_spelling = {_spelling(client): client for client in federation.data.client_ids} if unused else {}
    for client in sorted(unused):
        if _spelling(client) in by_spelling:
            raise ConfigError(
                f"a privacy budget is set for {of_client(name, client)!r}, and the client's name is "
                f"{by_spelling[_spelling(client)]!r}",
                hint="an administrator sets it for that name: `fedrounds privacy budget set "
                f"{shlex.quote(of_client(name, by_spelling[_spelling(client)]))} --epsilon E --reason ...`; or give "
                "the client the other name",
            )


def _spelling(client: str) -> str:
    """
    >>> _spelling("St. Mary-2") == _spelling("st_mary 2")
    True
    """
    return "".join(character for character in client.casefold() if character.isalnum())


def join_population(
    store: Store, federation: Federation, run_id: str, data: KeyedData | None, say: Callable[[str], None]
) -> None:
    """Remember that the run uses these data, and bind them to the population of a run that `check_population` has let
    pass. Public data register a demonstration instead."""
    config, wanted = federation.config, _terms_of(federation)
    if data is not None:
        store.enter_data(
            run_id=run_id,
            name=config.name,
            population=config.population,
            units=[] if federation.data.public else sorted({terms.unit for terms in wanted.values()}),
            digests=data.recorded,
            check=lambda owners: _check_owners(store, federation, data, owners),
        )
    if federation.data.public:
        for whose, terms in wanted.items():
            if store.find_budget(whose) is None:
                reason = f"a demonstration on public data ({config.data.kind}), as its first run was configured"
                store.set_budget(whose, terms, reason=reason, by="fedrounds")
    for warning in delta_warnings(federation):
        say(warning)


def delta_warnings(federation: Federation) -> list[str]:
    """Return a sentence for each delta at which a mechanism that gives somebody's data away could claim as much."""
    num_clients, most = federation.data.num_clients, int(federation.data.train_rows.lengths.max())
    central, examples, warnings = federation.central, federation.example_level, []
    if federation.is_charged and central is not None and central.delta > 1 / num_clients:
        warnings.append(_large_delta("privacy.delta", central.delta, f"{num_clients} clients", 1 / num_clients))
    if examples is not None and examples.delta > 1 / most:
        warnings.append(_large_delta("training.privacy.delta", examples.delta, f"{most} examples", 1 / most))
    return warnings


def _large_delta(field: str, delta: float, of: str, most: float) -> str:
    return (
        f"{field} is {delta:g}, more than one in {of}: a mechanism that gives one of them away could claim as much; "
        f"set it below {most:g}"
    )


def _budgets_of(store: Store, population: str) -> dict[str, Budget]:
    """A population's own budget, and that of each of its clients' examples, where they have one; else that of one
    client's."""
    budgets = store.find_budgets([population, population + EACH_CLIENT])
    if population + EACH_CLIENT not in budgets:
        budgets |= store.find_budgets(list(store.clients_of(population))[:1])
    return budgets


def _check_pays(federation: Federation, owner: str, budgets: Mapping[str, Budget]) -> None:
    """Raises `ConfigError` when a run learns from data of `owner`, and is not charged to what budgets that has."""
    config = federation.config
    if federation.data.public:
        raise ConfigError(
            f"data {config.data.kind} are declared public, and belong to population {owner!r}, which has a budget",
            hint=f"use population: {owner}, and declare them private",
        )
    if owner in budgets and not federation.is_charged:
        which = "privacy.kind is none" if federation.central is None else "privacy.simulate_noise_cohort is set"
        raise ConfigError(_why_not(owner, "", which), hint=f"use population: {owner}, with privacy.kind central")
    if any("/" in name for name in budgets) and federation.example_level is None:
        raise ConfigError(
            _why_not(owner, " for each client's examples", "training.privacy.kind is none"),
            hint=f"use population: {owner}, with training.privacy.kind example_level",
        )


def _why_not(owner: str, which: str, why: str) -> str:
    return (
        f"population {owner!r} has a privacy budget{which} and this run would not be charged to it ({why}): its model "
        "would give away what the budget is there to keep"
    )


def _terms_of(federation: Federation) -> dict[str, BudgetTerms]:
    """The terms under which a run's epsilons are told, by the population that pays. Nothing limits what demonstrations
    come to together."""
    central, name, found = federation.central, federation.config.population, {}
    if central is not None and federation.is_charged:
        found[name] = _terms(federation, central.delta, central.unit, neighbouring_of(federation.sampling))
    if federation.example_level is not None:
        found[name + EACH_CLIENT] = example_terms(federation)
    return found


def example_terms(federation: Federation) -> BudgetTerms:
    """Those of each client's own examples."""
    assert federation.example_level is not None
    return _terms(federation, federation.example_level.delta, UNIT, NEIGHBOURING)


def _terms(federation: Federation, delta: float, unit: str, neighbouring: Neighbouring) -> BudgetTerms:
    return BudgetTerms(
        epsilon=None,
        delta=delta,
        unit=unit,
        neighbouring=neighbouring,
        accountant=NAME,
        demonstration=federation.data.public,
    )


@dataclass(frozen=True, slots=True)
class Spending:
    """What a run and its population have come to. `remaining` is None where nothing limits the population."""

    run: PrivacySpend
    population: float
    remaining: float | None


def spending(budget: Budget, run_spent: Mapping[str, int]) -> Spending:
    """The epsilons of a run and of its population, by the terms of the population's budget."""
    population = epsilon_of(budget.spent, budget)
    run = PrivacySpend(epsilon_of(run_spent, budget), budget.delta, budget.unit, budget.neighbouring, budget.accountant)
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


@dataclass(frozen=True, slots=True)
class ExampleSpending:
    """What the clients of a run have come to, each for its own examples.

    Args:
      run: the largest epsilon of the run at a client.
      population: the largest of a client by all its runs.
      remaining: the least that a client has left; None where nothing limits any.
      clients: each client's epsilon of the run, by its id; None above `MAX_SHOWN` clients.
    """

    run: PrivacySpend
    population: float
    remaining: float | None
    clients: Mapping[str, float] | None


def example_spending(store: Store, run: RunRecord) -> ExampleSpending | None:
    """None where no client answers for its examples, or none has paid yet."""
    totals = store.example_totals(run.run_id)
    if not totals.of_run or not totals.budgets:
        return None
    terms = totals.budgets[0]
    epsilon = max(epsilon_of(spent, terms) for spent in totals.of_run)
    left = [each.epsilon - epsilon_of(each.spent, each) for each in totals.budgets if each.epsilon is not None]
    clients = None
    if totals.num_clients <= MAX_SHOWN:
        by_client = store.example_spending(run.run_id)
        clients = {
            name.removeprefix(of_client(run.population, "")): epsilon_of(spent, terms)
            for name, spent in sorted(by_client.items())
        }
    return ExampleSpending(
        PrivacySpend(epsilon, terms.delta, terms.unit, terms.neighbouring, terms.accountant),
        max(epsilon_of(each.spent, each) for each in totals.budgets),
        max(0.0, min(left)) if left else None,
        clients,
    )


def epsilon_of(spent: Mapping[str, int], budget: BudgetTerms) -> float:
    """What these events come to, by the terms of a budget."""
    return _cached_epsilon(tuple(sorted(spent.items())), as_neighbouring(budget.neighbouring), budget.delta)


@lru_cache(10_000)  # most clients have spent the same
def _cached_epsilon(spent: tuple[tuple[str, int], ...], neighbouring: Neighbouring, delta: float) -> float:
    return rdp_epsilon(events_of(dict(spent)), neighbouring, delta)
