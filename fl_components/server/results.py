"""The result of a round: which of its values are shown, and which are withheld."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedrounds.fl_components.privacy.releases import Release, public, split_releases, withheld
from fedrounds.fl_components.rejections import RejectionCode
from fedrounds.fl_components.values import CohortStatistics, RoundResult, ServerState


def round_result(
    state: ServerState,
    statistics: CohortStatistics,
    metrics: dict[str, Release],
    seconds: dict[str, float],
    round_s: float,
    peak_memory_bytes: int,
    *,
    withholds: bool,
    hides_participation: bool,
) -> RoundResult:
    """Return the result of a round: what its row, MLflow and people see, and what a privacy claim withholds.

    Args:
      metrics: those of the evaluation and of the claim, each with the reason why it may be seen.
      seconds: the time spent in each stage. The commit is not in it: it is not over yet.
      round_s: the wall-clock time since the round was loaded, so that time between the stages counts as well. What an
        earlier attempt spent before its seal is added.
      withholds: whether values that are neither public nor charged are withheld.
      hides_participation: whether this goes for who took part as well.
    """
    seconds = {**statistics.seconds, **{name: s for name, s in seconds.items() if name != "commit"}}
    rejected = Counter[str](rejection.code for rejection in statistics.rejected.values())
    of_examples = {
        "train/loss": statistics.train_loss.mean,
        **{f"time/{name}_s": s for name, s in seconds.items()},
        "time/round_s": round_s + sum(statistics.seconds.values()),
        "memory/peak_mb": peak_memory_bytes / 1e6,
    }
    of_cohort = {  # public where each update is private itself
        "clients/selected": statistics.selected,
        "clients/received": statistics.received,
        "clients/rejected": len(statistics.rejected),
        "communication/upload_bytes": statistics.upload_bytes,
        "communication/download_bytes": statistics.download_bytes,
        "communication/largest_update_bytes": statistics.largest_bytes,
        "communication/error": statistics.compression_error.mean,
    }
    of_cohort |= statistics.metrics
    if statistics.slowest_s:
        of_cohort["communication/simulated_s"] = statistics.slowest_s
    if statistics.received:
        num_sent = statistics.received * len(state.params_D)
        of_cohort["communication/bits_per_parameter"] = 8 * statistics.upload_bytes / num_sent
    release = withheld if hides_participation else public
    metrics = metrics | {name: withheld(value) for name, value in of_examples.items()}
    metrics |= {name: release(value) for name, value in of_cohort.items()}
    finite = {  # a loss may not be; an epsilon is never dropped
        name: metric for name, metric in metrics.items() if np.isfinite(metric.value) or name.startswith("privacy/")
    }
    shown, kept = split_releases(finite, withholds=withholds)
    exhausted = [
        client_id for client_id, reason in statistics.rejected.items() if reason.code == RejectionCode.BUDGET_EXHAUSTED
    ]
    return RoundResult(
        round=state.round,
        params_digest=state.params_digest,
        metrics={name: float(value) for name, value in shown.items()},
        rejected={} if hides_participation else rejected,
        left_out=[] if hides_participation else exhausted,
        seconds={} if withholds else seconds,
        withheld={"metrics": kept, "rejected": rejected, "seconds": seconds} if withholds else {},
    )
