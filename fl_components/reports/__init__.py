"""Reports about runs: what each was promised and has spent of privacy."""

from __future__ import annotations

from fedrounds.fl_components.reports.privacy import (
    AccountReport,
    ClaimReport,
    PrivacyReport,
    epsilon_of,
    events_of,
    makes_claims,
    privacy_report,
    remaining,
    tightest_epsilon,
)

__all__ = [
    "AccountReport",
    "ClaimReport",
    "PrivacyReport",
    "epsilon_of",
    "events_of",
    "makes_claims",
    "privacy_report",
    "remaining",
    "tightest_epsilon",
]
