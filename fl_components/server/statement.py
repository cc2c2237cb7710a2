"""The privacy statement of a run: what is claimed, on what grounds, what was spent, and what is not covered. Generated
from the store, never written by hand; its parts are those that NIST SP 800-226 ("Guidelines for evaluating differential
privacy guarantees", 2025) asks a claim to name."""

from __future__ import annotations

from typing import Any, Final

from fl_components.aggregation import AdditiveRule
from fl_components.config import FederationConfig, parse_config
from fl_components.privacy import AdaptiveClipping, CentralPrivacy
from fl_components.privacy.accountants import pld_epsilon
from fl_components.privacy.events import as_neighbouring
from fl_components.server.claim import events_of, spending
from fl_components.store import Budget, RunRecord, Store
from fl_components.store.ledger import from_pairs

UNITS_IN_WORDS: Final = {"client": "a client: all that one client holds"}

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


def statement(store: Store, run: RunRecord) -> dict[str, Any]:
    """The statement as plain values; `claim` is False where nothing is promised."""
    if run.config.get("privacy", {}).get("kind", "none") == "none":
        return {"run_id": run.run_id, "name": run.name, "claim": False}
    config = parse_config(run.config)
    central = config.privacy
    assert isinstance(central, CentralPrivacy)
    if central.simulate_noise_cohort is not None:
        return {
            "run_id": run.run_id,
            "name": run.name,
            "claim": False,
            "simulated": "the noise is that of a larger cohort, scaled down: its epsilon belongs to a federation "
            "of that size, and these clients are not protected by it",
        }
    budget = store.find_budget(run.population)
    assert budget is not None
    told, lineage = spending(budget, from_pairs(run.spent)), _lineage(store, run)
    return {
        "run_id": run.run_id,
        "name": run.name,
        "claim": True,
        "demonstration": budget.demonstration,
        "protects": UNITS_IN_WORDS[budget.unit],
        "unit": budget.unit,
        "neighbouring": budget.neighbouring,
        "neighbours": RELATIONS_IN_WORDS[budget.neighbouring],
        "delta": budget.delta,
        "epsilon": {
            "run": told.run.epsilon,
            "run_tightest": tightest_epsilon(budget, run),
            "lineage": _epsilon_of(budget, lineage),
            "population": told.population,
            "population_limit": budget.epsilon,
        },
        "lineage": [each.run_id for each in lineage] if lineage else [run.run_id, run.ancestor],
        "mechanism": _mechanism(config, central),
        "sampling": SAMPLING_IN_WORDS[budget.neighbouring],
        "accountant": "Renyi differential privacy on fixed orders (dp_accounting), converted after Canonne, "
        "Kamath and Steinke 2020; it decides, and it stays valid when later runs are chosen after seeing earlier ones",
        "tightest_by": "privacy loss distributions (dp_accounting), for this run alone and as it was fixed in advance",
        "releases": _releases(config, central),
        "withheld": None if budget.demonstration else WITHHELD,
        "not_covered": list(NOT_COVERED),
    }


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
        released.append("loss and accuracy on all test examples together, which are declared public")
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


def tightest_epsilon(budget: Budget, run: RunRecord) -> float | None:
    """A run's epsilon for itself, by privacy loss distributions; None where they do not tell it."""
    return pld_epsilon(events_of(from_pairs(run.spent)), as_neighbouring(budget.neighbouring), budget.delta)


def _epsilon_of(budget: Budget, lineage: list[RunRecord] | None) -> float | None:
    """Of all that a model was made from. None where an ancestor was charged elsewhere, or under no claim."""
    total: dict[str, int] = {}
    for run in lineage or ():
        if run.population != budget.population or (run.committed_round and not run.spent):
            return None
        for event, count in from_pairs(run.spent).items():
            total[event] = total.get(event, 0) + count
    return spending(budget, total).run.epsilon if lineage else None


def in_short(found: dict[str, Any]) -> str:
    """The statement in a line, for a tag.

    >>> in_short({"claim": False})
    'none'
    """
    if not found["claim"]:
        return "simulated: no claim" if "simulated" in found else "none"
    epsilon, lineage = found["epsilon"]["run"], found["epsilon"]["lineage"]
    told = f"epsilon {epsilon:.4g} at delta {found['delta']:g} ({found['unit']}, {found['neighbouring']})"
    if lineage != epsilon:
        told += "; with its ancestors " + ("not known" if lineage is None else f"{lineage:.4g}")
    return f"{told}, a demonstration on public data" if found["demonstration"] else told


def markdown(found: dict[str, Any]) -> str:
    """The statement for people."""
    title = f"# Privacy statement of run {found['run_id']} ({found['name']})\n"
    if not found["claim"]:
        reason = found.get("simulated")
        return title + ("\nNothing is claimed" + (f": {reason}.\n" if reason else ".\n"))
    epsilon, delta = found["epsilon"], found["delta"]

    def shown(value: float | None) -> str:
        return "not known" if value is None else f"{value:.4g}"

    limit = "without a limit" if epsilon["population_limit"] is None else f"limit {epsilon['population_limit']:g}"
    demonstration = (
        "**A demonstration: the data are public, so the claim protects nobody.**\n\n" * found["demonstration"]
    )
    rows = {
        "Protects": found["protects"],
        "Neighbours": f"{found['neighbours']} ({found['neighbouring']})",
        "This run": f"epsilon {shown(epsilon['run'])} at delta {delta:g}",
        "This run, tightest": f"{shown(epsilon['run_tightest'])}, by {found['tightest_by']}",
        "The model's lineage": f"{shown(epsilon['lineage'])} ({', '.join(found['lineage'])})",
        "The population in all": f"{shown(epsilon['population'])}, {limit}",
        "Mechanism": found["mechanism"],
        "Sampling": found["sampling"],
        "Accountant": found["accountant"],
        "Released": found["releases"],
        "Withheld": found["withheld"] or "nothing, since the data are public",
        "Not covered": "; ".join(found["not_covered"]),
    }
    return (
        f"{title}\n{demonstration}| | |\n|---|---|\n"
        + "\n".join(f"| {name} | {text} |" for name, text in rows.items())
        + "\n"
    )
