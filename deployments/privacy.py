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
from typing import Any, Final

from fedrounds.deployments.account import account_name
from fedrounds.fl_components.errors import BudgetNotSet, ConfigError
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Budget, BudgetTerms, Store

POINTS: Final = 60  # of a curve
REASON: Final = "--reason 'who decided it, and why': it is kept in the journal"


def status(population: str | None = None) -> list[dict[str, Any]]:
    """Each population's budget, what is spent of it, and by which runs; of one that is named, each run's epsilon by
    privacy loss distributions as well.

    POPULATION/CLIENT is the budget of one client's examples, and POPULATION/* lists all clients'; without a name all
    clients of a population are one entry, with the largest epsilon of any. Raises `BudgetNotSet` for one that has none.
    """
    from fedrounds.fl_components.store.ledger import EACH_CLIENT

    with Store.open() as store:
        budgets = {each.population: each for each in store.budgets()}
        if population is None:
            found = []
            for name, budget in budgets.items():
                if name.endswith(EACH_CLIENT):
                    found.append(_all_clients(store, budget, _clients_of(budgets, name)))
                elif "/" not in name:
                    found.append(_status(store, budget))
            return found
        _check_known(store, population)
        if population.endswith(EACH_CLIENT):
            clients = _clients_of(budgets, population)
            return [_all_clients(store, budgets[population], clients), *(_status(store, each) for each in clients)]
        return [_status(store, budgets[population], tightest=True)]


def _check_known(store: Store, population: str) -> None:
    """Raises `BudgetNotSet` for a population, or a client, that has no budget."""
    from fedrounds.fl_components.store.ledger import EACH_CLIENT, unregistered_error

    if store.find_budget(population) is not None:
        return
    of_each = population.partition("/")[0] + EACH_CLIENT
    if store.find_budget(of_each) is None:
        raise unregistered_error(population)
    raise BudgetNotSet(
        f"population {population!r} has no privacy budget, but the examples of its clients have"
        if "/" not in population
        else f"population {population!r} has no privacy budget: no client of that name has taken part",
        hint=f"`fedrounds privacy status {shlex.quote(of_each)}` lists the clients that have one",
    )


def _clients_of(budgets: Mapping[str, Budget], population: str) -> list[Budget]:
    prefix = population.removesuffix("*")
    return [each for name, each in budgets.items() if name.startswith(prefix) and name != population]


def _all_clients(store: Store, terms: Budget, clients: Sequence[Budget]) -> dict[str, Any]:
    """The one that has spent most, for all, and beside it the one that has the least left. The limit is that of clients
    that have none of their own."""
    from fedrounds.fl_components.server.statement import unclaimed_runs

    told = [_terms(each) for each in clients]
    most = max(told, key=lambda each: each["epsilon"], default=_terms(terms))
    limited = [each for each in told if each["epsilon_remaining"] is not None]
    least_left = min(limited, key=lambda each: each["epsilon_remaining"], default=None)
    shown = ("population", "epsilon", "epsilon_limit", "epsilon_remaining")
    return most | {
        "population": terms.population,
        "epsilon_limit": terms.epsilon,
        "epsilon_remaining": terms.epsilon if least_left is None else least_left["epsilon_remaining"],
        "clients": len(clients),
        "least_left": None if least_left is None else {name: least_left[name] for name in shown},
        "runs": [],
        "unclaimed_runs": unclaimed_runs(store, terms.population, terms.unit),
    }


def _status(store: Store, budget: Budget, *, tightest: bool = False) -> dict[str, Any]:
    from fedrounds.fl_components.server.claim import epsilon_of
    from fedrounds.fl_components.server.statement import tightest_epsilon, unclaimed_runs
    from fedrounds.fl_components.store.ledger import decode_events

    of_client = store.spending_on(budget.population) if "/" in budget.population else None
    spent = {
        run.run_id: decode_events(run.spent) if of_client is None else of_client.get(run.run_id, {})
        for run in store.runs(deleted=True)
        if run.population == budget.population.partition("/")[0]
    }
    return _terms(budget) | {
        "clients": None,
        "least_left": None,
        "unclaimed_runs": unclaimed_runs(store, budget.population, budget.unit),
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
            if spent.get(run.run_id)
        ],
    }


def _terms(budget: Budget) -> dict[str, Any]:
    from fedrounds.fl_components.server.claim import spending

    told = spending(budget, {})
    return {
        "population": budget.population,
        "epsilon": told.population,
        "epsilon_limit": budget.epsilon,
        "epsilon_remaining": told.remaining,
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
    from fedrounds.fl_components.privacy.example_level import NEIGHBOURING, UNIT
    from fedrounds.fl_components.server.statement import RELATIONS_IN_WORDS, UNITS_IN_WORDS
    from fedrounds.fl_components.store.ledger import EACH_CLIENT

    if not reason.strip():
        raise ConfigError("no reason is given", hint=REASON)
    if not 0 <= epsilon < math.inf:
        raise ConfigError(f"epsilon is {epsilon:g}", hint="give a number of 0 or more")
    _check_name(population)
    of_examples = "/" in population
    with Store.open() as store:
        of_each = store.find_budget(population.partition("/")[0] + EACH_CLIENT) if of_examples else None
        if of_examples:
            _check_client(store, population, of_each)
        before = store.find_budget(population) or of_each  # what is not said of one client is as for each
        if before is None and delta is None:
            raise ConfigError(
                f"population {population!r} is new and delta is not given",
                hint=f"--delta D, smaller than one over its number of {'examples' if of_examples else 'clients'}",
            )
        terms = BudgetTerms(
            epsilon=epsilon,
            delta=delta if delta is not None else before.delta,  # type: ignore[union-attr]
            unit=unit or (UNIT if of_examples else "client"),
            neighbouring=neighbouring
            or (before.neighbouring if before else NEIGHBOURING if of_examples else "add_or_remove"),
            accountant=before.accountant if before else NAME,
            demonstration=False,
        )
        if not 0 < terms.delta < 1:
            raise ConfigError(f"delta is {terms.delta:g}", hint="give a number between 0 and 1")
        for name, known in (("unit", UNITS_IN_WORDS), ("neighbouring", RELATIONS_IN_WORDS)):
            if getattr(terms, name) not in known:
                raise ConfigError(f"{name} is {getattr(terms, name)!r}; known are {', '.join(known)}")
        if (terms.unit == UNIT) != of_examples:
            raise ConfigError(
                f"the unit of population {population!r} cannot be {terms.unit}",
                hint="examples have budgets by client: POPULATION/CLIENT, or 'POPULATION/*' for each; clients have "
                "POPULATION",
            )
        if of_examples and terms.neighbouring != NEIGHBOURING:
            raise ConfigError(
                f"neighbouring is {terms.neighbouring} for examples", hint=f"leave it out: it is {NEIGHBOURING}"
            )
        budget = store.set_budget(population, terms, reason=reason, by=account_name())
        store.anchor()
        if population.endswith(EACH_CLIENT):
            return _all_clients(
                store, budget, _clients_of({each.population: each for each in store.budgets()}, population)
            )
        return _status(store, budget)


def _check_client(store: Store, population: str, of_each: Budget | None) -> None:
    """Raises `ConfigError` for one client of a demonstration, and for a client that is not among those known."""
    base, _, client = population.partition("/")
    if client == "*":
        return
    if of_each is not None and of_each.demonstration:
        raise ConfigError(
            f"population {of_each.population!r} is a demonstration on public data",
            hint=f"`fedrounds privacy budget set '{of_each.population}' --epsilon E --reason ...` makes it private; "
            "then set the budget of one client",
        )
    with_budgets = {name.partition("/")[2]: named for name, named in store.clients_of(base).items()}
    with_budgets.pop("*", None)
    taken_part = store.clients_known(base) | {name for name, named in with_budgets.items() if not named}
    known = sorted(taken_part | with_budgets.keys())
    if taken_part and client not in known:
        by_case = [name for name in known if name.casefold() == client.casefold()]
        close = by_case or difflib.get_close_matches(client, known, n=3, cutoff=0.5) or known[:10]
        raise ConfigError(
            f"population {base!r} has no client {client!r}",
            hint=f"{'close names are' if len(close) < len(known) else 'its clients are'} {', '.join(close)}; names are "
            "those of the data, upper and lower case included",
        )


def _check_name(population: str) -> None:
    """Raises `ConfigError` for what can be no population's name, nor that of one client's or each client's examples."""
    from fedrounds.fl_components.config import NAME
    from fedrounds.fl_components.data.federated import CLIENT_ID

    base, slash, client = population.partition("/")
    if not re.fullmatch(NAME, base) or len(base) > 100:
        raise ConfigError(
            f"{base!r} cannot be a population's name",
            hint="a name has at most 100 letters, digits, '_', '.' and '-', and begins with a letter or a digit",
        )
    if slash and client != "*" and not CLIENT_ID.fullmatch(client):
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
    from fedrounds.fl_components.privacy.example_level import UNIT
    from fedrounds.fl_components.server.statement import unclaimed_runs
    from fedrounds.fl_components.store.ledger import EACH_CLIENT

    with Store.open() as store:
        _check_known(store, population)
        if population.endswith(EACH_CLIENT):
            raise ConfigError(
                f"{population!r} stands for all clients, and each has a ledger of its own",
                hint=f"`fedrounds privacy ledger {population[:-1]}CLIENT`; `fedrounds privacy status "
                f"{shlex.quote(population)}` lists the clients",
            )
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
            for run in unclaimed_runs(store, population, UNIT if "/" in population else "client")
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
            for charge in store.charges(population=population)
            if charge.event != {"kind": "none"}
        ]


def statement(run: str) -> dict[str, Any]:
    """The privacy statement of a run. Raises `RunNotFound`."""
    from fedrounds.fl_components.server.statement import markdown, statement

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
    config: str, overrides: Sequence[str] = (), *, epsilon: float, picture: str | Path | None = None
) -> dict[str, Any]:
    """What keeps `epsilon` with this configuration: the noise for its rounds and cohort, or the rounds for its noise
    and cohort, or the cohort for its noise and rounds. Never less private than asked.

    What no configuration may say is not among them: no rounds at all, or less than one client a round.
    Each choice has the curve of epsilon by round, and the noise on a coordinate of the mean in clipping norms. Raises
    `ConfigError`.
    """
    from fedrounds.fl_components.config import load_config, source_folder
    from fedrounds.fl_components.privacy import CentralPrivacy, neighbouring_of
    from fedrounds.fl_components.privacy.accountants import rdp_epsilon
    from fedrounds.fl_components.privacy.calibration import largest_rate, least_noise, most_rounds
    from fedrounds.fl_components.privacy.central import MIN_NOISE
    from fedrounds.fl_components.privacy.events import Event
    from fedrounds.fl_components.server.hub import assembled_for_a_look
    from fedrounds.fl_components.values import Sampling

    _check_epsilon(epsilon)
    resolved = load_config(config, overrides)
    central = resolved.privacy
    if not isinstance(central, CentralPrivacy):
        about_examples = ", or plan for the examples with --example-level" * resolved.training.privacy.claims
        raise ConfigError(
            "there is nothing to plan: privacy.kind is none", hint=f"set privacy.kind to central{about_examples}"
        )
    num_clients = resolved.data.known_num_clients()
    if num_clients is None:
        num_clients = assembled_for_a_look(resolved, str(source_folder(config))).data.num_clients
    sampling, relation = (
        resolved.sampling(num_clients),
        neighbouring_of(resolved.sampling(num_clients)),
    )

    def event(noise: float | None = None, drawn: Sampling = sampling) -> Event:
        rule = central if noise is None else central.model_copy(update={"noise_multiplier": noise})
        return rule.event(drawn)

    def at_rate(rate: float) -> Sampling:
        return Sampling(sampling.kind, num_clients, rate * num_clients, rate)

    def choice(what: str, noise: float, rounds: int, drawn: Sampling) -> dict[str, Any]:
        cost = event(noise, drawn)
        steps = sorted({max(1, round(rounds * point / POINTS)) for point in range(1, POINTS + 1)})
        curve = [[step, rdp_epsilon({cost: step}, relation, central.delta)] for step in steps] if rounds else []
        return {
            "free": what,
            "noise_multiplier": noise,
            "rounds": rounds,
            "cohort_size": drawn.cohort_size,
            "epsilon": curve[-1][1] if curve else 0.0,
            "noise_on_the_mean": noise / drawn.cohort_size,
            "curve": curve,
        }

    target = (relation, epsilon, central.delta)
    choices = [choice("as configured", central.noise_multiplier, resolved.rounds, sampling)]
    noise = max(MIN_NOISE, least_noise(lambda noise: {event(noise): resolved.rounds}, *target))
    choices.append(choice("noise", noise, resolved.rounds, sampling))
    rounds = most_rounds(lambda rounds: {event(): rounds}, *target)
    if rounds:  # else not even one keeps it
        choices.append(choice("rounds", central.noise_multiplier, rounds, sampling))
    if sampling.kind == "poisson":
        rate = largest_rate(lambda rate: {event(None, at_rate(rate)): resolved.rounds}, *target)
        if rate * num_clients >= 1:  # a configuration refuses fewer
            choices.append(choice("cohort", central.noise_multiplier, resolved.rounds, at_rate(rate)))
    found = {
        "name": resolved.name,
        "epsilon": epsilon,
        "delta": central.delta,
        "neighbouring": relation,
        "choices": choices,
    }
    if picture is not None:
        from fedrounds.deployments.cli.picture import draw_plan

        draw_plan(found, Path(picture))
    return found


def _check_epsilon(epsilon: float) -> None:
    """Raises `ConfigError` for what no plan can keep, as a configuration's `target_epsilon` would be refused."""
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon is {epsilon:g}", hint="give a number above 0")


def plan_examples(config: str, overrides: Sequence[str] = (), *, epsilon: float) -> dict[str, Any]:
    """What keeps `epsilon` at each client for its own examples, with this configuration's sampling rate, epochs or
    steps, and rounds: the noise, and how much of it is on the mean gradient of a step; beside it what the configured
    noise comes to, and for how many rounds it is enough. Never less private than asked.

    The clients with the fewest rows come first, at most `MAX_SHOWN`: the same noise weighs more on a smaller batch.
    Raises `ConfigError`.
    """
    from fedrounds.fl_components.config import load_config, source_folder
    from fedrounds.fl_components.privacy.accountants import rdp_epsilon
    from fedrounds.fl_components.privacy.calibration import MAX_NOISE, least_noise, most_rounds
    from fedrounds.fl_components.privacy.example_level import NEIGHBOURING
    from fedrounds.fl_components.server.claim import MAX_SHOWN
    from fedrounds.fl_components.server.hub import assembled_for_a_look

    _check_epsilon(epsilon)
    resolved = load_config(config, overrides)
    rule, rounds = resolved.training.example_level, resolved.rounds
    if rule is None:
        raise ConfigError(
            "there is nothing to plan for the examples: training.privacy.kind is none",
            hint="set training.privacy.kind to example_level",
        )
    steps, delta = resolved.training.private_steps, rule.delta
    configured = rule.noise(rounds * steps)
    uncut = rule.model_copy(update={"max_batch_size": None})  # cut batches may be more than the configured noise pays
    loaded = resolved.model_copy(update={"training": resolved.training.model_copy(update={"privacy": uncut})})
    data = assembled_for_a_look(loaded, str(source_folder(config))).data
    rows = sorted((data.num_examples(client), data.client_ids[client]) for client in range(data.num_clients))

    @cache
    def costs(num_examples: int) -> tuple[float, float, int]:
        """The noise that is needed, the epsilon of the configured one, and the rounds that it is enough for."""
        needed = least_noise(
            lambda noise: {rule.event(num_examples, steps, noise): rounds}, NEIGHBOURING, epsilon, delta
        )
        event = rule.event(num_examples, steps, configured)
        enough = most_rounds(lambda rounds: {event: rounds}, NEIGHBOURING, epsilon, delta)
        return needed, rdp_epsilon({event: rounds}, NEIGHBOURING, delta), enough

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
        noise, comes_to, enough = costs(num_examples if cut else 1)
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
        "name": resolved.name,
        "epsilon": epsilon,
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
