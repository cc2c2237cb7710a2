"""A run's privacy claim against what it and its population have spent: epsilons, and when a round would cost too
much."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fl_components.config import FederationConfig
from fl_components.errors import BudgetExhausted, ConfigError
from fl_components.privacy import CentralPrivacy, PrivacySpend, neighbouring_of
from fl_components.privacy.accountants import NAME, rdp_epsilon
from fl_components.privacy.events import Event, as_neighbouring, parse_event
from fl_components.server.federation import Federation
from fl_components.store import Budget, BudgetTerms, Store
from fl_components.store.ledger import unregistered
from fl_components.values import Sampling


def events_of(spent: Mapping[str, int]) -> dict[Event, int]:
    """The store's count of events, {canonical JSON: how often}, as an accountant takes it."""
    return {parse_event(json.loads(text)): count for text, count in spent.items()}


def terms_of(privacy: CentralPrivacy, sampling: Sampling, *, demonstration: bool) -> BudgetTerms:
    """The terms under which a run's epsilons are told. Nothing limits what demonstrations come to together."""
    return BudgetTerms(
        epsilon=None,
        delta=privacy.delta,
        unit=privacy.unit,
        neighbouring=neighbouring_of(sampling),
        accountant=NAME,
        demonstration=demonstration,
    )


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
        if limit is not None and epsilon > limit:
            raise BudgetExhausted(
                f"the next round would bring {whose} to an epsilon of {epsilon:.4g} at delta {budget.delta:g}, and its "
                f"limit is {limit:g}",
                hint=hint,
            )


def prepare_population(store: Store, federation: Federation, say: Callable[[str], None]) -> None:
    """See that the population of a run that is charged has a budget, on the same terms, for these clients.

    Public data register a demonstration population. Raises `StoreError` when there is no budget for private data, and
    `ConfigError` when it is another one's.
    """
    if not federation.is_charged:
        return
    config, central = federation.config, federation.central
    assert central is not None
    terms = terms_of(central, federation.sampling, demonstration=federation.data.public)
    budget = store.find_budget(config.population)
    if budget is None and federation.data.public:
        reason = f"a demonstration on public data ({config.data.kind}), as its first run was configured"
        budget = store.set_budget(config.population, terms, reason=reason, by="fedrounds")
    if budget is None:
        raise unregistered(config.population)
    check_terms(config.population, terms, budget)
    if budget.demonstration and not federation.data.public:
        raise ConfigError(
            f"population {config.population!r} is a demonstration on public data, and data {config.data.kind} "
            "are private",
            hint="name another population, and have an administrator set its budget",
        )
    if not federation.data.public:
        store.bind_members(config.population, members_of(store, federation))
    num_clients = federation.data.num_clients
    if central.delta > 1 / num_clients:
        say(
            f"privacy.delta is {central.delta:g}, more than one in {num_clients} clients: a mechanism that gives one "
            f"of them away could claim as much; set it below {1 / num_clients:g}"
        )


def members_of(store: Store, federation: Federation) -> str:
    """What tells these clients' training data from others to this hub, and to nobody else anything."""
    code = hmac.new(store.keys.signing.secret, digestmod="sha256")
    data = federation.data
    for array in (data.x_train, data.y_train, data.train_rows.starts, data.train_rows.stops):
        code.update(np.ascontiguousarray(array).view(np.uint8).data)
    return code.hexdigest()


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
