"""Layout that all tables share: columns, grids and indentation."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

CLIENTS_SHOWN = 12


BASELINES = {
    "pooled_majority": "the majority label for all",
    "client_majority": "each client's own majority label",
    "pooled_mean": "the mean of all targets",
    "client_mean": "each client's own mean target",
    "unigram": "the most frequent token (unigram)",
    "bigram": "what most often follows the token (bigram)",
}


def baseline_metric(baselines: Mapping[str, float]) -> str:
    """What the predictors without a model are measured by."""
    return "mse" if "pooled_mean" in baselines else "accuracy"


def places_grid(places: Mapping[str, str | None]) -> RenderableType:
    # Lines of text, not a table: a table would cut a link that is wider than the terminal.
    lines = [Text("Where to look next", style="bold")]
    lines += [Text.assemble((f"  {label:<13} ", "dim"), value) for label, value in places.items() if value]
    return Group(*lines)


def columns(first: str, *numbers: str) -> Table:
    """A column of words and columns of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def grid() -> Table:
    """Labels on the left, values on the right."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    return grid


def indented(what: RenderableType) -> RenderableType:
    return Padding(what, (0, 0, 0, 2), expand=False)
