"""What a run came to, as its last rounds say."""

from __future__ import annotations

from collections.abc import Sequence

from fedrounds.fl_components.store import RoundRecord, RunRecord, Store


def recent_rounds(store: Store, run: RunRecord) -> list[RoundRecord]:
    """The run's last rounds, as far back as an evaluation."""
    return store.rounds(run.run_id, after=run.committed_round - run.config["evaluation"]["every"])


def evaluated(rounds: Sequence[RoundRecord]) -> dict[str, float]:
    """The metrics of the last of these rounds that was evaluated; empty when none was."""
    metrics: list[dict[str, float]] = [row.result["metrics"] for row in reversed(rounds)]
    return next((found for found in metrics if "eval/accuracy" in found), {})
