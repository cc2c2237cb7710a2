"""The command line's surface, and what becomes of a command's answer or error."""

from __future__ import annotations

from collections.abc import Sequence

from cyclopts import App, CycloptsError, Group

from fedrounds.deployments.cli import commands, privacy_commands
from fedrounds.deployments.cli.screen import CliOutput, CommandResult
from fedrounds.fl_components.errors import FedroundsError
from fedrounds.fl_components.redaction import redact

TRAINING = Group("Training", sort_key=1)
CONFIGURATION = Group("Configuration", sort_key=2)
SERVERS = Group("Servers and schedules", sort_key=3)
RECORDS = Group("Records", sort_key=4)
OPTIONS = Group("Options", sort_key=5)

EPILOGUE = """With --json, anywhere in the line, stdout is one JSON object and human-readable output goes to stderr.

Exit codes:

- 0: done
- 1: the run, a check or the store failed
- 2: the command line, the configuration, the data or the model cannot be used
- 3: a server does not answer, or a package is not installed
- 4: too few clients' updates could be used
- 5: the privacy budget is exhausted; the model of the rounds before is saved
- 70: a bug in fedrounds
- 130: stopped by Ctrl-C"""


def build() -> App:
    """All the commands."""
    app = App(
        name="fedrounds",
        help="Federated learning: each round is a durable Prefect flow run, models and metrics are in MLflow.",
        help_epilogue=EPILOGUE,
        help_format="rich",  # not Markdown, which takes a quarter of the time to start
        version=_version,
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )
    for flag in ("--help", "--version"):
        app[flag].group = OPTIONS
    app.command(commands.train, group=TRAINING, sort_key=1)
    app.command(commands.sweep, group=TRAINING, sort_key=2)
    app.command(commands.resume, group=TRAINING, sort_key=3)
    runs = App(name="runs", help="List the runs, newest first, or delete some.", group=TRAINING, sort_key=4)
    runs.default(commands.runs)
    runs.command(commands.runs_delete, name="delete")
    app.command(runs)
    app.command(commands.show, group=TRAINING, sort_key=5)

    config = App(name="config", help="Check a configuration, show it whole, or print its schema.", group=CONFIGURATION)
    config.command(commands.config_check, name="check", sort_key=1)
    config.command(commands.config_show, name="show", sort_key=2)
    config.command(commands.config_schema, name="schema", sort_key=3)
    app.command(config)

    data = App(
        name="data", help="List the public data sets and where their files are, or get one.", group=CONFIGURATION
    )
    data.default(commands.data_list)
    data.command(commands.data_get, name="get")
    app.command(data)

    app.command(commands.up, group=SERVERS, sort_key=1)
    app.command(commands.ui, group=SERVERS)
    app.command(commands.deploy, group=SERVERS, sort_key=2)

    privacy = App(name="privacy", help="Budgets: what may be spent, what was, and what a run promises.", group=RECORDS)
    privacy.command(privacy_commands.privacy_status, name="status", sort_key=1)
    privacy.command(privacy_commands.privacy_plan, name="plan", sort_key=2)
    privacy.command(privacy_commands.privacy_ledger, name="ledger", sort_key=3)
    privacy.command(privacy_commands.privacy_statement, name="statement", sort_key=4)
    privacy.command(privacy_commands.privacy_void, name="void", sort_key=5)
    budget = App(name="budget", help="Set what a population may spend.", sort_key=6)
    budget.command(privacy_commands.privacy_budget_set, name="set")
    privacy.command(budget)
    app.command(privacy)

    app.command(privacy_commands.audit, group=RECORDS)
    app.command(commands.prune, group=RECORDS)

    journal = App(name="journal", help="The chained and signed record of every durable step.", group=RECORDS)
    journal.command(privacy_commands.journal_verify, name="verify", sort_key=1)
    journal.command(privacy_commands.journal_key, name="key", sort_key=2)
    journal.command(privacy_commands.journal_trust, name="trust", sort_key=3)
    app.command(journal)
    return app


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedrounds")
    except PackageNotFoundError:  # a source tree that was not installed
        return "unknown"


def run(tokens: Sequence[str], screen: CliOutput) -> int:
    """Run one command and give its answer, or say its error; returns the exit code."""
    try:
        command, bound, not_parsed = build().parse_args(tokens)
        given = {"screen": screen} if "screen" in not_parsed else {}
        answer = command(*bound.args, **bound.kwargs, **given)
        screen.answer(answer if isinstance(answer, CommandResult) else CommandResult(None, ""))
    except CycloptsError as error:
        names = [*error.command_chain] if error.command_chain else []
        return screen.fail("usage", redact(str(error)), f"see {' '.join(['fedrounds', *names, '--help'])}", exit_code=2)
    except FedroundsError as error:
        return screen.fail(error.code, error.message, error.hint or screen.resume_hint(), exit_code=error.exit_code)
    except KeyboardInterrupt:
        return screen.fail("interrupted", "by Ctrl-C", screen.resume_hint(), exit_code=130, label="Stopped")
    except Exception as error:
        return screen.bug(error)
    return 0
