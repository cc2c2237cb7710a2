"""What was measured, as tables that are read as text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

HEADER = ("", "version", "s a round", "least - most", "x pipeline", "x training", "peak MB", "accuracy (round)")


@dataclass
class Row:
    """A peer on a workload: one entry for each repeat, or why there is none.

    Args:
      seconds: of each round; the first, which warms up, does not count.
      peak_mb: the largest proportional set size (PSS) of the peer's processes together, in 10^6 bytes.
      accuracy: on the test images, after the last round; None where nothing is trained.
    """

    workload: str
    module: str
    title: str
    version: str = ""
    seconds: list[list[float]] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    accuracy: float | None = None
    error: str | None = None

    @property
    def means_s(self) -> list[float]:
        """Seconds a round in each repeat: the mean over the rounds after the first."""
        return [fmean(each[1:]) for each in self.seconds]

    @property
    def round_s(self) -> float:
        """The median over the repeats; of a limit the least, because other work can only raise it."""
        return min(self.means_s) if self.module == "limit" else median(self.means_s)


def table(rows: Sequence[Row]) -> str:
    """The rows of one workload, the fastest first, beside our pipeline and our training stage."""
    measured = sorted((row for row in rows if row.seconds), key=lambda row: row.round_s)
    by_module = {row.module: row for row in measured}
    ours = [by_module.get(module) for module in ("pipeline", "engine")]
    cells = [_cells(row, [row.round_s / one.round_s if one else None for one in ours]) for row in measured]
    others = [row for row in rows if not row.seconds]
    missing = [[row.title, row.version, f"failed: {row.error or 'stopped'}", *[""] * 5] for row in others]
    return aligned([HEADER, *cells, *missing])


def _cells(row: Row, ratios: Iterable[float | None]) -> list[str]:
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.3f} ({len(row.seconds[-1])})"
    return [
        row.title,
        row.version,
        f"{row.round_s:.3f}",
        f"{min(row.means_s):.3f} - {max(row.means_s):.3f}" + (f"; then failed: {row.error}" if row.error else ""),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        "" if row.module == "limit" else f"{median(row.peak_mb):.0f}",
        accuracy,
    ]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as a table of Markdown."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    header, *others = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([header, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *others])
