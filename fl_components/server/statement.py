"""The privacy statement of a run: what is claimed, on what grounds, what was spent, and what is not covered. Generated
from the store, never written by hand; its parts are those that NIST SP 800-226 ("Guidelines for evaluating differential
privacy guarantees", 2025) asks a claim to name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

from fedrounds.fl_components.aggregation import AdditiveRule
from fedrounds.fl_components.config import FederationConfig, parse_config
from fedrounds.fl_components.privacy import AdaptiveClipping, CentralPrivacy
from fedrounds.fl_components.privacy.accountants import pld_epsilon
from fedrounds.fl_components.privacy.events import Neighbouring, as_neighbouring
from fedrounds.fl_components.privacy.example_level import UNIT
from fedrounds.fl_components.run_state import RunState
from fedrounds.fl_components.server.claim import MAX_SHOWN, epsilon_of, events_of, example_spending, spending
from fedrounds.fl_components.store import Budget, RoundRecord, RunRecord, Store
from fedrounds.fl_components.store.ledger import EACH_CLIENT, decode_events, of_client

UNITS_IN_WORDS: Final = {
    "client": "a client: all that one client holds",
    "example": "one training example (a row) of a client, against everybody who sees what the client sends, the server "
    "included; not a patient, where a patient has several rows",
}

RELATIONS_IN_WORDS: Final = {
    "add_or_remove": "with or without one client",
    "replace_one": "with one client exchanged for any other",
    "zero_out": "with one client's contribution exchanged for zero",
}

SAMPLING_IN_WORDS: Final = {
    "add_or_remove": "each round's cohort is drawn by an independent coin for each client of a fixed table, from "
    "a secret, before anybody asks who is there; who was drawn is withheld",
    "replace_one": "each round's cohort is a set of a fixed size, each equally likely, drawn from a secret; who "
    "was drawn is withheld",
    "zero_out": "every client takes part in every round; no amplification by sampling is claimed",
}

EXAMPLE_NEIGHBOURS: Final = "with what one example adds to each step exchanged for zero"

EXAMPLE_SAMPLING: Final = (
    "in each step each example is in the batch by an independent coin, drawn from the client's own secret; no "
    "amplification by the selection of clients is claimed"
)

ALL_EXAMPLES: Final = "all of a client's examples are in each step's batch; no amplification by sampling is claimed"

EXAMPLE_WITHHELD: Final = (
    "training loss, seconds and memory, which depend on the batches, and every metric of clients' own test examples"
)

EXAMPLE_NOT_COVERED: Final = (
    "a patient who has several rows, or rows at several clients: the largest epsilon is the whole only if nobody is in "
    "two of them",
    "how many training examples each client has: it is taken as public, to divide by and as a weight",
    "clients' test examples, which train nothing",
    "when rounds begin and end, by the clocks of Prefect, MLflow and the journal, and how long a client takes",
    "that a run fails, where some client's data make its training fail",
    "what a client's own machine shows of it; simulated clients all run on the machine of the simulation, and their "
    "secrets are made from the run's",
    "the choice of the configuration, where earlier results on these data led to it outside this ledger",
)

WITHHELD: Final = (
    "training loss, who was selected, how many came and how many were refused and why, bytes and seconds that depend "
    "on them, the memory used, the exact norms, and every metric of clients' own test examples"
)

NOT_COVERED: Final = (
    "when rounds begin and end, by the clocks of Prefect, MLflow and the journal",
    "that a run fails, where some client's data make its training fail",
    "how many clients there are: the expected cohort, by which sums are divided, is taken as public",
    "the last bits of clients that are simulated together in one process, which may differ by who is among them",
    "what a client's own machine shows of it",
    "the choice of the configuration, where earlier results on these data led to it outside this ledger",
    "the server that adds the noise: it sees each update, and is trusted",
)


ACCOUNTANT: Final = (
    "Renyi differential privacy on fixed orders (dp_accounting), converted after Canonne, Kamath and Steinke 2020; it "
    "decides, and it stays valid when later runs are chosen after seeing earlier ones"
)

TIGHTEST_BY: Final = "privacy loss distributions (dp_accounting), for this run alone and as it was fixed in advance"


def statement(store: Store, run: RunRecord) -> dict[str, Any]:
    """The statement as plain values; `claim` is False where nothing is promised.

    What is promised about clients comes first; what is promised about their examples stands under `examples` then, and
    in its place where nothing else is promised.
    """
    named: dict[str, Any] = {"run_id": run.run_id, "name": run.name, "deleted": run.state == RunState.DELETED}
    rules = (run.config.get("privacy", {}), run.config.get("training", {}).get("privacy", {}))
    if all(rule.get("kind", "none") == "none" for rule in rules):
        return named | {"claim": False}
    named["warnings"] = run.engine["delta_warnings"]
    config = parse_config(run.config)
    of_examples = _about_examples(store, run, config) if config.training.privacy.claims else None
    if not isinstance(config.privacy, CentralPrivacy):
        assert of_examples is not None
        return named | {"claim": True} | of_examples
    if config.privacy.simulate_noise_cohort is not None:
        simulated = (
            "the noise is that of a larger cohort, scaled down: its epsilon belongs to a federation of that size, and "
            "these clients are not protected by it"
        )
        return named | {"claim": of_examples is not None, "simulated": simulated} | (of_examples or {})
    return named | {"claim": True} | _about_clients(store, run, config) | {"examples": of_examples}


def _about_clients(store: Store, run: RunRecord, config: FederationConfig) -> dict[str, Any]:
    central, budget = config.privacy, store.find_budget(run.population)
    assert isinstance(central, CentralPrivacy) and budget is not None
    told, lineage = spending(budget, decode_events(run.spent)), _lineage(store, run)
    return {
        "demonstration": run.engine["public_data"],
        "protects": UNITS_IN_WORDS[budget.unit],
        "unit": budget.unit,
        "neighbouring": budget.neighbouring,
        "neighbours": RELATIONS_IN_WORDS[budget.neighbouring],
        "delta": budget.delta,
        "epsilon": {
            "run": told.run.epsilon,
            "run_tightest": tightest_epsilon(budget, decode_events(run.spent)),
            "lineage": _epsilon_of(budget, lineage),
            "population": told.population,
            "population_limit": budget.epsilon,
        },
        "unclaimed_runs": unclaimed_runs(store, run.population, budget.unit),
        "lineage": [each.run_id for each in lineage] if lineage else [run.run_id, run.ancestor],
        "mechanism": _mechanism(config, central),
        "sampling": SAMPLING_IN_WORDS[budget.neighbouring],
        "accountant": ACCOUNTANT,
        "tightest_by": TIGHTEST_BY,
        "releases": _releases(config, central),
        "withheld": None if run.engine["public_data"] else WITHHELD,
        "not_covered": list(NOT_COVERED),
    }


def _about_examples(store: Store, run: RunRecord, config: FederationConfig) -> dict[str, Any]:
    """The epsilons are the largest of any client's."""
    of_all, lineage = store.find_budget(run.population + EACH_CLIENT), _lineage(store, run)
    assert of_all is not None and config.training.example_level is not None
    clients, worst = _clients(store, run), example_spending(store, run)
    largest = max(clients.values(), key=lambda each: each[1], default=(of_all, 0.0, {}))
    budgets = [budget for budget, _, _ in clients.values()]
    return {
        "demonstration": run.engine["public_data"],
        "protects": UNITS_IN_WORDS[UNIT],
        "unit": UNIT,
        "neighbouring": of_all.neighbouring,
        "neighbours": EXAMPLE_NEIGHBOURS,
        "delta": of_all.delta,
        "epsilon": {
            "run": largest[1],
            "run_tightest": tightest_epsilon(of_all, largest[2]),
            "lineage": _example_epsilon_of(store, run, of_all, lineage),
            "population": worst.population if worst is not None else 0.0,
            "population_limit": min((each.epsilon for each in budgets if each.epsilon is not None), default=None),
        },
        "clients": {
            name: {"run": epsilon, "population": spending(budget, {}).population, "population_limit": budget.epsilon}
            for name, (budget, epsilon, _) in sorted(clients.items())[:MAX_SHOWN]
        },
        "unclaimed_runs": unclaimed_runs(store, run.population, UNIT),
        "left_out": left_out(store.rounds(run.run_id)),
        "lineage": [each.run_id for each in lineage] if lineage else [run.run_id, run.ancestor],
        "mechanism": _example_mechanism(run, config),
        "sampling": EXAMPLE_SAMPLING if config.training.example_level.sampling_rate < 1 else ALL_EXAMPLES,
        "accountant": ACCOUNTANT,
        "tightest_by": TIGHTEST_BY,
        "releases": "each client's update in each round, and all that is computed from these",
        "withheld": None if run.engine["public_data"] else EXAMPLE_WITHHELD,
        "not_covered": list(EXAMPLE_NOT_COVERED),
    }


def unclaimed_runs(store: Store, population: str, unit: str) -> list[dict[str, Any]]:
    """The runs on the data of a population, or on those of one client (POPULATION/CLIENT), that answer for them to no
    budget of this unit, the oldest first: what their models tell is in no epsilon."""
    base, _, client = population.partition("/")
    return [
        {
            "run_id": use.run_id,
            "name": use.name,
            "population": use.population,
            "began_at": datetime.fromtimestamp(use.began_at, UTC).isoformat(timespec="seconds"),
            "rounds": use.rounds,
            "deleted": use.deleted,
        }
        for use in store.uses_without(base, unit, client if client not in ("", "*") else None)
    ]


def unclaimed_in_words(run: Mapping[str, Any]) -> str:
    """
    >>> unclaimed_in_words({"run_id": "q1", "name": "wards", "began_at": "2026-03-12T09:00:00+00:00", "rounds": 1,
    ...                     "deleted": False})
    'q1 (wards, begun 2026-03-12, 1 round)'
    """
    rounds = f"{run['rounds']} round{'s' * (run['rounds'] != 1)}"
    deleted = ", deleted since" * run["deleted"]
    return f"{run['run_id']} ({run['name']}, begun {run['began_at'][:10]}, {rounds}{deleted})"


def left_out(rounds: Iterable[RoundRecord]) -> dict[str, int]:
    """The clients that rounds went without since their budgets are spent, each with how many rounds."""
    return dict(Counter(name for row in rounds for name in row.result.get("left_out", ())).most_common())


def left_out_in_words(found: Mapping[str, int]) -> str:
    """
    >>> left_out_in_words({"va": 3, "cleveland": 1})
    'va (3 rounds), cleveland (1 round)'
    """
    named = [f"{name} ({count} round{'s' * (count > 1)})" for name, count in list(found.items())[:MAX_SHOWN]]
    return ", ".join(named) + (f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else "")


def _clients(store: Store, run: RunRecord) -> dict[str, tuple[Budget, float, Mapping[str, int]]]:
    """Each client that has paid for the run: its budget, and what the run cost it, as an epsilon and in events."""
    spent = store.example_spending(run.run_id)
    return {
        name.removeprefix(of_client(run.population, "")): (budget, epsilon_of(spent[name], budget), spent[name])
        for name, budget in store.find_budgets(spent).items()
    }


def _example_mechanism(run: RunRecord, config: FederationConfig) -> str:
    rule = config.training.resolved_privacy(run.rounds)
    cut = f", cut to {rule.max_batch_size} at random" if rule.max_batch_size is not None else ""
    steps = config.training.private_steps
    batch = f"{rule.sampling_rate:g} of" if rule.sampling_rate < 1 else "all"
    return (
        f"DP-SGD (Abadi et al. 2016), {steps} step{'s' * (steps > 1)} a round: the gradient of each example is "
        f"clipped to an L2 norm of {rule.max_grad_norm:g}; Gaussian noise of {rule.noise_multiplier:.4g} times that, "
        "from a cryptographic stream, is added to their sum on a fixed grid, which is divided by the expected size of "
        f"a batch ({batch} the examples{cut}). Gradients of single examples by {run.engine['grad_sampler_name']}"
    )


def _example_epsilon_of(store: Store, run: RunRecord, terms: Budget, lineage: list[RunRecord] | None) -> float | None:
    """The largest that any client has come to by all that a model was made from. None where an ancestor was charged
    elsewhere, or not at all."""
    total: dict[str, dict[str, int]] = {}
    for each in lineage or ():
        spent = store.example_spending(each.run_id)
        if each.population != run.population or (each.committed_round and not spent):
            return None
        for name, events in spent.items():
            mine = total.setdefault(name, {})
            for event, count in events.items():
                mine[event] = mine.get(event, 0) + count
    return max((epsilon_of(events, terms) for events in total.values()), default=0.0) if lineage else None


def _mechanism(config: FederationConfig, central: CentralPrivacy) -> str:
    assert isinstance(config.aggregation, AdditiveRule)
    equal = config.aggregation.max_weight == 1
    weights = "each with the same weight" if equal else "weighted by examples, with a cap"
    layers = ", layer by layer" if central.per_layer else ""
    clipped = f"each update is clipped to {central.clipping.in_words()}{layers}, {weights}"
    return (
        f"{clipped}, rounded to a fixed grid and added up exactly; Gaussian noise of {central.noise_multiplier:g} "
        "times that norm, from a cryptographic stream whose key is destroyed when the round is committed, is added to "
        "the sum; the denominator is the expected cohort"
    )


def _releases(config: FederationConfig, central: CentralPrivacy) -> str:
    """In words."""
    released = ["the model after each round", "the clipping norm"]
    if isinstance(central.clipping, AdaptiveClipping):
        released.append("the noisy fraction of updates that were not clipped")
    if config.evaluation.public_test:
        *names, last = config.evaluation.metrics or ()
        metrics = f"{', '.join(names)} and {last}" if names else last
        released.append(f"{metrics} on all test examples together, which are declared public")
    return f"{', '.join(released)}, and metrics computed from these and public data alone"


def _lineage(store: Store, run: RunRecord) -> list[RunRecord] | None:
    """The run and those whose models it went on from, the newest first; None where that cannot be told."""
    found = [run]
    while (ancestor := found[-1].ancestor) is not None:
        earlier = store.find_run(ancestor.removeprefix("run:"))
        if earlier is None:  # a registered model: whose data it has seen is not known here
            return None
        found.append(earlier)
    return found


def tightest_epsilon(budget: Budget, spent: Mapping[str, int]) -> float | None:
    """The epsilon of a run for itself, by privacy loss distributions; None where they do not tell it."""
    return _cached_pld_epsilon(tuple(sorted(spent.items())), as_neighbouring(budget.neighbouring), budget.delta)


@lru_cache(1_000)  # it takes up to seconds, and clients that took part in the same rounds have spent the same
def _cached_pld_epsilon(spent: tuple[tuple[str, int], ...], neighbouring: Neighbouring, delta: float) -> float | None:
    return pld_epsilon(events_of(dict(spent)), neighbouring, delta)


def _epsilon_of(budget: Budget, lineage: list[RunRecord] | None) -> float | None:
    """Of all that a model was made from. None where an ancestor was charged elsewhere, or under no claim."""
    total: dict[str, int] = {}
    for run in lineage or ():
        if run.population != budget.population or (run.committed_round and not run.spent):
            return None
        for event, count in decode_events(run.spent).items():
            total[event] = total.get(event, 0) + count
    return spending(budget, total).run.epsilon if lineage else None


def in_short(found: dict[str, Any]) -> str:
    """The statement in a line, for a tag.

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
    """The statement for people."""
    title = f"# Privacy statement of run {found['run_id']} ({found['name']})\n"
    if found["deleted"]:
        title += "\nThis run was deleted. What it has spent stays.\n"
    simulated = found.get("simulated")
    if not found["claim"]:
        return title + ("\nNothing is claimed" + (f": {simulated}.\n" if simulated else ".\n"))
    title += "".join(f"\n**Warning:** {warning}.\n" for warning in found["warnings"])
    about_clients = f"\nAbout clients nothing is claimed: {simulated}.\n" if simulated else ""
    beside = found.get("examples")
    if not beside:
        return title + about_clients + _as_table(found)
    return f"{title}\n## About clients\n{_as_table(found)}\n## About their examples\n{_as_table(beside)}"


def _as_table(claim: dict[str, Any]) -> str:
    epsilon, delta = claim["epsilon"], claim["delta"]

    def shown(value: float | None) -> str:
        return "not known" if value is None else f"{value:.4g}"

    def limited(value: float, limit: float | None) -> str:
        return f"{shown(value)}, " + ("without a limit" if limit is None else f"limit {limit:g}")

    demonstration = (
        "**A demonstration: the data are public, so the claim protects nobody.**\n\n" * claim["demonstration"]
    )
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
        rows["**Runs without this claim**"] = (
            f"{named}: trained on these data; their models and metrics exist, and no epsilon here covers them"
        )
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
