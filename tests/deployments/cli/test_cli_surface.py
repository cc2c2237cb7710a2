"""The surface is frozen, and asking for help is cheap."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cyclopts import App

from fedrounds.deployments.cli import main
from fedrounds.deployments.cli.app import build
from fedrounds.fl_components.errors import FedroundsError

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("prefect", "mlflow", "torch", "numpy", "sqlalchemy", "yaml")


def surface(app: App, *path: str) -> list[str]:
    """Each command with its arguments and options, one line each."""
    lines = []
    for name in sorted(app.resolved_commands()):
        if name.startswith("-"):
            continue
        command = app[name]
        if any(not each.startswith("-") for each in command.resolved_commands()):
            lines += surface(command, *path, name)
        if command.default_command is None:
            continue
        words = []
        for argument in command.assemble_argument_collection():
            if argument.parameter.parse is not False:
                text = " ".join(argument.names)
                words.append(text if argument.required else f"[{text}]")
        lines.append(" ".join([*path, name, *words]))
    return lines


def test_the_surface_is_frozen() -> None:
    assert surface(build()) == [
        "audit RUN [--canaries] [--plot]",
        "config check CONFIG [--set] [--data] [--plot]",
        "config schema",
        "config show CONFIG [--set]",
        "data get NAME [--url]",
        "data",
        "deploy CONFIG [--set] [--cron] [--audit] [--active] [--name]",
        "journal key",
        "journal trust KEY",
        "journal verify",
        "privacy budget set POPULATION --epsilon --reason [--delta] [--unit] [--neighbouring]",
        "privacy ledger POPULATION",
        "privacy plan CONFIG --epsilon [--example-level] [--set] [--plot]",
        "privacy statement RUN",
        "privacy status [POPULATION]",
        "privacy void RUN --reason",
        "prune [--older-than] [--keep] [--experiment] [--mlflow] [--unfinished] [--dry-run] [--yes -y]",
        "resume [RUN] [--fresh-collection] [--accept-changed-data]",
        "runs delete RUN [--mlflow] [--unfinished] [--yes -y]",
        "runs [--limit] [--all]",
        "show RUN",
        "sweep CONFIG --over [--set] [--sweep-id]",
        "train CONFIG [--set] [--run-id] [--profile]",
        "ui",
        "up",
    ]


def test_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    explained = re.findall(r"^- (\d+): \w+", capsys.readouterr().out, re.MULTILINE)
    pending, raised = [FedroundsError], set[int]()
    while pending:
        pending += (error := pending.pop()).__subclasses__()
        raised.add(error.exit_code)
    assert {int(code) for code in explained} == raised | {0, 70, 130}


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("line", [["--help"], [], ["train", "--help"], ["--version"], ["nothing"]])
def test_help_imports_nothing_heavy(line: list[str], tmp_path: Path) -> None:
    done = python(
        f"from fedrounds.deployments.cli import main\nmain({line!r})\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_goes_away_does_not_end_the_command(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from fedrounds.deployments.cli.screen import CommandResult, CliOutput\n"
        "with CliOutput(as_json=False) as screen:\n"
        "    for _ in range(20_000): screen.answer(CommandResult(None, 'a line of a long result'))\n"
        "    print('went on', file=sys.stderr)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "a line of a long result\n"
        process.stdout.close()
        assert process.stderr.read() == "went on\n"
        assert process.wait(timeout=60) == 0
