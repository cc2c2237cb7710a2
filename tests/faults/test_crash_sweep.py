"""A training killed before and after every write of its store, and resumed, ends as if nothing had happened.

The quick tests kill one federation at every kind of write; the slow ones this one, one under a privacy claim and one of
silos at every write of every round, twice in a row and on both databases.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

Cases = dict[str, dict[str, Any]]

KILLED = -signal.SIGKILL


def check(cases: Cases, kills: int) -> None:
    """Every case was killed so many times, and came to what the undisturbed training came to."""
    expected = cases.pop("undisturbed")["outcome"]
    assert expected["state"][:3] == ["Completed", None, 3]
    assert [round for round, *_ in expected["rounds"]] == [1, 2, 3]
    assert expected["charges"] == [[1, 1, "spent"], [2, 1, "spent"], [3, 1, "spent"]]
    assert expected["journal"] == {
        "run.created": [None],
        "charge.reserved": [1, 2, 3],
        "round.sealed": [1, 2, 3],
        "round.committed": [1, 2, 3],
    }
    assert (expected["seals"], expected["states kept"]) == ([], 2)
    assert (expected["blobs nobody needs"], expected["blobs missing"]) == (0, [])
    wrong = {name: different(case, expected) for name, case in cases.items() if case["outcome"] != expected}
    assert not wrong
    assert {name: case["ends"] for name, case in cases.items() if case["ends"] != [KILLED] * kills} == {}


def different(case: dict[str, Any], expected: dict[str, Any]) -> Any:
    found = case["outcome"]
    return {key: found[key] for key in expected if found[key] != expected[key]} if isinstance(found, dict) else found


def test_a_kill_at_each_kind_of_write_changes_nothing(run_cases: Callable[..., Cases]) -> None:
    cases = run_cases("kills", "--each-kind")
    check(dict(cases), kills=1)
    instants = Counter(name.partition(" ")[2] for name in cases if name != "undisturbed")
    assert set(instants.values()) == {1}
    methods = {name.partition(":")[0] for name in instants}
    assert methods >= {"create_run", "acquire", "begin_attempt", "reserve", "seal", "commit", "finish", "release"}


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_a_kill_before_or_after_any_write_changes_nothing(run_cases: Callable[..., Cases]) -> None:
    cases = run_cases("kills")
    check(dict(cases), kills=1)
    # What a training of three rounds writes at the least: to create and take the run and begin the attempt, in each
    # round the charge, the seal and the state (two blobs and three commits), and its end.
    instants = Counter(name.partition(": ")[2] for name in cases if name != "undisturbed")
    blobs, commits = 1 + 3 * 2, 3 + 3 * 3 + 1
    files = blobs + 1  # and the key of the fingerprints
    assert instants["before the blob"] == blobs
    assert instants["half of the temporary file"] == instants["after the rename"] == files
    assert instants["before the commit"] == instants["after the commit"] >= commits
    assert instants["after an fsync"] >= 2 * blobs
    assert instants["after a deletion"] >= 3


def check_silos(cases: Cases, kills: int) -> None:
    """As `check`; and what was lost in one round was made up for in the next, so that there was something to keep."""
    rounds = [metrics for *_, metrics in cases["undisturbed"]["outcome"]["rounds"]]
    states = cases["undisturbed"]["outcome"]["client states"]
    assert [round for _, round, _ in states] == [3, 3, 3] and len({digest for *_, digest in states}) == 3
    assert all(metrics["communication/error"] > 0.3 for metrics in rounds)
    assert len({metrics["communication/download_bytes"] for metrics in rounds}) > 1
    check(cases, kills)


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_a_kill_changes_nothing_of_what_silos_keep(run_cases: Callable[..., Cases]) -> None:
    check_silos(run_cases("kills", "--every", "9", config="silos.yaml"), kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_kill_at_any_write_changes_nothing_of_what_silos_keep(run_cases: Callable[..., Cases]) -> None:
    check_silos(run_cases("kills", config="silos.yaml"), kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_kill_changes_nothing_of_what_silos_keep(run_cases: Callable[..., Cases]) -> None:
    check_silos(run_cases("double-kills", "--every", "4", config="silos.yaml"), kills=2)


def check_private(cases: Cases, kills: int) -> None:
    """As `check`; and nothing is charged twice or left out, and no key outlives its round."""
    expected = dict(cases["undisturbed"]["outcome"])
    spent, totals = expected["spent"], expected["spent in all"]
    assert (list(spent["faults-private"].values()), expected["rounds of secrets"]) == ([3], [4])
    assert spent == {name: totals[name] for name in spent}  # each account, by this run alone
    by_clients = sum(sum(events.values()) for name, events in spent.items() if "/" in name)
    assert by_clients == sum(metrics["clients/selected"] for *_, metrics in expected["rounds"]) > 0
    assert len({metrics["privacy/clipping_norm"] for *_, metrics in expected["rounds"]}) == 3
    assert [metrics["privacy/epsilon"] for *_, metrics in expected["rounds"]] == sorted(
        metrics["privacy/epsilon"] for *_, metrics in expected["rounds"]
    )
    check(cases, kills)


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_a_kill_under_a_privacy_claim_changes_nothing(run_cases: Callable[..., Cases]) -> None:
    """The same noise, and the same epsilon: what was reserved is not reserved again, what was sealed not collected
    again."""
    check_private(run_cases("kills", "--every", "5", config="private.yaml"), kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_kill_at_any_write_under_a_privacy_claim(run_cases: Callable[..., Cases]) -> None:
    cases = run_cases("kills", config="private.yaml")
    check_private(dict(cases), kills=1)
    forgetting = [name for name in cases if name.partition(" ")[2].startswith("?: after the rename")]
    # The secret is made and gets the name of its database, and the key of each round is forgotten after its commit.
    assert len(forgetting) == 2 + 3


def check_mishaps(cases: Cases) -> None:
    """What cannot go on with the same bits is refused; or, where it can be paid for, paid for once more."""
    expected = cases.pop("undisturbed")["outcome"]
    refused = Counter[str]()
    for name, case in cases.items():
        mishap, (resumed, afresh) = name.partition(" ")[0], (case["resumed"], case["afresh"])
        assert case["end"] == KILLED, name
        if "refused" in resumed:
            refused[mishap] += 1
            assert re.search(REFUSALS[mishap], resumed["refused"]), (name, resumed)
            if mishap == "edited_row":
                assert "began with other rows" in afresh["refused"], (name, afresh)
                continue
            assert "--fresh-collection" in resumed["hint"], (name, resumed)
            check_paid(name, afresh)
        else:  # killed before there was anything to lose, or after the last commit: then a secret is not missed
            secrets = "rounds of secrets"
            assert {**resumed, secrets: expected[secrets]} == expected, name
            assert resumed[secrets] in ([], expected[secrets]), name
    assert set(refused) == set(REFUSALS)


REFUSALS = {
    "lost_secret": "the secret of run run, .* is missing in",
    "restored_database": "the database is older than what was seen of run run",
    "edited_row": "run 'run' began with other rows",
    "second_hub": "the secret of run run, .* is missing in",
}


def check_paid(name: str, outcome: dict[str, Any]) -> None:
    """The run is complete, its books say what the journal says (`outcome` verifies it), and each round that may have
    been released is paid for besides those that are committed."""
    assert outcome["state"][:3] == ["Completed", None, 3], (name, outcome)
    charges = outcome["charges"]
    assert {state for *_, state in charges} == {"spent"}, (name, charges)
    last = {round: collection for round, collection, _ in charges}
    assert [[round, collection] for round, collection, *_ in outcome["rounds"]] == [[n, last[n]] for n in (1, 2, 3)]
    spent, totals = (sum(outcome[of]["faults-private"].values()) for of in ("spent", "spent in all"))
    assert spent == len(charges) == totals, (name, outcome["spent"])
    assert (outcome["seals"], outcome["blobs missing"]) == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_happens_to_a_home_while_a_run_is_dead(run_cases: Callable[..., Cases]) -> None:
    """A lost secret, a restored database, an edited row and a second hub, after a kill at some write."""
    check_mishaps(run_cases("mishaps", "--every", "9", config="private.yaml"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_kill_under_a_privacy_claim(run_cases: Callable[..., Cases]) -> None:
    check_private(run_cases("double-kills", "--every", "8", config="private.yaml"), kills=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.postgres
def test_a_kill_under_a_privacy_claim_on_postgresql(run_cases: Callable[..., Cases], postgres_url: str) -> None:
    check_private(run_cases("kills", "--every", "3", "--postgres-url", postgres_url, config="private.yaml"), kills=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_second_kill_during_the_resume_changes_nothing_either(run_cases: Callable[..., Cases]) -> None:
    check(run_cases("double-kills", "--every", "4"), kills=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.postgres
def test_a_kill_at_any_write_changes_nothing_on_postgresql(run_cases: Callable[..., Cases], postgres_url: str) -> None:
    check(run_cases("kills", "--postgres-url", postgres_url), kills=1)
