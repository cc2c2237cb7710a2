"""What was promised and what was spent: the functions behind `fedrounds privacy`."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from fedrounds.deployments.account import account_name
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import BudgetNotSet, ConfigError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Budget, BudgetTerms, Store

REASON: Final = "--reason 'who decided it, and why': it is kept in the journal"


def status(population: str | None = None) -> list[dict[str, Any]]:
    """Return each account's budget, what is spent of it, and by which runs.

    Of one that is named, each run's epsilon by privacy loss distributions as well.

    POPULATION/CLIENT is the account of one client, and POPULATION/* lists those of all clients; without a name all
    clients of a population are one entry, with the largest epsilon of any. Raises `BudgetNotSet` for one that has none.
    """
    with Store.open() as store:
        if population is None:
            budgets = store.ledger.budgets()
            return [
                _all_clients(store, each, _clients_of(budgets, account))
                if account.is_template
                else _status(store, each)
                for account, each in budgets.items()
                if account.client is None or account.is_template
            ]
        account = Account.parse(population)
        _check_known(store, account)
        budgets = store.ledger.budgets()
        if account.is_template:
            clients = _clients_of(budgets, account)
            return [_all_clients(store, budgets[account], clients), *(_status(store, each) for each in clients)]
        return [_status(store, budgets[account], tightest=True)]


def _check_known(store: Store, account: Account) -> None:
    """Raise `BudgetNotSet` for an account that has no budget."""
    from fedrounds.fl_components.store.accounts import unregistered_error

    if store.ledger.budget(account) is not None:
        return
    if store.ledger.budget(account.template) is None:
        raise unregistered_error(account)
    raise BudgetNotSet(
        f"population {str(account)!r} has no privacy budget, but the examples of its clients have"
        if account.client is None
        else f"population {str(account)!r} has no privacy budget: no client of that name has taken part",
        hint=f"`fedrounds privacy status {shlex.quote(str(account.template))}` lists the clients that have one",
    )


def _clients_of(budgets: Mapping[Account, Budget], template: Account) -> list[Budget]:
    return [
        each
        for account, each in budgets.items()
        if account.client is not None and account.template == template != account
    ]


def _all_clients(store: Store, terms: Budget, clients: Sequence[Budget]) -> dict[str, Any]:
    """Return the entry of the client that has spent most, for all of them, and beside it the one that has the least
    left. The limit is that of clients that have none of their own."""
    from fedrounds.fl_components.reports.statement import unclaimed_runs

    entries = [_terms(each) for each in clients]
    most = max(entries, key=lambda each: each["epsilon"], default=_terms(terms))
    limited = [each for each in entries if each["epsilon_remaining"] is not None]
    least_left = min(limited, key=lambda each: each["epsilon_remaining"], default=None)
    shown = ("population", "epsilon", "epsilon_limit", "epsilon_remaining")
    return most | {
        "population": str(terms.account),
        "epsilon_limit": terms.epsilon,
        "epsilon_remaining": terms.epsilon if least_left is None else least_left["epsilon_remaining"],
        "clients": len(clients),
        "least_left": None if least_left is None else {name: least_left[name] for name in shown},
        "runs": [],
        "unclaimed_runs": unclaimed_runs(store, terms.account, terms.unit),
    }


def _status(store: Store, budget: Budget, *, tightest: bool = False) -> dict[str, Any]:
    from fedrounds.fl_components.reports import epsilon_of, tightest_epsilon
    from fedrounds.fl_components.reports.statement import unclaimed_runs

    spent = store.ledger.spent_by_run(budget.account)
    return _terms(budget) | {
        "clients": None,
        "least_left": None,
        "unclaimed_runs": unclaimed_runs(store, budget.account, budget.unit),
        "runs": [
            {
                "run_id": run.run_id,
                "name": run.name,
                "state": run.state,
                "rounds": run.committed_round,
                "epsilon": epsilon_of(spent[run.run_id], budget),
                "epsilon_tightest": tightest_epsilon(budget, spent[run.run_id]) if tightest else None,
            }
            for run in store.runs(deleted=True)
            if run.run_id in spent
        ],
    }


def _terms(budget: Budget) -> dict[str, Any]:
    from fedrounds.fl_components.reports import epsilon_of, remaining

    return {
        "population": str(budget.account),
        "epsilon": epsilon_of(budget.spent, budget),
        "epsilon_limit": budget.epsilon,
        "epsilon_remaining": remaining(budget),
        "delta": budget.delta,
        "unit": budget.unit,
        "neighbouring": budget.neighbouring,
        "accountant": budget.accountant,
        "demonstration": budget.demonstration,
        "events": [{"event": json.loads(text), "count": count} for text, count in budget.spent.items()],
    }


def set_budget(
    population: str,
    *,
    epsilon: float,
    reason: str,
    delta: float | None = None,
    unit: str | None = None,
    neighbouring: str | None = None,
) -> dict[str, Any]:
    """Register a population, or change what it may spend; what is not given stays as it is.

    POPULATION/CLIENT is the budget of one client's examples, and POPULATION/* that of each of its clients, those that
    are known and those to come. A demonstration on public data becomes a private population, and what it has spent
    stays on its account. The reason and the account that gave it are journalled. Raises `ConfigError`, for instance for
    a client that none of the population's runs has had; before its first run any name is taken.
    """
    from fedrounds.fl_components.privacy.accountants import NAME
    from fedrounds.fl_components.privacy.claim import Unit
    from fedrounds.fl_components.privacy.events import Neighbouring
    from fedrounds.fl_components.privacy.example_level import NEIGHBOURING

    if not reason.strip():
        raise ConfigError("no reason is given", hint=REASON)
    if not 0 <= epsilon < math.inf:
        raise ConfigError(f"epsilon is {epsilon:g}", hint="give a number of 0 or more")
    _check_name(population)
    account = Account.parse(population)
    of_client = account.client is not None
    with Store.open() as store:
        template = store.ledger.budget(account.template) if of_client else None
        if of_client and not account.is_template:
            _check_client(store, account, template)
        before = store.ledger.budget(account) or template  # what is not said of one client is as for each
        unit = unit or (before.unit if before and of_client else "example" if of_client else "client")
        units = "examples" if unit == "example" else "clients"
        if before is None and delta is None:
            raise ConfigError(
                f"population {population!r} is new and delta is not given",
                hint=f"--delta D, smaller than one over its number of {units}",
            )
        terms = BudgetTerms(
            epsilon=epsilon,
            delta=delta if delta is not None else before.delta,  # type: ignore[union-attr]
            unit=unit,
            neighbouring=neighbouring
            or (before.neighbouring if before else NEIGHBOURING if of_client else "add_or_remove"),
            accountant=before.accountant if before else NAME,
            demonstration=False,
        )
        if not 0 < terms.delta < 1:
            raise ConfigError(f"delta is {terms.delta:g}", hint="give a number between 0 and 1")
        for name, known in (("unit", get_args(Unit)), ("neighbouring", get_args(Neighbouring))):
            if getattr(terms, name) not in known:
                raise ConfigError(f"{name} is {getattr(terms, name)!r}; known are {', '.join(known)}")
        if terms.unit == "example" and not of_client:
            raise ConfigError(
                f"the unit of population {population!r} cannot be {terms.unit}",
                hint="examples have budgets by client: POPULATION/CLIENT, or 'POPULATION/*' for each; clients have "
                "POPULATION",
            )
        if terms.unit == "example" and terms.neighbouring != NEIGHBOURING:
            raise ConfigError(
                f"neighbouring is {terms.neighbouring} for examples", hint=f"leave it out: it is {NEIGHBOURING}"
            )
        budget = store.ledger.set_budget(account, terms, reason=reason, by=account_name())
        store.anchor()
        if account.is_template:
            return _all_clients(store, budget, _clients_of(store.ledger.budgets(), account))
        return _status(store, budget)


def _check_client(store: Store, account: Account, template: Budget | None) -> None:
    """Raise `ConfigError` for one client of a demonstration, and for a client that is not among those known."""
    if template is not None and template.demonstration:
        raise ConfigError(
            f"population {str(template.account)!r} is a demonstration on public data",
            hint=f"`fedrounds privacy budget set '{template.account}' --epsilon E --reason ...` makes it private; "
            "then set the budget of one client",
        )
    named = store.ledger.named_accounts(account.population)
    with_budgets = {str(each.client): is_named for each, is_named in named.items() if not each.is_template}
    taken_part = store.memberships.clients(account.population)
    taken_part |= {client for client, is_named in with_budgets.items() if not is_named}
    known = sorted(taken_part | with_budgets.keys())
    client = str(account.client)
    if taken_part and client not in known:
        by_case = [name for name in known if name.casefold() == client.casefold()]
        close = by_case or difflib.get_close_matches(client, known, n=3, cutoff=0.5) or known[:10]
        raise ConfigError(
            f"population {account.population!r} has no client {client!r}",
            hint=f"{'close names are' if len(close) < len(known) else 'its clients are'} {', '.join(close)}; names are "
            "those of the data, upper and lower case included",
        )


def _check_name(population: str) -> None:
    """Raises `ConfigError` for what can be no population's name, nor that of one client's or each client's examples."""
    from fedrounds.fl_components.config import NAME
    from fedrounds.fl_components.data.client_ids import CLIENT_ID

    account = Account.parse(population)
    base, client = account.population, account.client
    if not re.fullmatch(NAME, base) or len(base) > 100:
        raise ConfigError(
            f"{base!r} cannot be a population's name",
            hint="a name has at most 100 letters, digits, '_', '.' and '-', and begins with a letter or a digit",
        )
    if client is not None and not account.is_template and not CLIENT_ID.fullmatch(client):
        raise ConfigError(
            f"{client!r} cannot be a client of population {base!r}",
            hint=f"{base}/CLIENT names one client, and '{base}/*' each of them",
        )


def ledger(population: str) -> list[dict[str, Any]]:
    """The charges of a population in the order in which they were reserved.

    Before them, in the state "unclaimed", stand the runs on its data that no charge stands for: `round` is then how
    many rounds they have committed. Raises `BudgetNotSet` for a population that has no budget, and `ConfigError` for
    POPULATION/*, since each client has a ledger of its own.
    """
    from fedrounds.fl_components.reports.statement import unclaimed_runs

    account = Account.parse(population)
    with Store.open() as store:
        _check_known(store, account)
        if account.is_template:
            raise ConfigError(
                f"{population!r} stands for all clients, and each has a ledger of its own",
                hint=f"`fedrounds privacy ledger {population[:-1]}CLIENT`; `fedrounds privacy status "
                f"{shlex.quote(population)}` lists the clients",
            )
        unit = store.ledger.budgets([account])[account].unit
        deleted = {run.run_id for run in store.runs(deleted=True) if run.state == RunState.DELETED}
        unclaimed = [
            {
                "run_id": run["run_id"],
                "run_deleted": run["deleted"],
                "round": run["rounds"],
                "collection": None,
                "event": None,
                "state": "unclaimed",
                "reserved_at": None,
                "began_at": run["began_at"],
            }
            for run in unclaimed_runs(store, account, unit)
        ]
        return unclaimed + [
            {
                "run_id": charge.run_id,
                "run_deleted": charge.run_id in deleted,
                "round": charge.round,
                "collection": charge.collection,
                "event": charge.event,
                "state": charge.state,
                "reserved_at": charge.reserved_at,
                "began_at": None,
            }
            for charge in store.ledger.charges(account)
        ]


def statement(run: str) -> dict[str, Any]:
    """The privacy statement of a run. Raises `RunNotFound`."""
    from fedrounds.fl_components.reports.statement import markdown, statement

    with Store.open() as store:
        found = statement(store, store.run(run))
    return found | {"markdown": markdown(found)}


def void(run: str, *, reason: str) -> dict[str, Any]:
    """Give back what a run that stopped has reserved for a round of which nothing came.

    Raises `RunNotFound`; `ConfigError` when nothing is reserved; `StoreError` when the round is sealed or has failed;
    `LeaseHeld` when a process works on it.
    """
    if not reason.strip():
        raise ConfigError("no reason is given", hint=REASON)
    with Store.open() as store:
        with store.acquire(run) as lease:
            round = lease.void(reason, by=account_name())
        if round is None:
            raise ConfigError(f"run {run} has nothing reserved", hint="`fedrounds privacy ledger` shows what is")
        store.anchor()
        return {"run_id": run, "round": round, "population": store.run(run).population}


def audit(run: str, *, num_canaries: int = 1000, plot: str | Path | None = None) -> dict[str, Any]:
    """Measure how much noise the mechanism of a run (or of an experiment's newest) really adds, as the Prefect flow
    `privacy-audit`.

    No training example of the run's clients takes part, and nothing is charged. Raises `RunNotFound`, `ConfigError` for
    a run without a claim and for too few canaries (in both cases before a flow run starts), `Unreachable`.
    """
    from fedrounds.deployments.stack.connection import client_settings, connect
    from fedrounds.tasks.audit import auditable_run

    with Store.open() as store:
        auditable_run(store, run, num_canaries)
    with connect() as connection:
        from fedrounds.fl_components.privacy.audit import AuditReport
        from fedrounds.flows.audit import privacy_audit

        connection.wait()
        with client_settings(connection):
            state = privacy_audit(run, num_canaries, return_state=True)
            found: Any = state.result(raise_on_failure=state.name != "ClaimViolated")
    if plot is not None:
        from fedrounds.deployments.cli.plots import draw_audit

        draw_audit([AuditReport(**{name: found[name] for name in AuditReport.__slots__})], Path(plot))
    return dict(found)
