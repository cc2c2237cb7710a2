"""What a run has spent under its privacy claims.

One value, which all views render (metrics, JSON, tables, Prefect's page and the privacy statement).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.privacy import Claim
from fedrounds.fl_components.privacy.accountants import pld_epsilon, rdp_epsilon
from fedrounds.fl_components.privacy.events import Event, Neighbouring, as_neighbouring, parse_event
from fedrounds.fl_components.store import Budget, BudgetTerms, RunRecord, Store

MAX_SHOWN: Final = 100
"""Clients whose epsilons are listed one by one."""


@dataclass(frozen=True, slots=True)
class AccountReport:
    """What one account has spent.

    Args:
      epsilon: in this run.
      total: in all runs.
      limit: of the account's budget; None where there is none.
    """

    epsilon: float
    total: float
    limit: float | None


@dataclass(frozen=True, slots=True)
class ClaimReport:
    """What a run has spent under one claim. Where each client pays for itself, this is the largest of any client.

    Args:
      account: the account that holds the terms of the claim: the population's, or the template of its clients'.
      terms: the unit, the relation, delta and the accountant that give an epsilon its meaning.
      num_accounts: how many accounts have paid for the run.
      epsilon: the largest epsilon of the run at any of these accounts.
      total: the largest epsilon of any of these accounts in all runs.
      remaining: the least that any of these accounts has left; None where nothing limits one.
      clients: each client's account, by the client's id; None where the population pays, and above `MAX_SHOWN` clients.
    """

    account: Account
    terms: BudgetTerms
    num_accounts: int
    epsilon: float
    total: float
    remaining: float | None
    clients: Mapping[str, AccountReport] | None

    @property
    def metrics(self) -> dict[str, float]:
        """The report as metrics of a round; none before an account has paid."""
        if not self.num_accounts:
            return {}
        prefix = "privacy/" if self.terms.unit == "client" else f"privacy/{self.terms.unit}/"
        values = {"epsilon": self.epsilon, "epsilon_population": self.total}
        if self.remaining is not None:
            values["epsilon_remaining"] = self.remaining
        values |= {f"client/{client}": each.epsilon for client, each in (self.clients or {}).items()}
        return {prefix + name: value for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """What a run has spent, claim by claim: about clients before examples.

    Args:
      claims: one report for each claim that is charged.
      simulated: the epsilon of the larger cohort that the run simulates; it protects nobody. None where it does not.
    """

    claims: tuple[ClaimReport, ...]
    simulated: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The report as metrics of a round."""
        simulated = {} if self.simulated is None else {"privacy/epsilon_simulated": self.simulated}
        return {name: value for each in self.claims for name, value in each.metrics.items()} | simulated


def makes_claims(run: RunRecord) -> bool:
    """Return whether a run's configuration has a privacy claim."""
    rules = (run.config.get("privacy", {}), run.config.get("training", {}).get("privacy", {}))
    return any(rule.get("kind", "none") != "none" for rule in rules)


def privacy_report(
    store: Store, run: RunRecord, config: FederationConfig | None = None, *, rounds: int | None = None
) -> PrivacyReport:
    """Return what a run has spent, by the ledger; nothing where it makes no claim.

    Args:
      config: of the run, where it is parsed already.
      rounds: how many rounds a simulated epsilon is for; by default those that are committed.
    """
    if not makes_claims(run):
        return PrivacyReport(())
    config = config or parse_config(run.config)
    simulated = None
    for claim in config.claims_made:
        if not claim.is_charged:
            simulated = simulated_epsilon(config, run.engine["num_clients"], rounds or run.committed_round)
    return PrivacyReport(tuple(claim_report(store, run, each) for each in config.charged_claims), simulated)


def claim_report(store: Store, run: RunRecord, claim: Claim) -> ClaimReport:
    """Return what a run has spent under one claim, by the ledger."""
    account = claim.account(run.population)
    totals = store.ledger.totals(run.run_id, account)
    terms = store.ledger.budget(account)
    assert terms is not None
    budgets = totals.budgets or [terms]
    left = [each for each in map(remaining, budgets) if each is not None]
    clients = None
    if account.is_template and totals.num_accounts <= MAX_SHOWN:
        spent = {each: events for each, events in store.ledger.spent(run.run_id).items() if each.client is not None}
        by_account = store.ledger.budgets(spent)
        clients = {
            str(each.client): AccountReport(
                epsilon_of(spent[each], budget), epsilon_of(budget.spent, budget), budget.epsilon
            )
            for each, budget in by_account.items()
        }
    return ClaimReport(
        account=account,
        terms=terms.terms,
        num_accounts=totals.num_accounts,
        epsilon=max((epsilon_of(events, budgets[0]) for events in totals.spent), default=0.0),
        total=max(epsilon_of(each.spent, each) for each in budgets),
        remaining=min(left, default=None),
        clients=clients,
    )


def remaining(budget: Budget) -> float | None:
    """Return the epsilon that an account has left; None where nothing limits it."""
    return None if budget.epsilon is None else max(0.0, budget.epsilon - epsilon_of(budget.spent, budget))


def simulated_epsilon(config: FederationConfig, num_clients: int, rounds: int) -> float:
    """Return the epsilon of the larger cohort that a run simulates.

    With the same sampling rate of a larger population.
    """
    central = config.central
    assert central is not None and central.simulate_noise_cohort is not None
    sampling = config.sampling(num_clients)
    larger = central.simulate_noise_cohort / sampling.cohort_size
    scaled = replace(
        sampling,
        population_size=round(sampling.population_size * larger),
        cohort_size=central.simulate_noise_cohort,
    )
    return rdp_epsilon({central.event(scaled): rounds}, central.neighbouring(sampling), central.delta)


def events_of(spent: Mapping[str, int]) -> dict[Event, int]:
    """Return the store's count of events, {canonical JSON: how often}, as an accountant takes it."""
    return {parse_event(json.loads(text)): count for text, count in spent.items()}


def epsilon_of(spent: Mapping[str, int], terms: BudgetTerms) -> float:
    """Return the epsilon of these events by the terms of a budget."""
    return _cached_epsilon(tuple(sorted(spent.items())), as_neighbouring(terms.neighbouring), terms.delta)


@lru_cache(10_000)  # most clients have spent the same
def _cached_epsilon(spent: tuple[tuple[str, int], ...], neighbouring: Neighbouring, delta: float) -> float:
    return rdp_epsilon(events_of(dict(spent)), neighbouring, delta)


def tightest_epsilon(terms: BudgetTerms, spent: Mapping[str, int]) -> float | None:
    """Return the epsilon of a run for itself, by privacy loss distributions; None where they do not give one."""
    return _cached_pld_epsilon(tuple(sorted(spent.items())), as_neighbouring(terms.neighbouring), terms.delta)


@lru_cache(1_000)  # it takes up to seconds, and clients that took part in the same rounds have spent the same
def _cached_pld_epsilon(spent: tuple[tuple[str, int], ...], neighbouring: Neighbouring, delta: float) -> float | None:
    return pld_epsilon(events_of(dict(spent)), neighbouring, delta)
