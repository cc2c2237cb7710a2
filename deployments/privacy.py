"""What was promised and what was spent: the functions behind `fedrounds privacy`."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from fedrounds.deployments.account import account_name
from fedrounds.fl_components.account import Account
from fedrounds.fl_components.errors import BudgetNotSet, ConfigError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Budget, BudgetTerms, Store

if TYPE_CHECKING:
    from fedrounds.fl_components.config import FederationConfig

REASON: Final = "--reason 'who decided it, and why': it is kept in the journal"


def status(population: str | None = None) -> list[dict[str, Any]]:
    """Return each account's budget, what is spent of it, and by which runs; of one that is named, each run's epsilon by
    privacy loss distributions as well.

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
    from fedrounds.fl_components.data.federated import CLIENT_ID

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


def audit(run: str, *, num_canaries: int = 1000, picture: str | Path | None = None) -> dict[str, Any]:
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
        from fedrounds.fl_components.privacy.example_audit import ExampleAuditReport
        from fedrounds.flows.audit import privacy_audit

        connection.wait()
        with client_settings(connection):
            state = privacy_audit(run, num_canaries, return_state=True)
            found: Any = state.result(raise_on_failure=state.name != "Accused")
    if picture is not None:
        from fedrounds.deployments.cli.picture import draw_audit

        kind = AuditReport if "epsilon_interval" in found else ExampleAuditReport
        draw_audit([kind(**{name: found[name] for name in kind.__slots__})], Path(picture))
    return dict(found)


def plan(
    config: str,
    overrides: Sequence[str] = (),
    *,
    epsilon: float,
    unit: Literal["client", "example"] = "client",
    picture: str | Path | None = None,
) -> dict[str, Any]:
    """Return what keeps `epsilon` with this configuration: never less private than asked. Raises `ConfigError`.

    For clients, `choices` has the noise for its rounds and cohort, the rounds for its noise and cohort, and the cohort
    for its noise and rounds, each with the curve of epsilon by round. For examples, `clients` has for each client the
    noise that it needs, the epsilon of the configured noise, and the rounds for which that is enough; the clients with
    the fewest rows come first, at most `MAX_SHOWN`, since the same noise weighs more on a smaller batch.
    """
    from fedrounds.fl_components.config import load_config, source_folder

    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon is {epsilon:g}", hint="give a number above 0")
    if unit == "example" and picture is not None:
        raise ConfigError("--picture draws no plan for examples", hint="leave it out; --json has the numbers")
    resolved, folder = load_config(config, overrides), str(source_folder(config))
    found = _plan_examples(resolved, folder, epsilon) if unit == "example" else _plan_clients(resolved, folder, epsilon)
    if picture is not None:
        from fedrounds.deployments.cli.picture import draw_plan

        draw_plan(found, Path(picture))
    return {"name": resolved.name, "epsilon": epsilon, **found}


def _plan_clients(config: FederationConfig, folder: str, epsilon: float) -> dict[str, Any]:
    from fedrounds.fl_components.privacy.central import MIN_NOISE
    from fedrounds.fl_components.privacy.events import Event
    from fedrounds.fl_components.privacy.planning import PlannedAccount, choices, curve
    from fedrounds.fl_components.server.hub import assembled_for_a_look
    from fedrounds.fl_components.values import Sampling

    central = config.central
    if central is None:
        about_examples = ", or plan for the examples with --example-level" * config.training.privacy.claims
        raise ConfigError(
            "there is nothing to plan: privacy.kind is none", hint=f"set privacy.kind to central{about_examples}"
        )
    num_clients = config.data.known_num_clients() or assembled_for_a_look(config, folder).data.num_clients
    sampling = config.sampling(num_clients)

    def event(noise: float, rate: float) -> Event:
        drawn = sampling if rate == sampling.rate else Sampling(sampling.kind, num_clients, rate * num_clients, rate)
        return central.model_copy(update={"noise_multiplier": noise}).event(drawn)

    account = PlannedAccount(
        event,
        central.noise_multiplier,
        sampling.rate,
        config.rounds,
        units=num_clients,
        neighbouring=central.neighbouring(sampling),
        delta=central.delta,
        min_noise=MIN_NOISE,
        rate_is_free=sampling.kind == "poisson",
    )
    found = []
    for each in choices(account, epsilon):
        cohort_size = sampling.cohort_size if each.sampling_rate == sampling.rate else each.sampling_rate * num_clients
        found.append(
            {
                "free": each.free,
                "noise_multiplier": each.noise_multiplier,
                "rounds": each.rounds,
                "cohort_size": cohort_size,
                "epsilon": each.epsilon,
                "noise_on_the_mean": each.noise_multiplier / cohort_size,
                "curve": [list(point) for point in curve(account, each)],
            }
        )
    return {"delta": central.delta, "neighbouring": account.neighbouring, "choices": found}


def _plan_examples(config: FederationConfig, folder: str, epsilon: float) -> dict[str, Any]:
    from fedrounds.fl_components.privacy.calibration import MAX_NOISE
    from fedrounds.fl_components.privacy.example_level import NEIGHBOURING
    from fedrounds.fl_components.privacy.planning import PlannedAccount, choices
    from fedrounds.fl_components.reports.privacy import MAX_SHOWN
    from fedrounds.fl_components.server.hub import assembled_for_a_look

    rule, rounds = config.training.example_level, config.rounds
    if rule is None:
        raise ConfigError(
            "there is nothing to plan for the examples: training.privacy.kind is none",
            hint="set training.privacy.kind to example_level",
        )
    steps, delta = config.training.private_steps, rule.delta
    configured = rule.noise(rounds * steps)
    uncut = rule.model_copy(update={"max_batch_size": None})  # cut batches may be more than the configured noise pays
    loaded = config.model_copy(update={"training": config.training.model_copy(update={"privacy": uncut})})
    data = assembled_for_a_look(loaded, folder).data
    rows = sorted((data.num_examples(client), data.client_ids[client]) for client in range(data.num_clients))

    @cache
    def planned(num_examples: int) -> tuple[float, float, int]:
        """The noise that is needed, the epsilon of the configured one, and the rounds that it is enough for."""
        account = PlannedAccount(
            lambda noise, rate: rule.event(num_examples, steps, noise),
            configured,
            rule.sampling_rate,
            rounds,
            units=num_examples,
            neighbouring=NEIGHBOURING,
            delta=delta,
        )
        by_free = {each.free: each for each in choices(account, epsilon)}
        enough = by_free["rounds"].rounds if "rounds" in by_free else 0
        return by_free["noise"].noise_multiplier, by_free["as configured"].epsilon, enough

    most, largest = rows[-1]
    if rule.max_batch_size is not None and rule.epsilon(most, rounds * steps, MAX_NOISE / 2) > epsilon:
        least = rule.least_max_batch_size(most, rounds * steps, MAX_NOISE / 2, epsilon)
        if least is not None:
            raise ConfigError(
                f"no noise keeps an epsilon of {epsilon:g} at a delta of {delta:g}: training.privacy.max_batch_size is "
                f"{rule.max_batch_size}, and client {largest!r} with its {most} training examples would have batches "
                "cut too often",
                hint=f"make training.privacy.max_batch_size at least {least}, or leave it out",
            )
    cut = rule.max_batch_size is not None  # else the number of rows changes nothing but how much the noise weighs
    clients = []
    for num_examples, client_id in rows[:MAX_SHOWN]:
        noise, comes_to, enough = planned(num_examples if cut else 1)
        batch = rule.sampling_rate * num_examples
        clients.append(
            {
                "client": client_id,
                "examples": num_examples,
                "batch": batch,
                "noise_multiplier": noise,
                "noise_on_the_mean": noise / batch,
                "configured_epsilon": comes_to,
                "configured_rounds": enough,
            }
        )
    return {
        "delta": delta,
        "unit": "example",
        "neighbouring": NEIGHBOURING,
        "sampling_rate": rule.sampling_rate,
        "steps": steps,
        "rounds": rounds,
        "configured_noise_multiplier": configured,
        "num_clients": data.num_clients,
        "clients": clients,
    }
