"""What tests of whole trainings share: homes whose databases are made, the console script, and Prefect's REST API."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import settings

from fedrounds.fl_components.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
FEDROUNDS = Path(sys.executable).with_name("fedrounds")
HEART = ROOT / "examples" / "heart_disease.yaml"
CONFIGURES = ("PREFECT_", "MLFLOW_", "FEDROUNDS_")
DEADLINE_S = 120.0
FULL_EXAMPLES, QUICK_EXAMPLES = 100, 10  # of each property

# Makes all databases of a home: the store's, MLflow's and Prefect's.
MAKE_HOME = """
import os
from pathlib import Path
from fedrounds.deployments.stack.connection import connect
from fedrounds.fl_components.store import Store
from fedrounds.tasks.tracking import server
home = Path(os.environ["FEDROUNDS_HOME"])
with connect(idle_s=0.5) as connection:
    Store.open().close()
    with server.quiet():
        server.connect(server.tracking_uri(home))
    connection.wait()
"""


PRIVATE: dict[str, Any] = {
    "name": "ward",
    "population": "wards",
    "rounds": 5,
    "data": {"kind": "digits", "partition": {"kind": "iid", "num_clients": 20}},
    "model": {"kind": "logistic_regression"},
    "training": {"learning_rate": 0.1, "batch_size": 32, "epochs": 1},
    "selection": {"kind": "poisson", "sampling_rate": 0.5},
    "aggregation": {"weights": "uniform"},
    "privacy": {
        "kind": "central",
        "noise_multiplier": 1.5,
        "clipping": {"kind": "fixed", "norm": 0.5},
        "delta": 1e-3,
    },
}
"""The configuration of a small run under a privacy claim."""


def cases(in_full: int) -> int:
    """How many cases of a property hypothesis generates: as many with its profile "full", fewer with "quick".

    A property test without a number of its own follows the profile by itself.
    """
    return max(min(in_full, 2), in_full * settings().max_examples // FULL_EXAMPLES)


def parameters(values: Iterable[Any], *, quick: Container[Any]) -> list[Any]:
    """Parameters of a test, of which those that are not among `quick` are left to continuous integration."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.ci) for value in values]


def clean_environment(home: Path) -> dict[str, str]:
    """This environment with nothing configured but the home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CONFIGURES)}
    return {**kept, "FEDROUNDS_HOME": str(home), "HOME": str(home.parent), "NO_COLOR": "1"}


def use_home(folder: Path, environment: pytest.MonkeyPatch) -> None:
    """Makes `folder` this process's home, wherever the caller's environment has the store."""
    environment.setenv("FEDROUNDS_HOME", str(folder))
    for name in ("FEDROUNDS_DATABASE_URL", "FEDROUNDS_BLOBS_URL"):
        environment.delenv(name, raising=False)


def make_template_home(folder: Path) -> Path:
    """A home in which nothing has run yet, made once in `folder` however many processes ask for it."""
    home = folder / "home"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            home.mkdir(mode=0o700)
            subprocess.run([sys.executable, "-c", MAKE_HOME], env=clean_environment(home), cwd=home, check=True)
            wait_until(lambda: not server_is_up(home), "the template's server leaves")
            (folder / "made").touch()
    return home


def copy_home(template: Path, target: Path) -> Path:
    """A home of one's own; the files of Prefect's pages are shared."""
    shutil.copytree(template, target, ignore=shutil.ignore_patterns("ui", "*.lock", "server.json"))
    (target / "prefect" / "ui").symlink_to(template / "prefect" / "ui")
    return target


Fedrounds = Callable[..., "subprocess.CompletedProcess[str]"]


def run_fedrounds(home: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The console script in `home`, to its end; keywords are further environment variables."""
    return subprocess.run(
        [str(FEDROUNDS), *map(str, arguments)],
        env=clean_environment(home) | environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )


def start_fedrounds(home: Path, *arguments: str | Path, **environment: str) -> subprocess.Popen[bytes]:
    """The console script in `home`, in the background; what it says goes to a file beside the home."""
    with open(home.parent / "fedrounds.log", "ab") as log:
        return subprocess.Popen(
            [str(FEDROUNDS), *map(str, arguments)],
            env=clean_environment(home) | environment,
            cwd=home.parent,
            stdout=log,
            stderr=log,
        )


def data_of(completed: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """`data` of a command's --json, which must have gone well."""
    assert completed.returncode == 0, completed.stderr + completed.stdout
    answer = json.loads(completed.stdout)
    assert answer["status"] == "ok"
    data: dict[str, Any] = answer["data"]
    return data


def prefect(api_url: str, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    """What Prefect's REST API answers: a POST where there is a body, else a GET."""
    request = urllib.request.Request(
        f"{api_url}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"null")


def told_by_mlflow(home: Path, script: str, *arguments: str) -> Any:
    """What a script prints as its last line, in JSON; `client` in it asks the home's MLflow, `sys.argv[1:]` are the
    arguments. In a process of its own: importing mlflow here would slow all other tests of this process."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    lines = ["import json, sys, mlflow", f"mlflow.set_tracking_uri({uri!r})", "client = mlflow.MlflowClient()", script]
    answer = subprocess.run(
        [sys.executable, "-c", "\n".join(lines), *arguments],
        env=clean_environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])


def missing(component: str) -> NoReturn:
    """Skips the test on a user's machine; in CI, where everything is there, it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(component)
    pytest.skip(component)


@contextmanager
def public_data() -> Iterator[None]:
    """Where a public data set that is used inside is not on this machine, the test is skipped (in CI: fails)."""
    try:
        yield
    except DataError as error:
        if not error.message.startswith("the files of"):
            raise
        missing(error.message)


@contextmanager
def server_stays(home: Path) -> Iterator[None]:
    """Prefect's server that a command starts in `home` goes on after it: all that it was sent is written."""
    from fedrounds.deployments.stack.files import server_files, try_lock

    interest = try_lock(server_files(home).clients_lock, exclusive=False)
    assert interest is not None
    try:
        yield
    finally:
        os.close(interest)


def server_is_up(home: Path) -> bool:
    from fedrounds.deployments.stack.files import is_locked, server_files

    return is_locked(server_files(home).server_lock)


def wait_until(
    condition: Callable[[], Any],
    what: str | Callable[[], str],
    deadline_s: float = DEADLINE_S,
    *,
    look_every_s: float = 0.05,
) -> None:
    """Until `condition` holds; fails at a deadline that a busy machine meets as well, and says then `what` does not."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what if isinstance(what, str) else what()}"
        time.sleep(look_every_s)
