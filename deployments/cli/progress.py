"""The display of a run under way: one calm panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedrounds.deployments.cli.humanize import UNKNOWN, duration, number, size, whole_duration

if TYPE_CHECKING:
    from fedrounds.tasks.progress import Progress

ROUNDS_SHOWN = 8
# What is shown of a round; the column `primary` has the name of the run's primary metric.
COLUMNS: dict[str, Callable[[float | None], str]] = {
    "train loss": number,
    "eval loss": number,
    "primary": number,
    "epsilon": number,
    "signal/noise": number,
    "upload": size,
    "time": duration,
}
OF_A_CLAIM = ("epsilon", "signal/noise")
EPSILONS = ("privacy/epsilon", "privacy/epsilon_simulated", "privacy/example/epsilon")
BOTH_TIMES_WIDTH = 72  # from here there is room for the time so far beside the time left
LEFT_OUT_FIRST = ("signal/noise", "eval loss", "upload", "time")


def withholds(metrics: Mapping[str, float]) -> bool:
    """Whether a privacy claim keeps what is measured on clients' data from a round's metrics.

    >>> withholds({"privacy/epsilon": 1.0}), withholds({"privacy/epsilon": 1.0, "time/round_s": 0.2}), withholds({})
    (True, False, False)
    """
    return any(name in metrics for name in EPSILONS) and "time/round_s" not in metrics


@dataclass(frozen=True, slots=True)
class RoundLine:
    """What is shown of one committed round; None where the value was not measured or is withheld."""

    round: int
    values: Mapping[str, float | None]
    withholds: bool
    primary: str

    @classmethod
    def of(
        cls, round: int, metrics: Mapping[str, float], seconds: Mapping[str, float] | None, primary: str
    ) -> RoundLine:
        """Return the line of a round with these metrics, of a run with this primary metric."""
        values = {
            "train loss": metrics.get("train/loss"),
            "eval loss": metrics.get("eval/loss"),
            "primary": metrics.get(f"eval/{primary}"),
            "epsilon": next((metrics[name] for name in EPSILONS if name in metrics), None),
            "signal/noise": metrics.get("privacy/signal_to_noise"),
            "upload": metrics.get("communication/upload_bytes"),
            "time": metrics.get("time/round_s", sum(seconds.values()) if seconds else None),
        }
        return cls(round, values, withholds(metrics), primary)

    def columns(self) -> dict[str, str]:
        """Those of a privacy claim where it has a value for them.

        Where it withholds what is measured, only what is known.
        """
        return {
            self.heading(name): show(self.values[name])
            for name, show in COLUMNS.items()
            if self.values[name] is not None or not (self.withholds or name in self._optional)
        }

    @property
    def _optional(self) -> tuple[str, ...]:
        """The columns that are left out without a value."""
        return (*OF_A_CLAIM, "eval loss") if self.values["primary"] is not None else OF_A_CLAIM

    def heading(self, name: str) -> str:
        """Return what a column is called."""
        return self.primary if name == "primary" else name


@dataclass(frozen=True, slots=True)
class FirstThatFits:
    """The first of some tables, from wide to narrow, that is no wider than the terminal; or the last."""

    tables: Sequence[Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=10_000)  # a measure is cut to the width that is given
        for table in self.tables:
            if console.measure(table, options=wide).maximum <= options.max_width:
                break
        yield table


@dataclass(frozen=True, slots=True)
class RoundsTable:
    """The rounds one under another, right-aligned; a narrow terminal gets whole columns, but fewer of them."""

    lines: Sequence[RoundLine]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield FirstThatFits([self._without(LEFT_OUT_FIRST[:count]) for count in range(len(LEFT_OUT_FIRST) + 1)])

    def _without(self, left_out: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("round", justify="right", no_wrap=True)
        rows = [line.columns() for line in self.lines]
        headings = [self.lines[-1].heading(name) for name in COLUMNS if name not in left_out] if self.lines else []
        names = [heading for heading in headings if any(heading in row for row in rows)]
        for name in names:
            table.add_column(
                name, justify="right", no_wrap=True, style="bold" if name == self.lines[-1].primary else None
            )
        for line, row in zip(self.lines, rows, strict=True):
            table.add_row(str(line.round), *(row.get(name, UNKNOWN) for name in names))
        return table


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """One line: the seconds of a round's stages, the largest first; those that do not fit are summed."""

    seconds: Mapping[str, float]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        label = "last round" if options.max_width >= 60 else "last"
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        decimals = 3 if ordered[0][1] < 10 else 1
        for named in range(len(ordered), -1, -1):
            parts = ordered[:named]
            if named < len(ordered):
                parts.append(("others" if named else "all stages", sum(s for _, s in ordered[named:])))
            line = Text(label, style="dim", no_wrap=True)
            for name, seconds in parts:
                line.append(f"  {name} ").append(f"{seconds:.{decimals}f}", style="not dim")
            line.append(" s")
            if line.cell_len <= options.max_width:
                break
        yield line


@dataclass(slots=True)
class DisplayState:
    """What the events have said so far."""

    title: str
    run_id: str = ""
    sweep_id: str = ""
    cell: str = ""  # of a sweep: which of how many, and its values
    begun: bool = False
    rounds: int = 0
    round: int = 0  # the last committed one
    stage: str = ""
    message: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the last committed round, by stage
    lines: deque[RoundLine] = field(default_factory=lambda: deque(maxlen=ROUNDS_SHOWN))
    commits: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS_SHOWN + 1))  # time.monotonic()

    def take(self, event: Progress, now: float) -> None:
        self.run_id = event.run_id or self.run_id
        self.sweep_id = event.sweep_id or self.sweep_id
        self.cell = event.cell or self.cell
        self.rounds = event.rounds or self.rounds
        match event.kind:
            case "message":
                self.message = event.text
            case "run":
                self.begun = True
                self.title = event.text or self.title
                self.round = event.round
                self.message = ""
                self.seconds = {}
                self.lines.clear()
                self.commits.clear()
                self.commits.append(now)
            case "stage":
                self.stage = event.stage
                self.message = ""
            case "round":
                self.round = event.round
                self.stage = self.message = ""
                self.seconds = event.seconds
                self.lines.append(RoundLine.of(self.round, event.metrics, event.seconds, event.primary))
                self.commits.append(now)
            case "end":
                self.stage = ""
                self.message = event.text

    def doing(self) -> str:
        """What goes on now, in words."""
        if self.message or not self.begun:
            return self.message or "starting"
        if self.round >= self.rounds:
            return "finishing"
        return f"round {self.round + 1}" + (f": {self.stage}" if self.stage else "")

    def seconds_left(self, now: float) -> float | None:
        """From the pace of the last rounds; None before there is one."""
        if len(self.commits) < 2:
            return None
        pace_s = (self.commits[-1] - self.commits[0]) / (len(self.commits) - 1)
        return max(0.0, pace_s * (self.rounds - self.round) - (now - self.commits[-1]))


class Display(ABC):
    """Shows a run under way: a context manager, and the `on_progress` that the events go to."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.heard = DisplayState(title)

    @abstractmethod
    def __call__(self, event: Progress) -> None:
        """Take one event; may come from any thread."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def resumable(self) -> str | None:
        """The id of the run or of the sweep, once it has begun."""
        return (self.heard.sweep_id or self.heard.run_id) if self.heard.begun else None


class Lines(Display):
    """One line for the run, for each message and for each round; no control characters."""

    def __call__(self, event: Progress) -> None:
        self.heard.take(event, time.monotonic())
        match event.kind:
            case "run":
                if self.heard.cell:
                    self._line(self.heard.cell)
                done = f", {self.heard.round} done" if self.heard.round else ""
                self._line(f"{self.heard.title}: run {self.heard.run_id}, {self.heard.rounds} rounds{done}")
            case "round":
                digits = len(str(self.heard.rounds))
                values = "  ".join(f"{name} {value}" for name, value in self.heard.lines[-1].columns().items())
                self._line(f"round {self.heard.round:>{digits}}/{self.heard.rounds}  {values}")
            case "message" | "end" if event.text:
                self._line(event.text)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class AbovePanel(io.TextIOBase):
    """Whatever else prints meanwhile: whole lines above the panel, which is drawn again below them.

    Rich has such a thing, but a rich console writes past it, and so would Prefect's log. Who keeps this stream after
    the panel has gone (a log handler does) writes to `stream` through it.
    """

    def __init__(self, live: Live, stream: TextIO) -> None:
        self._live = live
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        if not self._live.is_started:
            return self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._live.console.print(Text.from_ansi(line), soft_wrap=True)
        return len(text)

    def finish(self) -> None:
        """Write out what is left of a line that was not ended."""
        line, self._line = self._line, ""
        self._stream.write(line)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True


class LivePanel(Display):
    """One panel that is redrawn in place. It goes when the run ends well, since the result follows, else it stays."""

    def __init__(self, console: Console, title: str) -> None:
        super().__init__(console, title)
        self._lock = RLock()
        self._started = time.monotonic()
        self._stopped = False
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(
            console=console,
            get_renderable=self.render,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._redirects = ExitStack()

    def __call__(self, event: Progress) -> None:
        with self._lock:
            self.heard.take(event, time.monotonic())

    def __enter__(self) -> Display:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            above = AbovePanel(self._live, stream)
            self._redirects.callback(above.finish)
            self._redirects.enter_context(redirect(above))
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = error is not None
        self._live.transient = not self._stopped or not self.heard.begun
        self._live.stop()
        self._redirects.close()

    def render(self) -> RenderableType:
        with self._lock:
            return self._panel(time.monotonic())

    def _panel(self, now: float) -> RenderableType:
        heard = self.heard
        elapsed = whole_duration(now - self._started)
        self._spinner.update(text=Text(heard.doing() if heard.begun else f"{heard.doing()}, {elapsed}", style="cyan"))
        if not heard.begun:
            return self._spinner

        width = min(self.console.width - 2, 100)  # room for the ^C that a terminal echoes: it must not wrap
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        left_s = heard.seconds_left(now)
        times = f"{elapsed} so far"
        if left_s is not None and heard.round < heard.rounds:
            left = f"about {_roughly(left_s)} left"
            times = f"{times}, {left}" if width >= BOTH_TIMES_WIDTH else left
        bar.add_row(
            Text(f"round {heard.round} of {heard.rounds}", style="bold"),
            ProgressBar(total=max(heard.rounds, 1), completed=heard.round, complete_style="cyan"),
            Text(times, style="dim"),
        )
        parts: list[RenderableType] = [Text(heard.cell), "", bar] if heard.cell else [bar]
        if heard.lines:
            parts += ["", RoundsTable(tuple(heard.lines))]
        if heard.seconds:
            parts += ["", StageSeconds(heard.seconds)]
        parts += ["", Text(f"stopped after round {heard.round}", style="yellow") if self._stopped else self._spinner]
        return Panel(
            Group(*parts),
            title=Text.assemble((heard.title, "bold"), ("  run ", "dim"), heard.run_id),
            title_align="left",
            border_style="dim",
            padding=(1, 2),
            width=width,
        )


def display(console: Console, title: str) -> Display:
    """The panel on a terminal, plain lines elsewhere (a pipe, a file, TERM=dumb)."""
    if console.file.isatty() and console.is_interactive:
        return LivePanel(console, title)
    return Lines(console, title)


def _roughly(seconds: float) -> str:
    """`duration` in steps coarse enough to stand still.

    >>> _roughly(3.4), _roughly(48), _roughly(137), _roughly(7384)
    ('5 s', '50 s', '2 min', '2 h 03 min')
    """
    if seconds < 57:
        return f"{max(5, 5 * round(seconds / 5))} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return whole_duration(seconds)
