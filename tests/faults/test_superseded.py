"""A process that was stopped, superseded and woken changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Cases = dict[str, dict[str, Any]]

LEASE_LOST, OTHER_ERROR = 3, 4  # exit statuses of processes.py


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "database",
    [
        pytest.param("sqlite", marks=pytest.mark.slow),
        pytest.param("postgres", marks=[pytest.mark.postgres, pytest.mark.ci]),
    ],
)
def test_a_superseded_process_commits_nothing(
    run_cases: Callable[..., Cases], database: str, request: pytest.FixtureRequest
) -> None:
    server = [] if database == "sqlite" else ["--postgres-url", request.getfixturevalue("postgres_url")]
    cases = run_cases("stops", *server)
    expected = cases.pop("undisturbed")["outcome"]
    assert expected["state"][0] == "Completed"
    assert len(cases) == 8
    for name, case in cases.items():
        assert case["outcome"] == expected, f"the successor of a process stopped at {name}"
        # Its temporary file may have been taken for garbage, and its blob may be garbage: the next resume removes it.
        assert case["end"] in (LEASE_LOST, OTHER_ERROR if "temporary file" in name else LEASE_LOST), name
        garbage = case["later"].pop("blobs nobody needs")
        assert garbage == ("before the blob" in name), name
        assert case["later"] == {key: value for key, value in expected.items() if key != "blobs nobody needs"}, name
