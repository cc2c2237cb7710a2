"""The signed record of every durable step: the functions behind `fedrounds journal`."""

from __future__ import annotations

from typing import Any

from fedrounds.fl_components.errors import Unreachable
from fedrounds.fl_components.store import Anchor, Store


def verify() -> dict[str, Any]:
    """Check the journal's chain and signatures, that the other tables are what it says, and that it goes on from the
    anchors in this home, in MLflow, and in Prefect where a server runs already.

    {rows, head, anchors, not_reached}: how many anchors agree, and why others could not be asked. Raises
    `JournalBroken`, naming the first row that is wrong.
    """
    from fedrounds.tasks.anchors import anchors_in_mlflow

    with Store.open() as store:
        in_mlflow, mlflow_problem = anchors_in_mlflow(store)
        in_prefect, prefect_problem = _anchors_in_prefect(store)
        report = store.verify_journal([*in_mlflow, *in_prefect])
        return {
            "rows": report.rows,
            "head": report.head,
            "anchors": len(in_mlflow) + len(in_prefect),
            "not_reached": [each for each in (mlflow_problem, prefect_problem) if each is not None],
        }


def key() -> dict[str, Any]:
    """The public key with which this hub signs: {key, key_id}."""
    with Store.open() as store:
        return {"key": store.keys.signing.public.hex(), "key_id": store.keys.signing.id}


def trust(key: str) -> dict[str, Any]:
    """Trust another hub's public key, in hex: {key_id}. Raises `ConfigError`."""
    with Store.open() as store:
        return {"key_id": store.keys.trust(key)}


def _anchors_in_prefect(store: Store) -> tuple[list[Anchor], str | None]:
    from fedrounds.deployments.stack.connection import client_settings, connect, is_running

    if not is_running(store.home):
        return [], "Prefect was not asked: no server runs (`fedrounds ui` starts one)"
    import httpx
    from prefect.client.orchestration import get_client

    from fedrounds.tasks.anchors import anchors_in_prefect

    try:
        with connect(store.home) as connection, client_settings(connection), get_client(sync_client=True) as client:
            return anchors_in_prefect(client, store), None
    except (Unreachable, httpx.HTTPError) as error:
        return [], f"Prefect could not be asked: {error}"
