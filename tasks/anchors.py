"""Anchors of the journal: what its head was, kept where a restored or shortened store does not reach.

MLflow has one in each run's tags, and Prefect one in each run's page; both are renewed while the run goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from fedrounds.fl_components.errors import JournalBroken
from fedrounds.fl_components.store import Anchor, RunRecord, Sighting, Store
from fedrounds.tasks.tracking import server
from fedrounds.tasks.tracking.run_view import ANCHOR_TAG, RUN_ID_TAG
from fedrounds.tasks.tracking.sweep_view import CREATED_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact

_LINE: Final = re.compile(r"^Journal: (\d+) rows, the last `([0-9a-f]{64})`, hub `([0-9a-f]+)`\.$", re.MULTILINE)
_ROUNDS: Final = re.compile(r"^\*\*(\d+) of \d+ rounds\*\* committed", re.MULTILINE)
_TAG: Final = re.compile(r"(\d+) ([0-9a-f]{64}) [0-9a-f]+")
_PAGE: Final = 200

ROUND_METRICS: Final = frozenset({"privacy/epsilon", "privacy/epsilon_simulated", "privacy/example/epsilon"})
"""Metrics of which every round under a claim has one."""


def anchor_line(store: Store) -> str:
    """The journal's head as a line of a page in Prefect."""
    head = store.journal_head()
    return f"Journal: {head.rows} rows, the last `{head.head}`, hub `{store.keys.signing.id}`."


def page_key(run_id: str) -> str:
    """The key of a run's page in Prefect, which takes no other letters."""
    return "run-" + re.sub("[^a-z0-9]", "-", run_id.lower())


def anchors_in_prefect(client: SyncPrefectClient, store: Store) -> list[Anchor]:
    """Those in the pages of all runs of this store that a Prefect server shows."""
    return [each for page in _pages(client) if (each := _anchor_of_page(page, store)) is not None]


def _anchor_of_page(page: Artifact, store: Store) -> Anchor | None:
    match = _LINE.search(page.data if isinstance(page.data, str) else "")
    if match is None or match[3] not in store.keys.trusted:  # another store's, on the same server
        return None
    return Anchor(int(match[1]), match[2], f"Prefect (page {page.key})")


def sightings(client: SyncPrefectClient, store: Store, run: RunRecord) -> tuple[list[Sighting], list[str]]:
    """What Prefect and MLflow show of a run, each with an anchor; and why one of them could not be asked."""
    found, problems = [], []
    for where, look in (
        ("Prefect", lambda: _in_prefect(client, store, run)),
        ("MLflow", lambda: _in_mlflow(store, run)),
    ):
        try:
            found += look()
        except Exception as error:  # whatever they raise: a view that is away does not stop a run
            problems.append(f"{where} could not be asked for the journal's anchors: {server.reason(error)}")
    return found, problems


def _in_prefect(client: SyncPrefectClient, store: Store, run: RunRecord) -> list[Sighting]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[page_key(run.run_id)]))
    found = []
    for page in client.read_artifacts(artifact_filter=wanted, limit=_PAGE):
        anchor, rounds = _anchor_of_page(page, store), _ROUNDS.search(page.data if isinstance(page.data, str) else "")
        if anchor is not None and rounds is not None:
            found.append(Sighting(anchor.where, int(rounds[1]), anchor))
    return found


def _in_mlflow(store: Store, run: RunRecord) -> list[Sighting]:
    uri = server.tracking_uri(store.home)
    if not server.is_there(uri):
        return []
    with server.quiet():
        client = server.connect(uri)
        ids = [each.experiment_id for each in client.search_experiments(filter_string=f"name = '{run.name}'")]
        wanted = f"tags.`{RUN_ID_TAG}` = '{run.run_id}'"
        found = []
        for shown in client.search_runs(ids, filter_string=wanted, max_results=_PAGE) if ids else ():
            match = _TAG.fullmatch(shown.data.tags.get(ANCHOR_TAG, ""))
            ours = shown.data.tags.get(CREATED_TAG) == repr(run.created_at)
            if match is not None and ours:  # else another store's run of that id
                where = f"MLflow (run {shown.info.run_id})"
                steps = [0]
                for name in ROUND_METRICS & shown.data.metrics.keys():
                    steps += [each.step for each in client.get_metric_history(shown.info.run_id, name)]
                found.append(Sighting(where, max(steps), Anchor(int(match[1]), match[2], where)))
        return found


def _pages(client: SyncPrefectClient) -> Iterator[Artifact]:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    wanted, offset = ArtifactFilter(key=ArtifactFilterKey(like_="run-%")), 0
    while True:
        pages = client.read_artifacts(artifact_filter=wanted, limit=_PAGE, offset=offset)
        yield from pages
        if len(pages) < _PAGE:
            return
        offset += _PAGE


def anchors_in_mlflow(store: Store) -> tuple[list[Anchor], str | None]:
    """Those in all runs of trusted hubs that MLflow shows, also of runs that the store does not know any more; and why
    it could not be asked, where it could not. Raises `JournalBroken` for what is no anchor."""
    uri = server.tracking_uri(store.home)
    if not server.is_there(uri):
        return [], None
    anchors = []
    with server.quiet():
        try:
            client = server.connect(uri)
            for hub in store.keys.trusted:
                for run in _runs(client, hub):
                    where = f"MLflow (run {run.data.tags.get(RUN_ID_TAG)})"
                    match = _TAG.fullmatch(run.data.tags[ANCHOR_TAG])
                    if match is None:
                        raise JournalBroken(f"{where} has an anchor that nobody of us wrote", hint="look at its tags")
                    anchors.append(Anchor(int(match[1]), match[2], where))
        except JournalBroken:
            raise
        except Exception as error:
            return anchors, f"MLflow at {server.public_uri(uri)} could not be asked: {server.reason(error)}"
    return anchors, None


def _runs(client: MlflowClient, hub: str) -> Iterator[Run]:
    ids = [each.experiment_id for each in client.search_experiments()]
    token: str | None = None
    while ids:
        wanted = f"tags.`{ANCHOR_TAG}` LIKE '% {hub}'"
        page = client.search_runs(ids, filter_string=wanted, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
