"""What each command does: call the Python interface, then say the answer to programs and to people.

A command imports what it needs when it runs: `fedrounds --help` must not wait for torch, Prefect or MLflow.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Group

from fedrounds.deployments.cli.progress import display
from fedrounds.deployments.cli.screen import CliOutput, CommandResult
from fedrounds.fl_components.errors import ConfigError, NotInstalled

if TYPE_CHECKING:
    from fedrounds.tasks.progress import Progress

Config = Annotated[str, Parameter(help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="Replace one value, for instance --set rounds=5. Can be repeated."),
]
WithMlflow = Annotated[
    bool, Parameter(negative=(), help="Delete their MLflow runs and models too, but for models with an alias.")
]
Unfinished = Annotated[bool, Parameter(negative=(), help="Include runs that a resume could take further.")]
Yes = Annotated[bool, Parameter(name=["--yes", "-y"], negative=(), help="Do not ask.")]
OnScreen = Annotated[CliOutput, Parameter(parse=False)]


def train(
    config: Config,
    /,
    *,
    overrides: Overrides = None,
    run_id: Annotated[str | None, Parameter(help="The new run's id, or that of a run to go on with.")] = None,
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
    sweep_id: Annotated[str | None, Parameter(help="The new sweep's id, or that of a sweep to go on with.")] = None,
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
    from fedrounds.deployments.cli import tables
    from fedrounds.fl_components.data.downloads import statuses

    found = statuses()
    return CommandResult(found, tables.data_sets(found))


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
    from fedrounds.deployments.cli import tables
    from fedrounds.fl_components.data.downloads import download

    found = download(name, url, say=screen.show)
    return CommandResult(found, tables.downloaded(found))


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
    from fedrounds.deployments.cli import tables

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
    return CommandResult(found, Group(tables.checked_config(found), *warnings))


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
    _need_server("up")
    from fedrounds.deployments.stack import up as stack

    stack.up(screen.show)
    return CommandResult(None, "Stopped.")


def ui(*, screen: OnScreen) -> CommandResult:
    """Serve the Prefect and MLflow pages, until Ctrl-C."""
    _need_server("ui")
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
    """Register a scheduled training with Prefect; each goes on from the latest model."""
    _need_server("deploy")
    from fedrounds.deployments.cli import tables
    from fedrounds.deployments.stack.deploy import deploy

    data = deploy(config, overrides=overrides or (), cron=cron, audit=audit, active=active, name=name, say=screen.show)
    return CommandResult(data, tables.deployment(data))


def audit(
    run: Annotated[str, Parameter(help="The id of a run under a privacy claim, or an experiment's name: its newest.")],
    /,
    *,
    canaries: Annotated[int, Parameter(help="How many are drawn; half of them join.")] = 1000,
    plot: Annotated[Path | None, Parameter(help="Draw claim and measurement into this PNG file.")] = None,
) -> CommandResult:
    """Measure how much noise a run's mechanisms really add, with canaries."""
    _need_server("audit")
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import tables

    found = privacy.audit(run, num_canaries=canaries, plot=plot)
    return CommandResult(found, tables.audit(found))


def privacy_status(
    population: Annotated[str | None, Parameter(help="Without it: all of them.")] = None, /
) -> CommandResult:
    """Show what each population may spend, has spent, and has left."""
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import tables

    found = privacy.status(population)
    return CommandResult(found, tables.budgets(found))


def privacy_plan(
    config: Config,
    /,
    *,
    epsilon: Annotated[float, Parameter(help="What the run may come to.")],
    example_level: Annotated[bool, Parameter(help="For the examples of each client.", negative=())] = False,
    overrides: Overrides = None,
    plot: Annotated[Path | None, Parameter(help="Draw epsilon by round into this PNG file.")] = None,
) -> CommandResult:
    """Find the noise, the rounds or the cohort that keep an epsilon; for examples, each client's noise."""
    from fedrounds.deployments import planning
    from fedrounds.deployments.cli import tables

    unit: Literal["client", "example"] = "example" if example_level else "client"
    found = planning.plan(config, overrides or (), epsilon=epsilon, unit=unit, plot=plot)
    if example_level:
        return CommandResult(found, tables.plan_examples(found))
    return CommandResult(found, tables.plan(found))


def privacy_ledger(population: str, /) -> CommandResult:
    """List the charges of a population."""
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import tables

    rows = privacy.ledger(population)
    return CommandResult(rows, tables.ledger(rows))


def privacy_statement(run: Annotated[str, Parameter(help="The id of a run.")], /) -> CommandResult:
    """Print the privacy statement of a run, in Markdown."""
    from fedrounds.deployments import privacy

    found = privacy.statement(run)
    return CommandResult(found, found["markdown"].rstrip())


def privacy_void(
    run: Annotated[str, Parameter(help="The id of a run that stopped.")],
    /,
    *,
    reason: Annotated[str, Parameter(help="Who decided it, and why. Kept in the journal.")],
) -> CommandResult:
    """Give back what is reserved for a round of which nothing came; an act of an administrator."""
    from fedrounds.deployments import privacy

    found = privacy.void(run, reason=reason)
    return CommandResult(
        found, f"What round {found['round']} of run {run} had reserved is {found['population']}'s again."
    )


def privacy_budget_set(
    population: str,
    /,
    *,
    epsilon: Annotated[float, Parameter(help="The most that all its runs together may come to.")],
    reason: Annotated[str, Parameter(help="Who decided it, and why. Kept in the journal.")],
    delta: Annotated[float | None, Parameter(help="At which epsilon is told. Needed for a new population.")] = None,
    unit: Annotated[str | None, Parameter(help="Whose data are protected. Without it: client.")] = None,
    neighbouring: Annotated[
        str | None, Parameter(help="add_or_remove (Poisson selection), replace_one or zero_out. Without it: the first.")
    ] = None,
) -> CommandResult:
    """Let a population of private data spend; an act of an administrator."""
    from fedrounds.deployments import privacy
    from fedrounds.deployments.cli import tables

    found = privacy.set_budget(
        population, epsilon=epsilon, reason=reason, delta=delta, unit=unit, neighbouring=neighbouring
    )
    return CommandResult(found, tables.budgets([found]))


def journal_key() -> CommandResult:
    """Print the public key with which this hub signs its journal."""
    from fedrounds.deployments import journal

    found = journal.key()
    return CommandResult(found, found["key"])


def journal_trust(
    key: Annotated[str, Parameter(help="What `fedrounds journal key` prints there.")], /
) -> CommandResult:
    """Trust the journal rows of another hub that shares this database."""
    from fedrounds.deployments import journal

    found = journal.trust(key)
    return CommandResult(found, f"Rows signed by {found['key_id']} count from now on.")


def journal_verify() -> CommandResult:
    """Check that no row of the journal was changed, removed, put in or made anew."""
    from fedrounds.deployments import journal
    from fedrounds.deployments.cli import tables

    report = journal.verify()
    return CommandResult(report, tables.journal(report))


def _train(
    command: str,
    title: str,
    call: Callable[[Callable[[Progress], None]], dict[str, Any]],
    screen: CliOutput,
) -> CommandResult:
    from fedrounds.deployments.cli import tables

    _need_server(command)
    with display(screen.console, title) as shown:

        def on_progress(event: Progress) -> None:
            shown(event)
            screen.resumable = shown.resumable

        data = call(on_progress)
    return CommandResult(data, tables.sweep(data) if "cells" in data else tables.result(data))


def _need_server(command: str) -> None:
    for package in ("prefect", "mlflow"):
        if find_spec(package) is None:
            raise NotInstalled(
                f"fedrounds {command} needs {package}, which is not installed here",
                hint='install the extra: pip install "fedrounds[server]"',
            )
