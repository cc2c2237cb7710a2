"""One ward exchanged for another, or one patient, the noise kept: what differs in any view is made from noisy
results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.test_train import Served
from tests.support import PRIVATE, clean_environment, copy_home, prefect, server_stays, wait_until

WARDS = """
import numpy as np

def load(first, scale):
    wards = {}
    for ward in range(12):
        other = OTHER and ward == 0  # whose rows are also those that training is tried with
        generator, rows = np.random.default_rng(first + (99 if other else ward)), 9 if other else 30
        x = generator.normal(size=(rows, 4)).astype("float32") * np.float32(scale if other else 1)
        y, cut = (x.sum(1) > 0).astype("int64"), rows * 2 // 3
        wards["annexe" if other else f"ward-{ward}"] = (x[:cut], y[:cut], x[cut:], y[cut:])
    return wards

def load_wide(first, scale):
    wide = {}
    for name, (x_train, y_train, x_test, y_test) in load(first, scale).items():
        wide[name] = (x_train.repeat(1250, 1), y_train, x_test.repeat(1250, 1), y_test)
    return wide

def load_patients(first, scale):
    wards = {}
    for ward in range(4):
        generator = np.random.default_rng(first + ward)
        x = generator.normal(size=(30, 4)).astype("float32")
        y = (x.sum(1) > 0).astype("int64")
        if OTHER and ward == 0:
            x[5], y[5] = x[5] * np.float32(scale), 1 - y[5]
        wards[f"ward-{ward}"] = (x[:20], y[:20], x[20:], y[20:])
    return wards
"""
FIELDS = PRIVATE | {"rounds": 3, "selection": {"kind": "poisson", "sampling_rate": 0.9}}
DATA = {"kind": "function", "path": "our_wards:load", "num_classes": 2, "arguments": {"first": 0, "scale": 10}}
ENORMOUS = DATA | {"arguments": {"first": 100, "scale": 1e30}}
PUBLIC = DATA | {"public": True, "arguments": {"first": 200, "scale": 10}}
TWO_EPOCHS = PRIVATE["training"] | {"epochs": 2}  # the second one makes the other ward's update infinite
ADAPTIVE = PRIVATE["privacy"] | {"clipping": {"kind": "adaptive", "count_noise": 5.0}}
PATIENTS = DATA | {"path": "our_wards:load_patients", "arguments": {"first": 300, "scale": 10}}
OF_EXAMPLES = {
    "kind": "example_level",
    "noise_multiplier": 2.0,
    "max_grad_norm": 1.0,
    "sampling_rate": 0.25,
    "delta": 1e-3,
}
OF_PATIENTS = {name: FIELDS[name] for name in ("name", "model")} | {
    "population": "patients",
    "rounds": 3,
    "training": {"learning_rate": 0.1, "steps": 4, "privacy": OF_EXAMPLES},
}
RUNS = {
    "fixed": FIELDS | {"population": "hospital", "data": DATA},
    "adaptive": FIELDS | {"population": "hospital", "data": DATA, "privacy": ADAPTIVE},
    "infinite": FIELDS | {"population": "clinic", "data": ENORMOUS, "training": TWO_EPOCHS},
    "waves": FIELDS
    | {
        "population": "wide",
        "data": DATA | {"path": "our_wards:load_wide", "arguments": {"first": 500, "scale": 10}},
        "selection": {"kind": "poisson", "sampling_rate": 0.5},
        "compression": {"kind": "qsgd"},
        "execution": {"memory_mb": 1},  # four of 12 clients
    },
    "patient": OF_PATIENTS | {"data": PATIENTS},
    "infinite-patient": OF_PATIENTS
    | {"population": "clinic-patients", "data": PATIENTS | {"arguments": {"first": 400, "scale": 1e38}}},
    "public": FIELDS | {"population": "demonstration", "data": PUBLIC, "rounds": 2},
}
PRIVATE_RUNS = ("fixed", "adaptive", "infinite", "waves", "patient", "infinite-patient")

TRAIN = """
import contextlib, hashlib, io, json, sys
import our_wards
from dataclasses import asdict
from pathlib import Path
from fedrounds.deployments import api, cli, privacy
from fedrounds.deployments.stack.connection import connect
from fedrounds.fl_components.server.run import Run
from fedrounds.fl_components.randomness import hkdf
from fedrounds.fl_components.store import Store

# Elsewhere keys depend on the data and on a secret: here the cohorts, the batches and the noise are the same in each
# home; but for the run with several waves, whose cohorts differ in number.
def key(run, round, purpose, *context):
    client = context[1:2] if purpose == "examples" else ()
    coins = str(our_wards.OTHER) if run.run_id == "waves" and purpose == "selection and training" else ""
    return hkdf(bytes(32), f"{run.run_id} {round} {purpose} {coins}", *client)

Run.key = key

def printed(*command):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        assert cli.main(command) == 0, out.getvalue()
    return out.getvalue()

def files(uri):
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    return {str(file.relative_to(folder)): content(file.read_bytes()) for file in folder.rglob("*") if file.is_file()}

def content(data):
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

def shown_by_mlflow(run_id):
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(run_id)
    runs = client.search_runs([experiment.experiment_id])
    models = client.search_logged_models([experiment.experiment_id])
    history = {name: client.get_metric_history(runs[0].info.run_id, name) for name in runs[0].data.metrics}
    return {
        "experiment": dict(experiment), "runs": [run.to_dictionary() for run in runs],
        "history": {name: [metric.to_dictionary() for metric in metrics] for name, metrics in history.items()},
        "models": [model.to_dictionary() for model in models],
        "registered": dict(client.get_registered_model(run_id)),
        "versions": [dict(version) for version in client.search_model_versions(f"name = '{run_id}'")],
        "artifacts": files(f"runs:/{runs[0].info.run_id}/"), "model": files(models[0].artifact_location),
    }

def answering(config):
    # The population, or each of its clients: whoever has a ledger.
    if "privacy" not in config["training"]:
        return [config["population"]]
    _, *clients = privacy.status(config["population"] + "/*")
    assert clients
    return [each["population"] for each in clients]

told = {}
for population in ("hospital", "clinic", "wide"):
    privacy.set_budget(population, epsilon=100, delta=1e-3, reason="a test")
for population in ("patients/*", "clinic-patients/*"):
    privacy.set_budget(population, epsilon=100, delta=1e-3, reason="a test")
with connect(idle_s=20) as connection:
    connection.wait()
    for run_id, config in json.loads(sys.argv[1]).items():
        news = []
        trained = api.train(config | {"name": run_id}, run_id=run_id, on_progress=news.append)
        silent = [event for event in news if event.kind != "message"]
        messages = [(position, asdict(event)) for position, event in enumerate(news) if event.kind == "message"]
        told[run_id] = {
            "trained": trained, "news": list(map(asdict, silent)), "messages": messages,
            "shown": api.show(run_id), "listed": api.runs(1), "status": privacy.status(),
            "ledgers": {name: privacy.ledger(name) for name in answering(config)},
            "statement": privacy.statement(run_id),
            "printed": {"show": printed("show", run_id), "status": printed("privacy", "status")},
        }
import mlflow
from fedrounds.tasks.tracking import server
mlflow.set_tracking_uri(server.tracking_uri(Path(sys.argv[2])))
with Store.open() as store:
    for run_id, views in told.items():
        rows = [row for row in store.journal() if row.run_id in (run_id, None)]
        views["journal"] = [{"kind": row.kind, "at": row.at, "content": row.content} for row in rows]
        views["mlflow"] = shown_by_mlflow(run_id)
print(json.dumps(told, default=dict))
"""

RANDOM = (  # ids, addresses, times of the clock, and hashes over these, wherever they stand
    (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|(?<![\w.])(m-)?[0-9a-f]{32}\b", "ID"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?|(?<![\w.])1[6-9]\d{8}\.\d+\b", "TIME"),
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"(Journal: \d+ rows, the last `)[0-9a-f]{64}(`, hub `)[0-9a-f]{16}`", r"\1HEAD\2KEY`"),
    (r"^(\d+ )[0-9a-f]{64}( [0-9a-f]{16})?$", r"\1HEAD"),  # MLflow's tag for the same
)
DURATIONS = {  # differences of two times of the clock, which are not covered
    *("total_run_time", "estimated_run_time", "estimated_start_time_delta"),  # Prefect's
    "duration_s",  # from created_at to updated_at
}

NOISED = {"update_norm", "signal_to_noise"}
STEERED = {"clipping_norm", "noise_stddev", "unclipped_fraction"}  # by the noisy count of adaptive clipping
DIGESTS = (  # of the parameters: whole as a value, shortened in a line of text
    r"params_digest = [0-9a-f]{64}",
    r"journal/\d+/content/members = [0-9a-f]{64}",  # of digests under the hub's key
    r"journal/\d+/content/digests/\w+ = [0-9a-f]{64}",  # under random keys
    r"journal/\d+/content/data_id = [0-9a-f]{64}",  # of fingerprints under the store's random key
    r"journal/\d+/content/key_id = [0-9a-f]{16}",  # the id of that key
    r"journal/\d+/content/training = [0-9a-f]{64}",  # of the noised parameters that clients start from, among others
    r"printed/show/\d+ =   parameters +sha256 [0-9a-f]{12} *",
    r"prefect/artifacts/0/data/\d+ = \*\*3 of 3 rounds\*\* committed, attempt 1\. Parameters `[0-9a-f]{16}`\.",
    r"(printed/show|prefect/artifacts/0/data)/\d+/2 = [\d.e-]+",  # of a round: its number, epsilon, and signal to noise
    r"mlflow/model/(data/model\.pt2|extra_files/params\.safetensors)/sha256 = [0-9a-f]{64}",
)


def leaves(value: Any, folder: Path, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each plain value under its path, each line of a text and each cell of a table's row; what is random or of the
    clock by a common name."""
    if isinstance(value, str) and "\n" in value:
        value = value.splitlines()
    elif isinstance(value, str) and re.fullmatch(r"\| \d.* \||\s+\d+(\s{2,}[\d.]+)+\s*", value):
        value = re.split(r" \| |\s{2,}", value.strip("| "))
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        yield f"{path} holds", ", ".join(map(str, value)) if isinstance(value, dict) else len(value)
        for name, part in parts:
            yield from leaves(part, folder, f"{path}/{name}")
    elif isinstance(value, str):
        value = value.replace(str(folder), "FOLDER")
        for pattern, name in RANDOM:
            value = re.sub(pattern, name, value)
        yield path, value
    elif isinstance(value, int | float) and (1.6e9 < value < 2e9 or 1.6e12 < value < 2e12):
        yield path, "TIME"
    else:
        yield path, "DURATION" if path.rpartition("/")[2] in DURATIONS else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two homes' views differ, with both values."""
    paths = dict.fromkeys([*one, *other])
    both = [(path, one.get(path, "nothing"), other.get(path, "nothing")) for path in paths]
    return [each for each in both if each[1] != each[2]]


def train_all(home: Path) -> subprocess.CompletedProcess[str]:
    """Every run in one process, which tells what is seen of each but in Prefect."""
    return subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(RUNS), str(home)],
        env=clean_environment(home),
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )


def shown_by_prefect(api_url: str, run_id: str, num_task_runs: int) -> dict[str, Any]:
    of_run = {"flow_runs": {"tags": {"all_": [f"run:{run_id}"]}}}

    def task_runs() -> Any:
        return prefect(api_url, "/task_runs/filter", of_run | {"sort": "EXPECTED_START_TIME_ASC"})

    def are_there() -> bool:  # Prefect writes them late
        return [task["state_type"] for task in task_runs()].count("COMPLETED") >= num_task_runs

    wait_until(are_there, f"all task runs of {run_id} are there")
    flow_runs = prefect(api_url, "/flow_runs/filter", of_run | {"sort": "START_TIME_ASC"})
    ids = [run["id"] for run in flow_runs]
    logged = {"logs": {"flow_run_id": {"any_": ids}}, "sort": "TIMESTAMP_ASC"}
    return {
        "flow_runs": flow_runs,
        "states": [prefect(api_url, f"/flow_run_states/?flow_run_id={id}") for id in ids],
        "task_runs": task_runs(),
        "artifacts": prefect(api_url, "/artifacts/filter", of_run | {"sort": "KEY_DESC"}),
        "logs": prefect(api_url, "/logs/filter", logged),
    }


def rounds_that_differ(paths: set[str]) -> set[int]:
    """From 0, by MLflow's metric of the noised update: in the first of them the other ward takes part."""
    found = (re.fullmatch(r"/mlflow/history/privacy/update_norm/(\d+)/value", path) for path in paths)
    return {int(each[1]) for each in found if each}


@pytest.mark.ci
@pytest.mark.timeout(1200)
def test_one_ward_exchanged_changes_noised_values_alone(template_home: Path, tmp_path: Path) -> None:
    """Names, counts, orders and values are equal in what commands tell, MLflow, Prefect and the journal; also where
    the other ward's update is not finite."""
    homes = {which: copy_home(template_home, tmp_path / which / "home") for which in ("one", "other")}
    for which, home in homes.items():
        (home.parent / "our_wards.py").write_text(f"OTHER = {which == 'other'}\n{WARDS}")
    with ExitStack() as servers, ThreadPoolExecutor(2) as executor:
        for home in homes.values():
            servers.enter_context(server_stays(home))
        trained = dict(zip(homes, executor.map(train_all, homes.values()), strict=True))
        seen: dict[str, dict[str, dict[str, Any]]] = {}
        for which, home in homes.items():
            assert trained[which].returncode == 0, trained[which].stderr
            views = json.loads(trained[which].stdout.splitlines()[-1])
            with Served(home) as api_url:
                for run_id, view in views.items():
                    stages = [news["stage"] for news in view["news"] if news["kind"] == "stage"]
                    num_task_runs = len(stages) + 2 * RUNS[run_id]["rounds"]  # `track`, and what stands for the round
                    view["stderr"] = trained[which].stderr
                    view["prefect"] = shown_by_prefect(api_url, run_id, num_task_runs)
            seen[which] = {run_id: dict(leaves(view, home.parent)) for run_id, view in views.items()}

    found = {run_id: differences(seen["one"][run_id], seen["other"][run_id]) for run_id in RUNS}
    leaks = []
    for run_id in PRIVATE_RUNS:
        names = "|".join(NOISED | STEERED if run_id == "adaptive" else NOISED)
        made_of_noise = re.compile(rf".*(privacy/({names})(/\d+/value)? = -?\d[\d.e-]*|{'|'.join(DIGESTS)})")
        for path, *values in found[run_id]:
            if not all(made_of_noise.fullmatch(f"{path} = {value}") for value in values):
                leaks.append((run_id, path, *values))
    assert not leaks, "\n".join(map(str, leaks))

    # Each round has as many task runs as the largest cohort needs, whatever came.
    waves = [name for name, value in seen["one"]["waves"].items() if re.fullmatch(r"/news/\d+/stage", name)]
    assert [seen["one"]["waves"][name] for name in waves].count("train") == 3 * 3

    # The comparison sees what there is: the other ward took part, with the same noise, in each view.
    for run_id in PRIVATE_RUNS:
        paths = {path for path, *_ in found[run_id]}
        assert "/trained/params_digest" in paths
        assert bool(rounds_that_differ(paths)) == (not run_id.endswith("patient"))
        assert any(path.startswith("/prefect/artifacts/0/data/") for path in paths)
    first = min(rounds_that_differ({path for path, *_ in found["adaptive"]}))
    counts = [seen[which]["adaptive"][f"/mlflow/history/privacy/unclipped_fraction/{first}/value"] for which in homes]
    assert abs(counts[0] - counts[1]) * 12 * 0.9 == pytest.approx(1)  # one ward more is clipped, the noise is equal
    # And nothing of this is withheld of public data.
    public = {path for path, *_ in found["public"]}
    assert {"/trained/metrics/train/loss", "/mlflow/history/train/loss/1/value", "/prefect/logs/1/message"} <= public
    assert any(path.startswith("/mlflow/history/eval/client/annexe") for path in public)
