"""What a run shows in Prefect while it goes on: one markdown artifact, updated behind its rounds."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.utilities.annotations import quote

from fedrounds.fl_components.reports import ClaimReport, privacy_report
from fedrounds.fl_components.reports.statement import left_out, left_out_in_words
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.store import RoundRecord, RunRecord, Store
from fedrounds.fl_components.values import RoundResult
from fedrounds.tasks.anchors import anchor_line, page_key
from fedrounds.tasks.session import Session
from fedrounds.tasks.tracking.results import primary_key
from fedrounds.tasks.tracking.server import run_url, tracking_uri

ROUNDS_SHOWN = 20
BAR_WIDTH = 30
UPDATE_INTERVAL_S = 1.0
LAST_UPDATE_S = 60.0  # how long the end of a run waits for a Prefect that does not answer


class RunArtifact:
    """The markdown page of one attempt in Prefect.

    A thread brings it up to date at most once a second: a page that cannot be written neither fails nor delays a round.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._outdated, self._ended = threading.Event(), threading.Event()
        created = create_markdown_artifact(
            self.page(),
            key=page_key(session.run_id),
            description=f"Run {session.run_id} of experiment {session.run.config.name}: its rounds, model and privacy",
        )
        assert isinstance(created, UUID)  # a coroutine only where an event loop runs, where no run is begun
        self.id = created
        # In the context of the flow, whose settings say where Prefect is.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._follow,), name="artifact", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        """A round was committed."""
        self._outdated.set()

    def close(self) -> None:
        """Bring the page up to date for the last time."""
        self._outdated.set()
        self._ended.set()
        self._thread.join(timeout=LAST_UPDATE_S)
        if self._outdated.is_set() or self._thread.is_alive():
            self.session.say("the page of this run in Prefect could not be brought up to date")

    def _follow(self) -> None:
        with get_client(sync_client=True) as client:
            ended = False
            while not ended:
                ended = self._ended.wait(UPDATE_INTERVAL_S)
                if self._outdated.is_set():
                    self._outdated.clear()
                    try:
                        client.update_artifact(self.id, ArtifactUpdate(data=self.page()))
                    except Exception:  # Prefect or the store may be away for a while: try again
                        self._outdated.set()

    def page(self) -> str:
        run = self.session.run
        record = run.store.run(run.run_id)
        rows = run.store.rounds(record.run_id, after=max(0, record.committed_round - ROUNDS_SHOWN))
        lines = [
            f"# {record.name} / {record.run_id}",
            "",
            f"**{record.committed_round} of {record.rounds} rounds** committed, attempt {record.attempt}. "
            f"Parameters `{record.params_digest[:16]}`.",
            "",
            *_end(record),
            *_privacy(run),
            *_left_out(rows),
            "",
            f"MLflow: {_mlflow_address(run.store, record)}",
            "",
            *_table(rows[::-1], record.config["evaluation"]["primary"]),
            "",
            anchor_line(run.store),
        ]
        return "\n".join(lines)


def _end(run: RunRecord) -> list[str]:
    """Why a run ended before its last round."""
    return [f"**{run.state}**: {run.error['message']}.", ""] if run.error else []


def _left_out(rows: Sequence[RoundRecord]) -> list[str]:
    found = left_out(rows)
    if not found:
        return []
    return [f"Left out of the rounds below, since their budgets are spent: {left_out_in_words(found)}."]


def _privacy(run: Run) -> list[str]:
    """Return what is claimed, and how much of each budget is left, as a bar."""
    report = privacy_report(run.store, run.record, run.config)
    lines = ["Privacy: a larger cohort is simulated; no claim."] * (report.simulated is not None)
    for each in report.claims:
        lines += _claim(each)
    return lines or ["Privacy: no claim."]


def _claim(report: ClaimReport) -> list[str]:
    """Return the lines of one claim: with a line for each client where each pays and there are not too many."""
    terms = report.terms
    meaning = f" at delta {terms.delta:g} ({terms.unit}, {terms.neighbouring}, {terms.accountant})"
    meaning += "; a demonstration, as the data are public" * terms.demonstration
    if not report.account.is_template:
        lines = [f"Privacy: this run has come to **epsilon {report.epsilon:.4g}**{meaning}.", ""]
        if terms.epsilon is None:
            return [*lines, f"Its population `{report.account}` has spent {report.total:.4g}; nothing limits it."]
        bar = _bar(report.total, terms.epsilon)
        return [*lines, f"Population `{report.account}`: {bar} {report.total:.4g} of {terms.epsilon:g} spent."]
    if not report.num_accounts:
        return []
    whose = "each client's examples" if terms.unit == "example" else "each client"
    lines = [f"Privacy of {whose}: this run has come to at most **epsilon {report.epsilon:.4g}**{meaning}."]
    lines[0] += " That is the whole only if nobody is in two clients' data."
    if report.clients is None:
        return [*lines, "", f"By all runs a client has spent at most {report.total:.4g}.", ""]
    lines += ["", "| client | this run | in all | limit |", "|---|---:|---:|---|"]
    for name, each in report.clients.items():
        limit = "none" if each.limit is None else f"{_bar(each.total, each.limit)} {each.limit:g}"
        lines.append(f"| {name} | {each.epsilon:.4g} | {each.total:.4g} | {limit} |")
    return [*lines, ""]


def _bar(spent: float, limit: float) -> str:
    filled = min(BAR_WIDTH, round(spent / limit * BAR_WIDTH)) if limit else BAR_WIDTH
    return f"`{'█' * filled}{'░' * (BAR_WIDTH - filled)}`"


COLUMNS: Final = {
    "train loss": ("train/loss", ".4f"),
    "eval loss": ("eval/loss", ".4f"),
    "epsilon": ("privacy/epsilon", ".4g"),
    "of examples": ("privacy/example/epsilon", ".4g"),
    "signal to noise": ("privacy/signal_to_noise", ".3g"),
    "selected": ("clients/selected", ",.0f"),
    "received": ("clients/received", ",.0f"),
    "bytes up": ("communication/upload_bytes", ",.0f"),
    "bytes down": ("communication/download_bytes", ",.0f"),
    "lost in compression": ("communication/error", ".3f"),
    "simulated s": ("communication/simulated_s", ".2f"),
    "seconds": ("time/round_s", ".3f"),
}


def _table(rows: Sequence[RoundRecord], primary: str) -> list[str]:
    """The rounds, with a column for what is known of any: not for what a claim withholds."""
    values: list[Mapping[str, float]] = [row.result["metrics"] for row in rows]
    columns = {"train loss": COLUMNS["train loss"], "eval loss": COLUMNS["eval loss"]}
    columns |= {primary: (primary_key(primary), ".4f")} if primary != "loss" else {}
    columns |= COLUMNS
    names = [name for name, (metric, _) in columns.items() if any(metric in each for each in values)]
    headings = ["epsilon" if name == "of examples" and "epsilon" not in names else name for name in names]
    lines = [f"| round | {' | '.join(headings)} |", "|---:" * (len(names) + 1) + "|"] if rows else []
    if "of examples" in names:
        which = "epsilon of examples" if "epsilon" in names else "epsilon"
        lines = [f"In this table the {which} is that of the client that has spent most.", "", *lines]
    for row, metrics in zip(rows, values, strict=True):
        shown = [format(metrics[m], form) if m in metrics else "" for m, form in map(columns.__getitem__, names)]
        lines.append(f"| {row.round} | {' | '.join(shown)} |")
    return lines


def _mlflow_address(store: Store, run: RunRecord) -> str:
    url = run_url(tracking_uri(store.home), run.mlflow_run_id) if run.mlflow_run_id else None
    return url or f"experiment {run.name}, run {run.run_id} (`fedrounds ui` serves its page)"


@task(name="track", task_run_name="track", cache_policy=NO_CACHE, persist_result=False)
def _track(session: Session, result: RoundResult) -> None:
    assert session.tracker is not None and session.artifact is not None
    session.tracker.wake()
    session.artifact.wake()
    session.tell("round", round=result.round, metrics=result.metrics, seconds=result.seconds)


def track(session: Session, result: RoundResult) -> None:
    """Show a committed round: to the listeners, and in MLflow and Prefect's artifact, which are written behind it."""
    run: Any = _track  # its arguments are wrapped, which the type of a task cannot say
    run(quote(session), quote(result))
