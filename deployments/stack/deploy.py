"""`fedrounds deploy`: scheduled trainings and audits, registered as `deployments/prefect.yaml` describes them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedrounds.deployments.stack.connection import Connection, Say, client_settings, connect, silent
from fedrounds.fl_components.errors import ConfigError, Unreachable
from fedrounds.fl_components.store.home import home as default_home

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.schedules import CronSchedule

PREFECT_FILE = Path(__file__).resolve().parents[1] / "prefect.yaml"
WORK_POOL = "fedrounds"


def deploy(
    config: str | Path,
    *,
    overrides: Sequence[str] = (),
    cron: str | None = None,
    audit: str | None = None,
    active: bool = False,
    name: str | None = None,
    home: Path | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """Registers (or replaces) the deployment `federated-training/NAME`, whose runs train `config`.

    Args:
        config: the configuration file; each run reads it again.
        overrides: "field.path=value" settings, after the file's own and `model.start_from=latest`.
        cron: when to run (UTC); by default every night at 3.
        audit: when to audit the privacy mechanism of the experiment's newest run as well (UTC), as the deployment
            `privacy-audit/NAME`; None registers none, and leaves one that is there as it is.
        active: whether the schedules are switched on at once.
        name: by default the configuration file's name without its suffix.

    Returns: name, deployment_id, url (of its page in Prefect's UI), work_pool, cron, active, config, overrides, and the
    same of the audit, with `run`, or None.

    Raises `ConfigError` if there is no such file, a schedule is none or there is nothing to audit, `Unreachable` if the
    Prefect server does not answer or refuses the deployment. Runs start only while a worker is there: `fedrounds up`.
    """
    config_path = Path(config).expanduser().absolute()
    if not config_path.is_file():
        raise ConfigError(f"there is no configuration file {config_path}", hint="give the path of a YAML file")
    document = yaml.safe_load(PREFECT_FILE.read_text(encoding="utf-8"))
    training, auditing = document["deployments"]
    name = name or config_path.stem
    experiment = _experiment_under_a_claim(config_path, overrides) if audit is not None else None
    with connect(home, say) as connection:
        timing, audit_timing = _timing(training, cron), _timing(auditing, audit)  # both, before either is registered
        with _registering(connection) as client:
            register = partial(_register, client, document["pull"], name=name, active=active)
            settings = [*training["parameters"]["overrides"], *overrides]
            found = register(training, timing, parameters={"config": str(config_path), "overrides": settings})
            audited = None if experiment is None else register(auditing, audit_timing, parameters={"run": experiment})
    return found | {"audit": audited}


def _experiment_under_a_claim(config: Path, overrides: Sequence[str]) -> str:
    from fedrounds.fl_components.config import load_config  # with which PyTorch comes

    resolved = load_config(config, overrides)
    if not resolved.charged_claims:
        why = "a larger cohort is simulated" if resolved.claims else f"privacy.kind is {resolved.privacy.kind}"
        raise ConfigError(
            f"{config} claims nothing that could be audited: {why}",
            hint="deploy it without an audit, or make it a claim about its own clients",
        )
    return resolved.name


def _timing(definition: dict[str, Any], cron: str | None) -> CronSchedule:
    from prefect.client.schemas.schedules import CronSchedule

    (schedule,) = definition["schedules"]
    try:
        return CronSchedule(cron=cron or schedule["cron"], timezone=schedule["timezone"])
    except ValueError as error:
        raise ConfigError(
            f"{cron!r} is not a cron schedule", hint='five fields, for instance "0 3 * * *" for every night at 3'
        ) from error


@contextmanager
def _registering(connection: Connection) -> Iterator[SyncPrefectClient]:
    """A client of the server, in which the work pool is there."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with client_settings(connection), get_client(sync_client=True) as client:
            _ensure_work_pool(client)
            yield client
    except httpx.HTTPError as error:
        raise Unreachable(
            f"the Prefect server did not take the deployment: {error}",
            hint="look at PREFECT_API_KEY or PREFECT_API_AUTH_STRING if it asks for one",
        ) from error


def _register(
    client: SyncPrefectClient,
    pull: list[dict[str, Any]],
    definition: dict[str, Any],
    timing: CronSchedule,
    *,
    name: str,
    parameters: dict[str, Any],
    active: bool,
) -> dict[str, Any]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyOptions
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.urls import url_for

    module, _, function = definition["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), function)
    limit = definition["concurrency_limit"]
    deployment_id = client.create_deployment(
        flow_id=client.create_flow(flow),
        name=name,
        description=definition["description"],
        entrypoint=definition["entrypoint"],
        pull_steps=pull,
        tags=definition["tags"],
        parameters=parameters,
        parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
        enforce_parameter_schema=definition["enforce_parameter_schema"],
        schedules=[DeploymentScheduleCreate(schedule=timing, active=active)],
        concurrency_limit=limit["limit"],
        concurrency_options=ConcurrencyOptions(collision_strategy=limit["collision_strategy"]),
        work_pool_name=definition["work_pool"]["name"],
        paused=False,
    )
    return {
        "name": f"{flow.name}/{name}",
        "deployment_id": str(deployment_id),
        "url": url_for("deployment", obj_id=deployment_id),
        "work_pool": definition["work_pool"]["name"],
        "cron": timing.cron,
        "active": active,
        **parameters,
    }


def enter_home() -> dict[str, str]:
    """The deployment's pull step: the folder in which a flow run works, on the worker's machine.

    It holds no code, so nothing in it can take the place of an installed package.
    """
    folder = default_home() / "work"
    folder.mkdir(exist_ok=True)
    return {"directory": str(folder)}


def _ensure_work_pool(client: SyncPrefectClient) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        try:
            client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template))
        except ObjectAlreadyExists:
            return  # a worker was quicker
