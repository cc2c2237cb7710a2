"""What people see of a run under way: a recorded sequence of events, as lines and as a panel."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from fedrounds.deployments.cli import config_tables
from fedrounds.deployments.cli.progress import (
    Display,
    DisplayState,
    Lines,
    LivePanel,
    RoundLine,
    RoundsTable,
    StageSeconds,
    display,
)
from fedrounds.tasks.progress import Progress

RUN = "k3f9"


def event(kind: str, **fields: object) -> Progress:
    return Progress(kind=kind, run_id=RUN, rounds=12, **fields)  # type: ignore[arg-type]


def recorded() -> list[Progress]:
    """A first start, then three rounds; the second is not evaluated and the third withholds its losses and times."""
    return [
        Progress(kind="message", text="starting the local Prefect server (first start, about 20 s)"),
        event("run", text="heart-disease", round=0),
        event("stage", round=1, stage="train"),
        event(
            "round",
            round=1,
            metrics={
                "train/loss": 0.69,
                "eval/loss": 0.68,
                "eval/accuracy": 0.5123,
                "communication/upload_bytes": 4216,
                "time/round_s": 1.306,
            },
            seconds={"train": 1.2},
        ),
        event("round", round=2, metrics={"train/loss": 0.6}, seconds={"train": 0.25, "commit": 0.25}),
        event("message", text="waiting for a client"),
        event("round", round=3, metrics={"eval/accuracy": 0.55}, seconds={}),
        event("end", round=3),
    ]


def play(shown: Display) -> None:
    with shown:
        for one in recorded():
            shown(one)


def test_lines_are_one_a_round_and_have_no_control_characters() -> None:
    out = io.StringIO()
    play(Lines(Console(file=out, width=80), "heart.yaml"))
    assert out.getvalue().splitlines() == [
        "starting the local Prefect server (first start, about 20 s)",
        "heart-disease: run k3f9, 12 rounds",
        "round  1/12  train loss 0.690  eval loss 0.680  accuracy 0.512  upload 4.2 kB  time 1.31 s",
        "round  2/12  train loss 0.600  eval loss -  accuracy -  upload -  time 0.50 s",
        "waiting for a client",
        "round  3/12  train loss -  accuracy 0.550  upload -  time -",
    ]


def cells() -> list[Progress]:
    """Two cells of a sweep, the first round of each."""
    return [
        Progress(
            kind=kind, run_id=f"s-00{n}", rounds=2, round=round, sweep_id="s", cell=f"cell {n} of 2: seed={n}", **more
        )  # type: ignore[arg-type]
        for n in (1, 2)
        for kind, round, more in (
            ("run", 0, {"text": "heart"}),
            ("round", 1, {"metrics": {"train/loss": n / 10}}),
            ("end", 1, {}),
        )
    ]


def test_a_sweep_says_which_cell_of_how_many_is_trained() -> None:
    out = io.StringIO()
    lines = Lines(Console(file=out, width=80), "heart.yaml")
    for one in cells():
        lines(one)
    said = out.getvalue().splitlines()
    assert said[::3] == ["cell 1 of 2: seed=1", "cell 2 of 2: seed=2"]
    assert said[1::3] == ["heart: run s-001, 2 rounds", "heart: run s-002, 2 rounds"]
    assert lines.resumable == "s"


def test_the_panel_of_a_sweep_shows_the_cell_and_only_its_rounds() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    panel = LivePanel(console, "heart.yaml")
    for one in cells()[:-1]:
        panel(one)
    console.print(panel.render())
    assert "cell 2 of 2: seed=2" in out.getvalue()
    assert "s-002" in out.getvalue()
    assert "0.200" in out.getvalue()
    assert "0.100" not in out.getvalue()


def test_brackets_in_a_name_are_not_markup() -> None:
    out = io.StringIO()
    Lines(Console(file=out, width=80), "")(event("message", text="client [red] is late"))
    assert out.getvalue() == "client [red] is late\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_panel_shows_the_run_and_fits_the_terminal(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    panel = LivePanel(console, "heart.yaml")
    for one in recorded()[:-1]:
        panel(one)
    console.print(panel.render())
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for words in ("heart-disease", "run k3f9", "round 3 of 12", "left", "0.512", "4.2 kB", "1.31 s", "round 4"):
        assert words in text


STAGES = {"load": 0.001, "admit": 0.005, "train": 0.021, "aggregate": 0.011, "compress": 0.004, "evaluate": 0.008}


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (32, "last  all stages 0.050 s"),
        (60, "last  train 0.021  aggregate 0.011  others 0.018 s"),
        (80, "last round  train 0.021  aggregate 0.011  evaluate 0.008  others 0.010 s"),
        (120, "last round  train 0.021  aggregate 0.011  evaluate 0.008  admit 0.005  others 0.005 s"),
    ],
)
def test_the_panel_shows_the_seconds_of_the_last_round_s_stages(width: int, line: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    panel = LivePanel(console, "heart.yaml")
    panel(event("run", text="heart-disease", round=0))
    console.print(panel.render())
    assert "last" not in out.getvalue()
    panel(event("round", round=1, metrics={}, seconds={"train": 99.0}))
    panel(event("round", round=2, metrics={}, seconds=STAGES))
    console.print(panel.render())
    assert [text.strip("│ ") for text in out.getvalue().splitlines() if "│  last" in text] == [line]


def test_stages_that_take_long_are_shown_in_tenths() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(StageSeconds({"load": 1.04, "train": 75.26}))
    assert out.getvalue().strip() == "last round  train 75.3  load 1.0 s"


def test_a_narrow_terminal_gets_fewer_columns_but_whole_ones() -> None:
    metrics = {"train/loss": 0.6, "eval/loss": 0.6, "eval/accuracy": 0.7, "communication/upload_bytes": 421_600}
    table = RoundsTable([RoundLine.of(9, metrics, {"train": 0.5}, "accuracy")])

    def headings(width: int) -> list[str]:
        out = io.StringIO()
        Console(file=out, width=width).print(table)
        assert "…" not in out.getvalue()
        return re.split(r" {2,}", out.getvalue().splitlines()[0].strip())

    assert headings(74) == ["round", "train loss", "eval loss", "accuracy", "upload", "time"]
    assert headings(52) == ["round", "train loss", "accuracy", "upload", "time"]
    assert headings(32) == ["round", "train loss", "accuracy"]


def test_before_the_run_begins_the_panel_is_one_line() -> None:
    out = io.StringIO()
    panel = LivePanel(Console(file=out, width=80), "heart.yaml")
    panel(recorded()[0])
    Console(file=out, width=80).print(panel.render())
    assert out.getvalue().count("\n") == 1
    assert "first start, about 20 s" in out.getvalue()


def test_the_panel_goes_after_success_and_stays_after_an_error() -> None:
    def last_frame(error: Exception | None) -> str:
        out = io.StringIO()
        panel = LivePanel(Console(file=out, width=80, force_terminal=True, color_system=None), "heart.yaml")
        panel.__enter__()
        for one in recorded()[:-1]:
            panel(one)
        panel.__exit__(type(error) if error else None, error, None)
        return out.getvalue()

    erase_line = "\x1b[2K"
    assert last_frame(None).endswith(erase_line)
    stopped = last_frame(ValueError())
    assert not stopped.endswith(erase_line)
    assert "stopped after round 3" in stopped


def test_what_prints_meanwhile_stands_above_the_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    panel = LivePanel(Console(file=out, width=80, force_terminal=True, color_system=None), "heart.yaml")
    with panel:
        for one in recorded()[:-1]:
            panel(one)
        handler = logging.StreamHandler()  # keeps the stream that it found, as Prefect's does
        print("a data [function] prints")
        Console(file=sys.stderr, width=80).print("a rich console prints")
        print("no end of line", end="")
    handler.emit(logging.makeLogRecord({"msg": "logged after the end"}))
    lines = [line.strip("\r") for line in out.getvalue().split("\n")]
    for words in ("a data [function] prints", "a rich console prints"):
        assert any(line.endswith(words) for line in lines)
    assert out.getvalue().endswith("no end of line")
    assert err.getvalue() == "logged after the end\n"


def test_no_color_leaves_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="standard")
    panel = LivePanel(console, "heart.yaml")
    for one in recorded():
        panel(one)
    console.print(panel.render())
    codes = {int(code) for codes in re.findall(r"\x1b\[([\d;]*)m", out.getvalue()) for code in codes.split(";") if code}
    assert codes
    assert codes <= {0, 1, 2}  # reset, bold, dim


def test_only_the_last_rounds_are_kept() -> None:
    heard = DisplayState("heart.yaml")
    for number in range(1, 21):
        heard.take(event("round", round=number), now=float(number))
    assert [line.round for line in heard.lines] == list(range(13, 21))


def test_the_time_left_follows_the_pace_of_the_last_rounds() -> None:
    heard = DisplayState("heart.yaml")
    heard.take(event("run", round=4), now=100.0)
    assert heard.seconds_left(now=101.0) is None
    heard.take(event("round", round=5), now=103.0)
    heard.take(event("round", round=6), now=105.0)
    assert heard.seconds_left(now=106.0) == 6 * 2.5 - 1.0
    assert heard.seconds_left(now=1000.0) == 0.0


def test_a_pipe_gets_lines_and_a_dumb_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(display(Console(file=Terminal()), ""), LivePanel)
    assert isinstance(display(Console(file=io.StringIO()), ""), Lines)
    monkeypatch.setenv("FORCE_COLOR", "1")  # colours were asked for, not a panel in a log file
    assert isinstance(display(Console(file=io.StringIO()), ""), Lines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display(Console(file=Terminal()), ""), Lines)


CLAIMED = {"privacy/epsilon": 1.25, "privacy/signal_to_noise": 0.5}
PUBLIC = {
    "train/loss": 0.7,
    "eval/loss": 0.6,
    "eval/accuracy": 0.81,
    "communication/upload_bytes": 1e6,
    "time/round_s": 0.3,
}


@pytest.mark.parametrize(
    ("metrics", "columns"),
    [
        (CLAIMED, ["epsilon", "signal/noise"]),  # all else is withheld
        ({"privacy/epsilon_simulated": 1.25}, ["epsilon"]),
        (CLAIMED | PUBLIC, ["train loss", "eval loss", "accuracy", "epsilon", "signal/noise", "upload", "time"]),
        # nobody came, so there is no training loss: nothing is withheld
        (
            CLAIMED | {"time/round_s": 1.0},
            ["train loss", "eval loss", "accuracy", "epsilon", "signal/noise", "upload", "time"],
        ),
        (PUBLIC, ["train loss", "eval loss", "accuracy", "upload", "time"]),
    ],
)
def test_a_claim_has_columns_of_its_own(metrics: dict[str, float], columns: list[str]) -> None:
    assert list(RoundLine.of(1, metrics, None, "accuracy").columns()) == columns


def checked(num_clients: int, **more: object) -> str:
    """What `config check --data` prints of so many clients."""
    sizes = [10 + client for client in range(num_clients)]
    data = {
        "name": "wards",
        "rounds": 2,
        "num_clients": num_clients,
        "num_parameters": 6,
        "communication": {"upload_bytes": 512, "download_bytes": 448},
        "clients": [{"id": f"ward {client}", "train": size, "test": 2} for client, size in enumerate(sizes)],
        "partition": {
            "size_histogram": [[size, size, 1] for size in sizes],
            "examples": {"median": 11.0, "mean": 11.0},
        },
        "classes": [
            {"class": "no", "rows": 20, "num_clients": num_clients, "clients": [], "all_but": True},
            {"class": "No", "rows": 3, "num_clients": 1, "clients": ["ward 1"], "all_but": False},
            {"class": "yes", "rows": 10, "num_clients": num_clients - 1, "clients": ["ward 1"], "all_but": True},
        ],
        **more,
    }
    out = io.StringIO()
    Console(file=out, width=100).print(config_tables.checked_config(data))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_a_check_lists_few_clients_and_draws_many() -> None:
    assert re.search(r"^  ward 6 +16 +2$", checked(7), re.M)
    assert "median" not in checked(7)
    assert "median 11, mean 11.0" in checked(8)


def test_a_check_names_classes_and_who_has_them() -> None:
    shown = checked(3, look_alikes=[["no", "No"]])
    assert re.search(r"^  no +20 +█+ +all$", shown, re.M)
    assert re.search(r"^  No +3 +\S+ +ward 1$", shown, re.M)
    assert re.search(r"^  yes +10 +\S+ +all but ward 1$", shown, re.M)
    assert "'no', 'No' are different classes; if they are spellings of one, write it alike in all files" in shown


def test_a_check_shows_columns_with_their_gaps_and_what_was_left_alone() -> None:
    age = {"name": "age", "kind": "number", "range": (30.1, 80.0), "counts": None}
    sex = {"name": "sex", "kind": "category", "range": None, "counts": {"f": 12, "m": 8}}
    complete, gaps = (
        {"missing": 0.0, "missing_by_client": {"north": 0.0}},
        {"missing": 0.081, "missing_by_client": {"north": 0.2, "south": 0.01}},
    )
    shown = checked(3, columns=[age | gaps, sex | complete], left_alone=["codebook.xlsx"])
    assert re.search(r"^  age +number +30\.1 to 80 +8\.1 % +north \(20\.0 %\)$", shown, re.M)
    assert re.search(r"^  sex +category +f 12, m 8 +0 %$", shown, re.M)
    assert "left alone in the clients' folder: codebook.xlsx" in shown
    assert "most at" not in checked(3, columns=[sex | complete])


def test_a_run_is_shown_by_its_primary_metric() -> None:
    """A regression evaluates no loss besides: there is no column for it."""
    line = RoundLine.of(1, {"train/loss": 0.7, "eval/mse": 0.25, "time/round_s": 0.3}, None, "mse")
    assert list(line.columns()) == ["train loss", "mse", "upload", "time"]
    assert line.columns()["mse"] == "0.250"
