"""The privacy statement of a run: what is claimed, on what grounds, what was spent, and what is not covered.

It is generated from the store, never written by hand. Its parts are those that NIST SP 800-226 ("Guidelines for
evaluating differential privacy guarantees", 2025) asks a claim to name. The wording is in templates: statement.toml
here, and one beside each claim.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from fedrounds.fl_components.account import Account
from fedrounds.fl_components.aggregation import LinearAggregator
from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.privacy import Claim
from fedrounds.fl_components.privacy.claim import StatementFacts
from fedrounds.fl_components.reports.privacy import MAX_SHOWN, epsilon_of, makes_claims, tightest_epsilon
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.store import Budget, RoundRecord, RunRecord, Store
from fedrounds.fl_components.store.records import Events


@cache
def _texts() -> dict[str, Any]:
    """The wording that all claims share."""
    text = files(__package__).joinpath("statement.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def statement(store: Store, run: RunRecord) -> dict[str, Any]:
    """Return the statement as plain values; `claim` is False where nothing is promised.

    The first claim is at the top level, and a second one under `examples`.
    """
    named: dict[str, Any] = {"run_id": run.run_id, "name": run.name, "deleted": run.state == RunState.DELETED}
    if not makes_claims(run):
        return named | {"claim": False}
    config = parse_config(run.config)
    named["warnings"] = run.engine["delta_warnings"]
    for claim in config.claims_made:
        if not claim.is_charged:
            named["simulated"] = tomllib.loads(claim.statement_template())["simulated"]
    stated = [_about(store, run, config, claim) for claim in config.charged_claims]
    if not stated:
        return named | {"claim": False}
    return named | {"claim": True} | stated[0] | {"examples": stated[1] if len(stated) > 1 else None}


def _about(store: Store, run: RunRecord, config: FederationConfig, claim: Claim) -> dict[str, Any]:
    """Return what is stated of one claim. Where each client pays, the epsilons are the largest of any client's."""
    account, lineage = claim.account(run.population), _lineage(store, run)
    terms = store.ledger.budget(account)
    assert terms is not None
    spent = _spent_under(store, run, account)
    budgets = store.ledger.budgets(spent) or ({} if account.is_template else {account: terms})
    epsilons = {each: epsilon_of(spent.get(each, {}), budget) for each, budget in budgets.items()}
    largest = max(epsilons, key=epsilons.__getitem__, default=None)
    limits = [each.epsilon for each in budgets.values() if each.epsilon is not None]
    totals = {each: epsilon_of(budget.spent, budget) for each, budget in budgets.items()}
    wording, values = _wording(run, config, claim)
    return {
        "about": wording["about"],
        "demonstration": run.engine["public_data"],
        "protects": wording["protects"],
        "unit": terms.unit,
        "neighbouring": terms.neighbouring,
        "neighbours": _choice(wording["neighbours"], terms.neighbouring),
        "delta": terms.delta,
        "epsilon": {
            "run": epsilons[largest] if largest is not None else 0.0,
            "run_tightest": tightest_epsilon(terms, spent.get(largest, {}) if largest is not None else {}),
            "lineage": _lineage_epsilon(store, run, account, terms, lineage),
            "population": max(totals.values(), default=0.0),
            "population_limit": min(limits, default=None),
        },
        "clients": {
            each.client: {"run": epsilons[each], "population": totals[each], "population_limit": budget.epsilon}
            for each, budget in sorted(budgets.items())[:MAX_SHOWN]
        }
        if account.is_template
        else None,
        "unclaimed_runs": unclaimed_runs(store, account, terms.unit),
        "left_out": left_out(store.rounds(run.run_id)),
        "lineage": [each.run_id for each in lineage] if lineage else [run.run_id, run.ancestor],
        "mechanism": wording["mechanism"].format_map(values),
        "sampling": _choice(wording["sampling"], values.get("draw", terms.neighbouring)),
        "accountant": _texts()["accountant"],
        "tightest_by": _texts()["tightest_by"],
        "releases": wording["releases"].format_map(values),
        "withheld": None if run.engine["public_data"] else wording["withheld"],
        "not_covered": wording["not_covered"],
    }


def _wording(run: RunRecord, config: FederationConfig, claim: Claim) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the texts of a claim, and the values that they name."""
    facts = StatementFacts(
        rounds=run.rounds,
        steps=config.claimed_steps,
        equal_weights=isinstance(config.aggregation, LinearAggregator) and config.aggregation.max_weight == 1,
        public_metrics=(config.evaluation.metrics or ()) if config.evaluation.public_test else (),
        grad_sampler=run.engine.get("grad_sampler_name"),
    )
    return tomllib.loads(claim.statement_template()), claim.statement_values(facts)


def _choice(text: str | Mapping[str, str], which: str) -> str:
    return text if isinstance(text, str) else text[which]


def _spent_under(store: Store, run: RunRecord, account: Account) -> dict[Account, Events]:
    """Return what a run has spent of an account, or of all accounts that a template stands for."""
    spent = store.ledger.spent(run.run_id)
    return {each: events for each, events in spent.items() if account in (each, each.client and each.template)}


def _lineage_epsilon(
    store: Store, run: RunRecord, account: Account, terms: Budget, lineage: list[RunRecord] | None
) -> float | None:
    """Return the largest epsilon of any account for all that a model was made from.

    None where an ancestor was charged elsewhere, or not at all.
    """
    total: dict[Account, Counter[str]] = {}
    for each in lineage or ():
        spent = _spent_under(store, each, account)
        if each.population != run.population or (each.committed_round and not spent):
            return None
        for payer, events in spent.items():
            total.setdefault(payer, Counter()).update(events)
    return max((epsilon_of(events, terms) for events in total.values()), default=0.0) if lineage else None


def unclaimed_runs(store: Store, account: Account, unit: str) -> list[dict[str, Any]]:
    """Return the runs on the data that an account stands for which answer for them to no budget of this unit, the
    oldest first: what their models reveal is in no epsilon."""
    return [
        {
            "run_id": use.run_id,
            "name": use.name,
            "population": use.population,
            "began_at": datetime.fromtimestamp(use.began_at, UTC).isoformat(timespec="seconds"),
            "rounds": use.rounds,
            "deleted": use.deleted,
        }
        for use in store.memberships.uses_without(account, unit)
    ]


def unclaimed_in_words(run: Mapping[str, Any]) -> str:
    """Return a run that makes no claim in words.

    >>> unclaimed_in_words({"run_id": "q1", "name": "wards", "began_at": "2026-03-12T09:00:00+00:00", "rounds": 1,
    ...                     "deleted": False})
    'q1 (wards, begun 2026-03-12, 1 round)'
    """
    rounds = f"{run['rounds']} round{'s' * (run['rounds'] != 1)}"
    deleted = ", deleted since" * run["deleted"]
    return f"{run['run_id']} ({run['name']}, begun {run['began_at'][:10]}, {rounds}{deleted})"


def left_out(rounds: Iterable[RoundRecord]) -> dict[str, int]:
    """Return the clients that rounds were made without because their budgets are spent, each with how many rounds."""
    return dict(Counter(name for row in rounds for name in row.result.get("left_out", ())).most_common())


def left_out_in_words(found: Mapping[str, int]) -> str:
    """Return the clients that were left out in words.

    >>> left_out_in_words({"va": 3, "cleveland": 1})
    'va (3 rounds), cleveland (1 round)'
    """
    named = [f"{name} ({count} round{'s' * (count > 1)})" for name, count in list(found.items())[:MAX_SHOWN]]
    return ", ".join(named) + (f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else "")


def _lineage(store: Store, run: RunRecord) -> list[RunRecord] | None:
    """The run and those whose models it went on from, the newest first; None where that cannot be told."""
    found = [run]
    while (ancestor := found[-1].ancestor) is not None:
        earlier = store.find_run(ancestor.removeprefix("run:"))
        if earlier is None:  # a registered model: whose data it has seen is not known here
            return None
        found.append(earlier)
    return found


def in_short(found: dict[str, Any]) -> str:
    """Return the statement in one line, for a tag.

    >>> in_short({"claim": False})
    'none'
    """
    if not found["claim"]:
        return "simulated: no claim" if "simulated" in found else "none"
    beside = found.get("examples")
    return _in_short(found) + (f"; {_in_short(beside)}" if beside else "")


def _in_short(claim: dict[str, Any]) -> str:
    epsilon, lineage = claim["epsilon"]["run"], claim["epsilon"]["lineage"]
    told = f"epsilon {epsilon:.4g} at delta {claim['delta']:g} ({claim['unit']}, {claim['neighbouring']})"
    if lineage != epsilon:
        told += "; with its ancestors " + ("not known" if lineage is None else f"{lineage:.4g}")
    if unclaimed := len(claim["unclaimed_runs"]):
        told += f"; not covered: {unclaimed} run{'s' * (unclaimed > 1)} on these data without this claim"
    return f"{told}, a demonstration on public data" if claim["demonstration"] else told


def markdown(found: dict[str, Any]) -> str:
    """Return the statement for people."""
    texts = _texts()
    title: str = texts["title"].format_map(found) + texts["deleted"] * found["deleted"]
    simulated = found.get("simulated")
    if not found["claim"]:
        return title + str(texts["nothing_but"].format(simulated=simulated) if simulated else texts["nothing"])
    title += "".join(texts["warning"].format(warning=warning) for warning in found["warnings"])
    about_clients = texts["simulated"].format(simulated=simulated) if simulated else ""
    second = found.get("examples")
    if not second:
        return title + about_clients + _as_table(found)
    return f"{title}\n## {found['about']}\n{_as_table(found)}\n## {second['about']}\n{_as_table(second)}"


def _as_table(claim: dict[str, Any]) -> str:
    epsilon, delta = claim["epsilon"], claim["delta"]

    def shown(value: float | None) -> str:
        return "not known" if value is None else f"{value:.4g}"

    def limited(value: float, limit: float | None) -> str:
        return f"{shown(value)}, " + ("without a limit" if limit is None else f"limit {limit:g}")

    demonstration = _texts()["demonstration"] * claim["demonstration"]
    beside = ", without the runs that made no claim (below)" * bool(claim["unclaimed_runs"])
    clients = claim.get("clients")
    whose = "" if clients is None else ", at the client that paid most"
    rows = {
        "Protects": claim["protects"],
        "Neighbours": f"{claim['neighbours']} ({claim['neighbouring']})",
        "This run": f"epsilon {shown(epsilon['run'])} at delta {delta:g}{whose}",
        "This run, tightest": f"{shown(epsilon['run_tightest'])}, by {claim['tightest_by']}",
        "The model's lineage": f"{shown(epsilon['lineage'])} ({', '.join(claim['lineage'])}){whose}",
    }
    if clients is None:
        rows["The population in all"] = limited(epsilon["population"], epsilon["population_limit"]) + beside
    for name, each in (clients or {}).items():
        rows[f"Client {name}"] = (
            f"this run {shown(each['run'])}; in all {limited(each['population'], each['population_limit'])}{beside}"
        )
    if claim["unclaimed_runs"]:
        named = ", ".join(map(unclaimed_in_words, claim["unclaimed_runs"]))
        rows["**Runs without this claim**"] = _texts()["unclaimed"].format(runs=named)
    if claim.get("left_out"):
        rows["Left out"] = f"{left_out_in_words(claim['left_out'])}: their budgets are spent"
    rows |= {
        "Mechanism": claim["mechanism"],
        "Sampling": claim["sampling"],
        "Accountant": claim["accountant"],
        "Released": claim["releases"],
        "Withheld": claim["withheld"] or "nothing, since the data are public",
        "Not covered": "; ".join(claim["not_covered"]),
    }
    return (
        f"\n{demonstration}| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in rows.items()) + "\n"
    )
