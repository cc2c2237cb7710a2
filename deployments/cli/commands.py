"""What each command does: call the Python interface, then say the answer to programs and to people.

A command imports what it needs when it runs: `fedrounds --help` must not wait for torch, Prefect or MLflow.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Group

from fedrounds.deployments.cli.screen import CliOutput, CommandResult
from fedrounds.fl_components.errors import ConfigError

if TYPE_CHECKING:
    from fedrounds.tasks.progress import Progress
from fedrounds.deployments.cli.parameters import Config, OnScreen, Overrides, need_server

WithMlflow = Annotated[
    bool, Parameter(negative=(), help="Delete their MLflow runs and models too, but for models with an alias.")
]


Unfinished = Annotated[bool, Parameter(negative=(), help="Include runs that a resume could take further.")]


Yes = Annotated[bool, Parameter(name=["--yes", "-y"], negative=(), help="Do not ask.")]


def train(
    config: Config,
    /,
    *,
    overrides: Overrides = None,
    run_id: Annotated[str | None, Parameter(help="The new run's id, or that of a run to resume.")] = None,
    profile: Annotated[Path | None, Parameter(help="Write a trace of where the time goes to this file.")] = None,
    screen: OnScreen,
) -> CommandResult:
    """Train a model by federated rounds."""

    def call(on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        from fedrounds.deployments import api

        return api.train(config, overrides=overrides or (), run_id=run_id, on_progress=on_progress, profile=profile)

    return _train("train", config, call, screen)


def sweep(
    config: Config,
    /,
    *,
    over: Annotated[
        list[str],
        Parameter(negative=(), help="A field and its values: training.learning_rate=0.01,0.1. Again for each axis."),
    ],
    overrides: Overrides = None,
    sweep_id: Annotated[str | None, Parameter(help="The new sweep's id, or that of a sweep to resume.")] = None,
    screen: OnScreen,
) -> CommandResult:
    """Train once for each cell of a grid of settings, and compare them in MLflow."""

    def call(on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        from fedrounds.deployments import api

        return api.sweep(config, over, overrides=overrides or (), sweep_id=sweep_id, on_progress=on_progress)

    return _train("sweep", config, call, screen)


def resume(
    run: Annotated[str | None, Parameter(help="The id of a run or a sweep. Without it: the latest unfinished.")] = None,
    /,
    *,
    fresh_collection: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Under a privacy claim: count what may have been released as spent, and collect the next round at a "
            "further charge, with a new secret.",
        ),
    ] = False,
    accept_changed_data: Annotated[
        bool,
        Parameter(negative=(), help="Without a privacy claim: continue with other rows than the run began with."),
    ] = False,
    screen: OnScreen,
) -> CommandResult:
    """Go on with a stopped run or sweep, after the last committed round."""

    def call(on_progress: Callable[[Progress], None]) -> dict[str, Any]:
        from fedrounds.deployments import api

        return api.resume(
            run,
            fresh_collection=fresh_collection,
            accept_changed_data=accept_changed_data,
            on_progress=on_progress,
        )

    return _train("resume", run or "latest unfinished run", call, screen)


def runs(
    *,
    limit: Annotated[int, Parameter(help="How many to list.")] = 50,
    all: Annotated[bool, Parameter(negative=(), help="List runs that were deleted, too.")] = False,
) -> CommandResult:
    """List the runs, newest first, or delete some."""
    from fedrounds.deployments import api
    from fedrounds.deployments.cli import tables

    rows = api.runs(limit, deleted=all)
    return CommandResult(rows, tables.runs(rows))


def runs_delete(
    runs: Annotated[list[str], Parameter(name="RUN", help="The ids of runs, or of sweeps: then all their cells.")],
    /,
    *,
    mlflow: WithMlflow = False,
    unfinished: Unfinished = False,
    yes: Yes = False,
    screen: OnScreen,
) -> CommandResult:
    """Delete runs for good: rounds, models, and what Prefect shows. Charges and the journal stay."""
    from fedrounds.deployments import api
    from fedrounds.deployments.cli import tables

    _confirm(f"Delete {', '.join(runs)} for good?", yes, screen)
    found = api.delete_runs(runs, mlflow=mlflow, unfinished=unfinished)
    return CommandResult(found, tables.deleted(found))


def prune(
    *,
    older_than: Annotated[
        str | None, Parameter(help="Only runs that did not change for this long: 12h, 90d, 8w.")
    ] = None,
    keep: Annotated[
        int | None, Parameter(help="Keep this many of the newest finished runs of each experiment. Without it: 1.")
    ] = None,
    experiment: Annotated[str | None, Parameter(help="Only runs of this experiment.")] = None,
    mlflow: WithMlflow = False,
    unfinished: Unfinished = False,
    dry_run: Annotated[bool, Parameter(negative=(), help="Say what would be deleted, and delete nothing.")] = False,
    yes: Yes = False,
    screen: OnScreen,
) -> CommandResult:
    """Delete old runs, as `runs delete` does: by age, by count, or both."""
    from fedrounds.deployments import api
    from fedrounds.deployments.cli import tables

    chosen: dict[str, Any] = {
        "older_than": older_than,
        "keep": keep,
        "experiment": experiment,
        "unfinished": unfinished,
    }
    found = api.prune(**chosen, dry_run=True)
    if not dry_run and found["runs"]:
        if not yes:
            screen.show(tables.deleted(found))
        _confirm("Delete them for good?", yes, screen)
        found = api.prune(**chosen, mlflow=mlflow)
    return CommandResult(found, tables.deleted(found))


def _confirm(question: str, yes: bool, screen: CliOutput) -> None:
    """Ask for confirmation. Raises `ConfigError` where the answer is not yes, or where stdin is no terminal."""
    if yes:
        return
    if screen.as_json or not sys.stdin.isatty():
        raise ConfigError("deleting runs needs confirmation, and stdin is no terminal", hint="add --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was deleted", hint="answer y, or add --yes")


def show(run: Annotated[str, Parameter(help="The id of a run or a sweep.")], /) -> CommandResult:
    """Show one run: results, privacy, traffic, rounds, and where to look next; or a sweep's cells."""
    from fedrounds.deployments import api
    from fedrounds.deployments.cli import tables

    data = api.show(run)
    return CommandResult(data, tables.sweep(data) if "cells" in data else tables.details(data))


def data_list() -> CommandResult:
    """List the public data sets, and where their files are."""
    from fedrounds.deployments.cli import config_tables
    from fedrounds.fl_components.data.downloads import statuses

    found = statuses()
    return CommandResult(found, config_tables.data_sets(found))


def data_get(
    name: Annotated[str, Parameter(help="A public data set: `fedrounds data` lists them.")],
    /,
    *,
    url: Annotated[
        str | None, Parameter(help="Fetch URL/NAME/FILE, a mirror. Without it: FEDROUNDS_DATA_URL, or the publisher.")
    ] = None,
    screen: OnScreen,
) -> CommandResult:
    """Download the files of a public data set into FEDROUNDS_DATA, and check that they are the published ones."""
    from fedrounds.deployments.cli import config_tables
    from fedrounds.fl_components.data.downloads import download

    found = download(name, url, say=screen.show)
    return CommandResult(found, config_tables.downloaded(found))


def config_check(
    config: Config,
    /,
    *,
    overrides: Overrides = None,
    data: Annotated[bool, Parameter(negative=(), help="Load the data as well, and build the model.")] = False,
    plot: Annotated[Path | None, Parameter(help="With --data: draw what clients have into this PNG file.")] = None,
) -> CommandResult:
    """Say whether a configuration makes sense, and what it would run."""
    from fedrounds.deployments import api
    from fedrounds.deployments.cli import config_tables

    if plot is not None and not data:
        raise ConfigError("--plot is given without --data: there would be nothing to draw", hint="add --data")
    found = api.check_config(config, overrides=overrides or (), data=data)
    if plot is not None:
        if "withheld" in found:
            raise ConfigError(
                f"--plot draws what the privacy claim withholds: {found['withheld']}", hint="leave it out"
            )
        from fedrounds.deployments.cli.plots import draw_partition

        draw_partition(found["partition"], found["name"], plot)
    warnings = [f"Warning: {warning}" for warning in found.get("warnings", ())]
    return CommandResult(found, Group(config_tables.checked_config(found), *warnings))


def config_show(config: Config, /, *, overrides: Overrides = None) -> CommandResult:
    """Print a configuration with every default filled in."""
    import yaml

    from fedrounds.deployments import api

    found = api.resolve_config(config, overrides=overrides or ())
    as_written = (sys.stdout.encoding or "").lower().startswith("utf")  # else escaped, so that it reads as the same
    return CommandResult(found, yaml.safe_dump(found, sort_keys=False, allow_unicode=as_written).rstrip())


def config_schema() -> CommandResult:
    """Print the JSON schema of a configuration, for editors."""
    from fedrounds.deployments import api

    schema = api.config_schema()
    return CommandResult(schema, json.dumps(schema, indent=2))


def up(*, screen: OnScreen) -> CommandResult:
    """Serve the Prefect and MLflow pages and run the scheduled trainings, until Ctrl-C."""
    need_server("up")
    from fedrounds.deployments.stack import up as stack

    stack.up(screen.show)
    return CommandResult(None, "Stopped.")


def ui(*, screen: OnScreen) -> CommandResult:
    """Serve the Prefect and MLflow pages, until Ctrl-C."""
    need_server("ui")
    from fedrounds.deployments.stack import up as stack

    stack.ui(screen.show)
    return CommandResult(None, "Stopped.")


def deploy(
    config: Config,
    /,
    *,
    overrides: Overrides = None,
    cron: Annotated[
        str | None, Parameter(help='When to train, in UTC. Without it: "0 3 * * *", each night at 3.')
    ] = None,
    audit: Annotated[
        str | None, Parameter(help='When to audit the newest run\'s privacy too, for instance "0 4 * * 1".')
    ] = None,
    active: Annotated[bool, Parameter(negative=(), help="Switch the schedules on at once.")] = False,
    name: Annotated[str | None, Parameter(help="The deployment's name. Without it: the file's.")] = None,
    screen: OnScreen,
) -> CommandResult:
    """Register a scheduled training with Prefect; each continues from the latest model."""
    need_server("deploy")
    from fedrounds.deployments.cli import tables
    from fedrounds.deployments.stack.deploy import deploy

    data = deploy(config, overrides=overrides or (), cron=cron, audit=audit, active=active, name=name, say=screen.show)
    return CommandResult(data, tables.deployment(data))


def _train(
    command: str,
    title: str,
    call: Callable[[Callable[[Progress], None]], dict[str, Any]],
    screen: CliOutput,
) -> CommandResult:
    from fedrounds.deployments.cli import tables

    need_server(command)
    from fedrounds.deployments.cli.progress import display

    with display(screen.console, title) as shown:

        def on_progress(event: Progress) -> None:
            shown(event)
            screen.resumable = shown.resumable

        data = call(on_progress)
    return CommandResult(data, tables.sweep(data) if "cells" in data else tables.result(data))
