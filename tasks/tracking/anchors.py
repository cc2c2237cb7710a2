"""The journal's anchors in MLflow: what its head was when each run ended."""

from __future__ import annotations

from fl_components.store import Anchor, Store
from tasks.tracking import server
from tasks.tracking.run_view import ANCHOR_TAG


def anchors_in_mlflow(store: Store) -> tuple[list[Anchor], str | None]:
    """The anchors of all runs that MLflow shows, and why it could not be asked, where it could not."""
    shown = {run.run_id: run.mlflow_run_id for run in store.runs() if run.mlflow_run_id is not None}
    if not shown:
        return [], None
    uri = server.tracking_uri(store.home)
    anchors = []
    with server.quiet():
        try:
            client = server.connect(uri)
            for run_id, mlflow_run_id in shown.items():
                try:
                    tag = client.get_run(mlflow_run_id).data.tags.get(ANCHOR_TAG, "")
                except Exception as error:
                    if server.is_missing(error):
                        continue
                    raise
                rows, _, head = tag.partition(" ")
                if rows.isdecimal():
                    anchors.append(Anchor(int(rows), head, f"MLflow (run {run_id})"))
        except Exception as error:
            return anchors, f"MLflow at {server.public_uri(uri)} could not be asked: {server.reason(error)}"
    return anchors, None
