"""What a partition made, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_components.errors import ConfigError

MAX_COLOURS = 20


def draw_partition(partition: Mapping[str, Any], name: str, file: Path) -> None:
    """Two panels: the labels of the first clients, and how many examples clients have.

    `partition` is what `fl_components.data.summary` says. Raises `ConfigError` when the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (labels, sizes) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=[3, 2])
    try:
        _labels(labels, partition)
        _sizes(sizes, partition)
        for axis in (labels, sizes):
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{name}: {partition['num_clients']:,} clients", x=0.01, ha="left", fontsize=12)
        figure.tight_layout()
        try:
            # With the format given, matplotlib writes this very file: it would add .png to a name without an ending.
            figure.savefig(file, dpi=120, format=file.suffix[1:] or "png")
        except OSError as error:
            raise ConfigError(
                f"the picture {file} cannot be written: {error.strerror or error}",
                hint="give the path of a file in a folder that exists and that you may write to",
            ) from error
        except ValueError as error:  # a format that matplotlib does not know
            raise ConfigError(
                f"the picture {file} cannot be written: {error}", hint="give a path that ends in .png"
            ) from error
    finally:
        pyplot.close(figure)


def _labels(axis: Any, partition: Mapping[str, Any]) -> None:
    from matplotlib import colormaps

    clients = partition["client_labels"]
    num_labels = len(partition["labels"])
    # Beyond so many colours nobody tells them apart: the most frequent ones, and the others together.
    order = sorted(range(num_labels), key=lambda label: -partition["labels"][label])
    shown = sorted(order[: MAX_COLOURS - 1] if num_labels > MAX_COLOURS else order)
    colour = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    left = [0] * len(clients)
    for index, label in enumerate(shown):
        counts = [each[label] for each in clients.values()]
        axis.barh(list(clients), counts, left=left, color=colour(index), label=f"label {label}", height=0.8)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    if len(shown) < num_labels:
        others = [sum(each) - done for each, done in zip(clients.values(), left, strict=True)]
        axis.barh(list(clients), others, left=left, color="#eeeeee", label="others", height=0.8)
    axis.invert_yaxis()
    more = partition["num_clients"] - len(clients)
    axis.set(xlabel="training examples" if num_labels <= MAX_COLOURS else "training labels")
    axis.set_title(f"the first {len(clients)} clients" if more else "labels of each client", fontsize=10, loc="left")
    axis.tick_params(axis="y", labelsize=7 if len(clients) > 10 else 9)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _sizes(axis: Any, partition: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    bins = partition["size_histogram"]
    axis.bar(range(len(bins)), [count for _, _, count in bins], color="#1f5f8b", width=0.9)
    axis.set_xlim(-max(1, 4 - len(bins)), len(bins) - 1 + max(1, 4 - len(bins)))  # few bars need not fill the panel
    slanted = {"rotation": 45, "ha": "right"} if len(bins) > 4 else {}
    axis.set_xticks(range(len(bins)), [_range(low, high) for low, high, _ in bins], fontsize=8, **slanted)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set(xlabel="training examples of a client", ylabel="clients")
    axis.set_title("sizes", fontsize=10, loc="left")


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
