"""A run's privacy claims against the budgets of its accounts: which terms they need, what a round charges, and when it
would cost too much. All claims take the same path."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import BudgetExhausted, ConfigError
from fedrounds.fl_components.privacy import Claim
from fedrounds.fl_components.privacy.accountants import NAME
from fedrounds.fl_components.privacy.claim import ClaimRound
from fedrounds.fl_components.reports import epsilon_of
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.server.ownership import KeyedData, keyed, matches
from fedrounds.fl_components.store import Budget, BudgetTerms, Charges, Owners, Store
from fedrounds.fl_components.store.accounts import plus, unregistered_error
from fedrounds.fl_components.store.records import Events

PAGE: Final = 500
"""Clients whose budgets are read at a time."""


@dataclass(frozen=True)
class RunClaim:
    """A claim as a run makes it: its terms, what its rounds charge, and the guard of its accounts."""

    claim: Claim
    federation: Federation

    @property
    def account(self) -> Account:
        """The account that holds the terms of the claim."""
        return self.claim.account(self.federation.config.population)

    @property
    def is_paid_by_clients(self) -> bool:
        """Whether each client has an account of its own."""
        return self.account.is_template

    @cached_property
    def terms(self) -> BudgetTerms:
        """The terms under which the epsilons of this claim are stated. Nothing limits demonstrations together."""
        return BudgetTerms(
            epsilon=None,
            delta=self.claim.delta,
            unit=self.claim.unit,
            neighbouring=self.claim.neighbouring(self.federation.sampling),
            accountant=NAME,
            demonstration=self.federation.population.is_public,
        )

    def charges(self, indices: Iterable[int]) -> Charges:
        """Return what a round costs if the clients of these indices may be charged."""
        config, population = self.federation.config, self.federation.population
        indices = indices if self.is_paid_by_clients else ()  # else the cost would follow the population
        round = ClaimRound(
            population=config.population,
            sampling=self.federation.sampling,
            clients={population.client_ids[index]: population.num_examples(index) for index in indices},
            steps=config.claimed_steps,
            rounds=config.rounds,
        )
        events = {account: event.model_dump() for account, event in self.claim.charges(round).items()}
        return Charges(events, self.guard, self.least if self.claim.skips_exhausted else len(events))

    @property
    def least(self) -> int:
        """How many clients must be able to pay where a round can be made without the others."""
        return max(1, self.federation.config.selection.min_updates)

    def guard(self, budget: Budget, by_all: Events, by_run: Events) -> None:
        """Raise `BudgetExhausted` when what will have been spent passes the limit of the account or of the run, and
        `ConfigError` when the run's epsilons do not mean what the account's budget means."""
        check_terms(budget.account, self.terms, budget)
        check_demonstration(self.federation, budget)
        check_limits(budget, by_all, by_run, self.claim.limit)

    def can_skip_round(self, store: Store) -> bool:
        """Return whether a round whose cohort cannot pay is made with no client, since enough of all clients can pay:
        other rounds draw others. The clients are read until that many can."""
        if not self.claim.skips_exhausted:
            return False
        size, num_payers = self.federation.population.size, 0
        template = store.ledger.budgets([self.account])[self.account]
        for first in range(0, size, PAGE):
            events = self.charges(range(first, min(first + PAGE, size))).events
            budgets = store.ledger.budgets(events)
            for account, event in events.items():
                budget = budgets.get(account, template)  # a client that never took part has spent nothing
                try:
                    self.guard(budget, plus(budget.spent, event), {})
                except BudgetExhausted:
                    continue
                num_payers += 1
                if num_payers == self.least:
                    return True
        return False


def run_claims(federation: Federation) -> tuple[RunClaim, ...]:
    """Return the claims of a run that its rounds are charged for."""
    return tuple(RunClaim(claim, federation) for claim in federation.config.charged_claims)


def check_limits(budget: Budget, by_all: Events, by_run: Events, run_limit: float | None = None) -> None:
    """Raise `BudgetExhausted` when what all runs have spent of an account passes its budget, or when what this run has
    spent of it passes the run's own limit."""
    epsilon, account = epsilon_of(by_all, budget), budget.account
    whose = f"population {str(account)!r}"
    if account.client is not None:
        whose = "the examples of " * (budget.unit == "example") + f"client {str(account)!r}"
        if not math.isfinite(epsilon):
            raise BudgetExhausted(
                f"after the next round no epsilon would hold for {whose} at delta {budget.delta:g}: too many of its "
                "batches would have been cut",
                hint="begin another run with a larger training.privacy.max_batch_size, or without it",
            )
    raise_it = f"`fedrounds privacy budget set {shlex.quote(str(account))} --epsilon E --reason ...`"
    for payer, limit, spent, hint in (
        (whose, budget.epsilon, by_all, f"an administrator may raise it: {raise_it}"),
        ("this run", run_limit, by_run, "another run may go on from its model, within the same budget"),
    ):
        if limit is not None and not (epsilon := epsilon_of(spent, budget)) <= limit:
            raise BudgetExhausted(
                f"the next round would bring {payer} to an epsilon of {epsilon:.4g} at delta {budget.delta:g}, and the "
                f"limit is {limit:g}",
                hint=hint,
            )


def check_terms(account: Account, terms: BudgetTerms, budget: Budget) -> None:
    """Raise `ConfigError` when a run's epsilons would not mean what its account's budget means."""
    ours = {name: getattr(terms, name) for name in ("delta", "unit", "neighbouring", "accountant")}
    differing = [
        f"{name} is {value}, its budget's is {getattr(budget, name)}"
        for name, value in ours.items()
        if getattr(budget, name) != value
    ]
    if differing:
        raise ConfigError(
            f"this run and the budget of population {str(account)!r} do not speak of the same epsilon: "
            f"{'; '.join(differing)}",
            hint="set training.privacy.delta as the budget says"
            if terms.unit == "example"
            else "set privacy.delta, and the selection (poisson: add_or_remove; a fixed cohort: replace_one; everyone: "
            "zero_out), as the budget says",
        )


def check_population(store: Store, federation: Federation) -> KeyedData | None:
    """See that what a run learns from its clients would be paid for: that its accounts have budgets on the same terms,
    and that these data are no other population's. Changes nothing but for the first key of fingerprints.

    Returns the digests of the data, or None where they need not be remembered. Raises `BudgetNotSet` when there is no
    budget for private data, `StoreError` when this home lacks a key, and `ConfigError` when the budget is another
    one's, or the run would draw on a population's data without being charged.
    """
    config, public = federation.config, federation.population.is_public
    store.memberships.check_keys()
    well_known = public and config.data.is_well_known
    data, clients, claims = None, federation.clients, run_claims(federation)
    if clients is not None and (not well_known or not store.memberships.is_empty()):
        every_client = any(each.account.is_template for each in claims)
        fingerprints = clients.fingerprints(every_client=every_client)
        data = keyed(fingerprints, store.memberships.fingerprint_key())
    _check_owners(store, federation, data, store.memberships.owners(data.digests()) if data is not None else {})
    budgets = _budgets_of(store, config.population)
    for each in claims:
        budget = budgets.get(each.account)
        if budget is None and not public:
            raise unregistered_error(each.account, each.claim.unit)
        if budget is not None:
            check_terms(each.account, each.terms, budget)
            check_demonstration(federation, budget)
        if each.account.is_template and not public:
            _check_named_budgets(store, federation)
    return None if well_known else data


def check_demonstration(federation: Federation, budget: Budget) -> None:
    """Raise `ConfigError` when the budget is a demonstration on public data and these are private, or the other way
    round."""
    public = federation.population.is_public
    if budget.demonstration != public:
        budgets, data = ("a demonstration on public data", "private") if budget.demonstration else ("private", "public")
        raise ConfigError(
            f"population {str(budget.account)!r} is {budgets}, and data {federation.config.data.kind} are {data}",
            hint="name another population"
            + (
                ", or have an administrator set a budget for this one: `fedrounds privacy budget set "
                f"{shlex.quote(str(budget.account))} --epsilon E --reason ...`"
            )
            * (not public),
        )


def _check_owners(store: Store, federation: Federation, data: KeyedData | None, owners: Owners) -> None:
    """Raise `ConfigError` where the data, or those of one client, belong to another population or another client, or
    would be used without being charged to their population."""
    public, name, claims = federation.population.is_public, federation.config.population, run_claims(federation)
    found = matches(data, owners) if data is not None else set()
    populations = {match.population for match in found}
    if not public and any(not each.demonstration for each in _budgets_of(store, name).values()):
        populations.add(name)
    for owner in sorted(populations):
        _check_pays(federation, owner, _budgets_of(store, owner))
    if claims and populations - {name}:
        owner = min(populations - {name})
        raise ConfigError(
            f"data of population {name!r} belong to population {owner!r}, which has a budget of its own",
            hint=f"populations that share clients are one: use population: {owner}",
        )
    if any(each.account.is_template for each in claims) and not public:
        for match in sorted(found, key=lambda each: (each.client, each.owner)):
            if match.client and match.owner and match.client != match.owner:
                raise ConfigError(
                    f"the examples of client {str(Account(name, match.client))!r} are for the most part those of "
                    f"{str(Account(name, match.owner))!r}, which answers for them with a budget of its own",
                    hint="a client keeps its name, and its examples, in all runs on its population",
                )


def _check_named_budgets(store: Store, federation: Federation) -> None:
    """Raise `ConfigError` where a budget was set for a client by a name that differs from a client's by its spelling
    alone: the limit would apply to no client."""
    name = federation.config.population
    by_name = store.ledger.named_accounts(name)
    named = {str(account.client) for account, is_named in by_name.items() if is_named and not account.is_template}
    unused = named - set(federation.population.client_ids) - store.memberships.clients(name)
    by_spelling = {_spelling(client): client for client in federation.population.client_ids} if unused else {}
    for client in sorted(unused):
        if _spelling(client) in by_spelling:
            account = Account(name, by_spelling[_spelling(client)])
            raise ConfigError(
                f"a privacy budget is set for {str(Account(name, client))!r}, and the client's name is "
                f"{account.client!r}",
                hint="an administrator sets it for that name: `fedrounds privacy budget set "
                f"{shlex.quote(str(account))} --epsilon E --reason ...`; or give the client the other name",
            )


def _spelling(client: str) -> str:
    """Return a client's name without what is easily spelt in two ways.

    >>> _spelling("St. Mary-2") == _spelling("st_mary 2")
    True
    """
    return "".join(character for character in client.casefold() if character.isalnum())


def join_population(
    store: Store, federation: Federation, run_id: str, data: KeyedData | None, say: Callable[[str], None]
) -> None:
    """Record that the run uses these data, and bind them to the population of a run that `check_population` has let
    pass. Public data register a demonstration instead."""
    config, claims = federation.config, run_claims(federation)
    if data is not None:
        store.memberships.enter(
            run_id=run_id,
            name=config.name,
            population=config.population,
            units=[] if federation.population.is_public else sorted({each.claim.unit for each in claims}),
            digests=data.recorded,
            check=lambda owners: _check_owners(store, federation, data, owners),
        )
    if federation.population.is_public:
        for each in claims:
            if store.ledger.budget(each.account) is None:
                reason = f"a demonstration on public data ({config.data.kind}), as its first run was configured"
                store.ledger.set_budget(each.account, each.terms, reason=reason, by="fedrounds")
    for warning in delta_warnings(federation):
        say(warning)


def delta_warnings(federation: Federation) -> list[str]:
    """Return a sentence for each delta at which a mechanism that gives somebody's data away could claim as much."""
    num_clients, most = federation.population.size, int(federation.population.num_examples_n.max())
    warnings = []
    for claim in federation.config.charged_claims:
        units, name = (num_clients, "clients") if claim.unit == "client" else (most, "examples")
        if claim.delta > 1 / units:
            field = "privacy.delta" if claim is federation.config.privacy else "training.privacy.delta"
            warnings.append(
                f"{field} is {claim.delta:g}, more than one in {units} {name}: a mechanism that gives one of them away "
                f"could claim as much; set it below {1 / units:g}"
            )
    return warnings


def _budgets_of(store: Store, population: str) -> dict[Account, Budget]:
    """Return a population's own budget, and the terms of its clients' budgets, where they have one.

    Else the budget of one client.
    """
    account = Account(population)
    budgets = store.ledger.budgets([account, account.template])
    if account.template not in budgets:
        budgets |= store.ledger.budgets(list(store.ledger.named_accounts(population))[:1])
    return budgets


def _check_pays(federation: Federation, owner: str, budgets: Mapping[Account, Budget]) -> None:
    """Raise `ConfigError` when a run learns from data of `owner`, and is not charged to the budgets that it has."""
    config = federation.config
    if federation.population.is_public:
        raise ConfigError(
            f"data {config.data.kind} are declared public, and belong to population {owner!r}, which has a budget",
            hint=f"use population: {owner}, and declare them private",
        )
    accounts = [each.account for each in run_claims(federation)]
    if Account(owner) in budgets and all(each.is_template for each in accounts):
        which = (
            f"privacy.kind is {config.privacy.kind}"
            if config.central is None
            else "privacy.simulate_noise_cohort is set"
        )
        raise ConfigError(_why_not(owner, "", which), hint=f"use population: {owner}, with privacy.kind central")
    if any(each.client is not None for each in budgets) and not any(each.is_template for each in accounts):
        raise ConfigError(
            _why_not(owner, " for each client's examples", "training.privacy.kind is none"),
            hint=f"use population: {owner}, with training.privacy.kind example_level",
        )


def _why_not(owner: str, which: str, why: str) -> str:
    return (
        f"population {owner!r} has a privacy budget{which} and this run would not be charged to it ({why}): its model "
        "would give away what the budget is there to keep"
    )
