"""What is printed reaches any stream, and nothing that is printed ends a command."""

from __future__ import annotations

import getpass
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedrounds.deployments import privacy
from fedrounds.deployments.account import account_name
from fedrounds.deployments.cli import screen
from fedrounds.deployments.cli.screen import CliOutput
from fedrounds.fl_components.store import Store

PRINT = """
import sys
from fedrounds.deployments.cli.screen import CommandResult, CliOutput, make_streams_writable
make_streams_writable()
with CliOutput(as_json="--json" in sys.argv) as screen:
    screen.answer(CommandResult({"client": "Köln"}, "Köln ██▌░ │ ─ " + chr(0xDCFF)))
"""


def printed(shell: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", shell.replace("PRINT", '"$0" -c "$1"'), sys.executable, PRINT],
        env=os.environ | variables,
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"K?ln ###. | - ?\n"),
        ("latin-1", "Köln ###. | - ?\n".encode("latin-1")),
        ("utf-8", "Köln ██▌░ │ ─ ?\n".encode()),
    ],
)
def test_a_stream_gets_the_nearest_signs_that_it_has(encoding: str, expected: bytes) -> None:
    done = printed("PRINT", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


@pytest.mark.parametrize("shell", ["PRINT >&-", "PRINT --json >&-", "PRINT --json >&- 2>&-", "PRINT <&- >&- 2>&-"])
def test_closed_streams_are_no_error(shell: str) -> None:
    done = printed(shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_program_in_an_ascii_locale_begins_anew_in_utf8_mode() -> None:
    code = "import sys; from fedrounds.deployments.cli.screen import use_utf8; use_utf8(); "
    code += "print(sys.flags.utf8_mode, ascii(sys.argv[1:]))"
    for option in ([], ["-X", "utf8=0"]):  # -X utf8=0 overrides PYTHONUTF8
        done = subprocess.run(
            [sys.executable, *option, "-c", code, "Köln"],
            env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == (b"0 ['K\\udcc3\\udcb6ln']\n" if option else b"1 ['K\\xf6ln']\n")


def test_json_is_ascii_whatever_the_stream_is() -> None:
    done = printed("PRINT --json", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b'{"schema": 1, "status": "ok", "data": {"client": "K\\u00f6ln"}}\n'


def test_a_reader_of_json_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", PRINT, "--json"], stdout=writing, stderr=subprocess.PIPE, env=os.environ, timeout=60
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("flags", ["", "--json"])
def test_output_that_cannot_be_written_is_an_error_of_one_line(flags: str) -> None:
    done = printed(f"PRINT {flags} > /dev/full")
    assert done.returncode == 1
    assert b"the output cannot be written: No space left on device" in done.stderr


def test_a_bug_report_holds_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDROUNDS_HOME", str(tmp_path))
    shown = CliOutput(as_json=True)
    shown.errors = screen.PipeConsole(file=io.StringIO())
    with pytest.raises(ValueError, match="hunter2") as caught:
        raise ValueError("postgresql://admin:hunter2@db/fed")
    assert shown.bug(caught.value) == 70
    (report,) = (tmp_path / "logs").iterdir()
    assert "admin:***@db/fed" in report.read_text() and "hunter2" not in report.read_text()
    assert "hunter2" not in str(shown._reply)


def test_an_account_without_a_name_is_its_number(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert account_name() == f"uid {os.getuid()}"
    privacy.set_budget("wards", epsilon=1.0, delta=1e-3, reason="the board")
    with Store.open() as store:
        (row,) = [row for row in store.journal() if row.kind.startswith("budget")]
    assert row.content["by"] == f"uid {os.getuid()}"
