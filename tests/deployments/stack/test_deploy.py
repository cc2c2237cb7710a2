from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from fedrounds.deployments.stack import deploy as deploy_module
from fedrounds.deployments.stack.connection import client_settings, connect
from fedrounds.deployments.stack.deploy import PREFECT_FILE, deploy, enter_home
from fedrounds.fl_components.errors import ConfigError
from tests.support import PRIVATE


def read_back(home: Path, deployment_id: str) -> dict[str, Any]:
    """What the server keeps of a deployment, but for ids and times."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.schedules import CronSchedule

    with connect(home) as connection, client_settings(connection), get_client(sync_client=True) as client:
        found = client.read_deployment(UUID(deployment_id))
        flow_name = client.read_flow(found.flow_id).name
        (schedule,) = found.schedules
    assert isinstance(schedule.schedule, CronSchedule)
    assert found.global_concurrency_limit is not None and found.concurrency_options is not None
    return {
        "name": f"{flow_name}/{found.name}",
        "description": found.description,
        "entrypoint": found.entrypoint,
        "pull_steps": found.pull_steps,
        "tags": found.tags,
        "parameters": found.parameters,
        "schema": found.parameter_openapi_schema,
        "enforced": found.enforce_parameter_schema,
        "cron": schedule.schedule.cron,
        "timezone": schedule.schedule.timezone,
        "active": schedule.active,
        "paused": found.paused,
        "limit": found.global_concurrency_limit.limit,
        "collision": found.concurrency_options.collision_strategy.value,
        "work_pool": found.work_pool_name,
        "path": found.path,
        "storage": found.storage_document_id,
        "job_variables": found.job_variables,
    }


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "heart disease.yaml"
    path.write_text("name: heart-disease\n")
    return path


def test_deploy_registers_an_idle_nightly_training(shared_home: Path, stand_in: Path, config: Path) -> None:
    deployed = deploy(config, overrides=["rounds=3"], home=shared_home)
    parameters = {"config": str(config), "overrides": ["model.start_from=latest", "rounds=3"]}
    kept = read_back(shared_home, deployed["deployment_id"])
    assert set(kept.pop("schema")["properties"]) == {"config", "overrides", "run_id"}
    assert kept == {
        "name": "federated-training/heart disease",
        "description": "Federated training that continues from the latest model of the same name.",
        "entrypoint": "stand_in.federated_training",
        "pull_steps": [{"fedrounds.deployments.stack.deploy.enter_home": {}}],
        "tags": ["fedrounds"],
        "parameters": parameters,
        "enforced": True,
        "cron": "0 3 * * *",
        "timezone": "UTC",
        "active": False,
        "paused": False,
        "limit": 1,
        "collision": "ENQUEUE",
        "work_pool": "fedrounds",
        "path": None,
        "storage": None,
        "job_variables": {},
    }
    assert deployed.pop("url").endswith(f"/deployments/deployment/{deployed.pop('deployment_id')}")
    assert deployed == {
        "name": "federated-training/heart disease",
        "work_pool": "fedrounds",
        "cron": "0 3 * * *",
        "active": False,
        "audit": None,
        **parameters,
    }


def test_an_audit_of_the_newest_run_can_be_scheduled_beside_it(shared_home: Path, tmp_path: Path) -> None:
    config = tmp_path / "ward.yaml"
    config.write_text(json.dumps(PRIVATE))
    deployed = deploy(config, audit="0 5 * * 2", active=True, home=shared_home)
    audit = deployed["audit"]
    assert (audit["name"], audit["cron"], audit["run"]) == ("privacy-audit/ward", "0 5 * * 2", PRIVATE["name"])
    kept = read_back(shared_home, audit["deployment_id"])
    assert set(kept["schema"]["properties"]) == {"run", "num_canaries"}
    assert (kept["entrypoint"], kept["parameters"]) == ("fedrounds.flows.audit.privacy_audit", {"run": PRIVATE["name"]})
    assert (kept["cron"], kept["active"]) == ("0 5 * * 2", True)


@pytest.mark.parametrize("privacy", [{"kind": "none"}, PRIVATE["privacy"] | {"simulate_noise_cohort": 450}])
def test_nothing_claimed_is_nothing_to_audit(shared_home: Path, tmp_path: Path, privacy: dict[str, Any]) -> None:
    config = tmp_path / "ward.yaml"
    config.write_text(json.dumps(PRIVATE | {"privacy": privacy}))
    with pytest.raises(ConfigError, match="claims nothing that could be audited"):
        deploy(config, audit="0 5 * * 2", home=shared_home)


def test_deploying_again_replaces(shared_home: Path, stand_in: Path, config: Path) -> None:
    first = deploy(config, name="ward", home=shared_home)
    second = deploy(config, name="ward", cron="*/5 * * * *", active=True, overrides=["rounds=1"], home=shared_home)
    assert second["deployment_id"] == first["deployment_id"]
    kept = read_back(shared_home, second["deployment_id"])
    assert (kept["name"], kept["cron"], kept["active"]) == ("federated-training/ward", "*/5 * * * *", True)
    assert kept["parameters"]["overrides"] == ["model.start_from=latest", "rounds=1"]
    deploy(config, name="ward", home=shared_home)
    assert read_back(shared_home, first["deployment_id"])["active"] is False


@pytest.mark.ci
def test_prefects_own_command_line_registers_the_same(shared_home: Path, stand_in: Path, config: Path) -> None:
    with connect(shared_home) as connection:
        environment = {**os.environ, **connection.environment(), "FEDROUNDS_CONFIG": str(config)} | {
            "FEDROUNDS_EXPERIMENT": "heart-disease"
        }
    deployment_id = deploy(config, name="training", home=shared_home)["deployment_id"]
    ours = read_back(shared_home, deployment_id)
    _delete(shared_home, deployment_id)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    ran = subprocess.run(
        [*command, "--prefect-file", str(deploy_module.PREFECT_FILE)],
        env=environment,
        cwd=config.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = re.search(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", ran.stdout)
    assert found is not None, ran.stdout
    theirs = read_back(shared_home, found.group())
    assert theirs.pop("path") in (None, ".")  # of no use beside a pull step
    assert theirs == {name: value for name, value in ours.items() if name != "path"}


def _delete(home: Path, deployment_id: str) -> None:
    from prefect.client.orchestration import get_client

    with connect(home) as connection, client_settings(connection), get_client(sync_client=True) as client:
        client.delete_deployment(UUID(deployment_id))


def test_a_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        deploy(tmp_path / "missing.yaml")


def test_a_schedule_that_is_none_is_refused(shared_home: Path, stand_in: Path, config: Path) -> None:
    with pytest.raises(ConfigError, match="'tomorrow' is not a cron schedule"):
        deploy(config, cron="tomorrow", home=shared_home)


def test_the_shipped_file_names_what_exists(tmp_path: Path) -> None:
    document = yaml.safe_load(PREFECT_FILE.read_text())
    entrypoints = [each["entrypoint"] for each in document["deployments"]]
    assert entrypoints == ["fedrounds.flows.training.federated_training", "fedrounds.flows.audit.privacy_audit"]
    assert document["pull"] == [{f"{enter_home.__module__}.{enter_home.__name__}": {}}]
    os.environ["FEDROUNDS_HOME"] = str(tmp_path / "home")
    assert enter_home() == {"directory": str(tmp_path / "home" / "work")}
    assert (tmp_path / "home" / "work").is_dir()
