"""Plots of a partition, of a privacy plan and of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrounds.fl_components.errors import ConfigError
from fedrounds.fl_components.privacy.audit import AuditReport, violates_claim

MAX_COLOURS = 20


def draw_partition(partition: Mapping[str, Any], name: str, file: Path) -> None:
    """Draw the labels of the first clients, where there are classes, and how many examples clients have.

    `partition` is what `fl_components.data.summary` says. Raises `ConfigError` when the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [3, 2] if partition["labels"] else [2]
    figure, panels = pyplot.subplots(1, len(widths), figsize=(2 * sum(widths), 4), width_ratios=widths, squeeze=False)
    *labels, sizes = panels[0]
    try:
        for axis in labels:
            _labels(axis, partition)
        _sizes(sizes, partition)
        for axis in panels[0]:
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{name}: {partition['num_clients']:,} clients", x=0.01, ha="left", fontsize=12)
        _save(figure, file)
    finally:
        pyplot.close(figure)


def draw_plan(plan: Mapping[str, Any], file: Path) -> None:
    """Epsilon by round for each choice of `deployments.privacy.plan`.

    Raises `ConfigError` when the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    try:
        for choice in plan["choices"]:
            if choice["curve"]:
                rounds, epsilons = zip(*choice["curve"], strict=True)
                axis.plot(rounds, epsilons, label=f"{choice['free']}: {plan_in_words(choice)}")
        axis.axhline(plan["epsilon"], color="#888888", lw=1, ls="--")
        axis.set(xlabel="round", ylabel=f"epsilon at delta {plan['delta']:g}", xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{plan['name']}: what keeps epsilon {plan['epsilon']:g}", x=0.01, ha="left", fontsize=12)
        _save(figure, file)
    finally:
        pyplot.close(figure)


def draw_audit(reports: Sequence[AuditReport], file: Path) -> None:
    """The claimed epsilon of each audited release, the lower bound without a model, and of a release of clients'
    updates the interval that was measured.

    There is at least one report, and all have one delta, confidence, and number of canaries and of parameters. Raises
    `ConfigError` when the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    claims = [report.claimed_epsilon for report in reports]
    left, right = min(claims) / 1.8, max(claims) * 1.8
    bottom, top = left / 4, right * 4  # what was measured may be 0, or millions: it is then at the edge
    figure, axis = pyplot.subplots(figsize=(8, 5))
    try:
        axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        axis.fill_between([left, right], [left, right], top, color="#c0392b", alpha=0.05, lw=0)
        axis.plot([left, right], [left, right], color="#888888", lw=1, ls="--")
        for report, claim in zip(reports, _side_by_side(claims), strict=True):
            if report.epsilon_interval is not None:
                low, high = (min(max(end, bottom), top) for end in report.epsilon_interval)
                low = min(low, top / 1.3)  # of what is far above, the foot is seen
                colour = "#c0392b" if violates_claim(report) else "#1f5f8b"
                axis.vlines(claim, low, high, color=colour, lw=6)
                if report.epsilon_interval[1] > top:
                    axis.plot(claim, top, marker="^", ms=9, color=colour, clip_on=False)
            bound = min(max(report.epsilon_lower_bound, bottom), top)
            marker: dict[str, Any] = (
                {"marker": "v", "ms": 6} if bound == bottom else {"marker": "_", "ms": 10, "mew": 1.8}
            )
            axis.plot(claim, bound, color="#444444", clip_on=False, **marker)
        _audit_legend(axis, reports)
        words: dict[str, Any] = {"transform": axis.transAxes, "va": "top", "fontsize": 8, "color": "#c0392b"}
        axis.text(0.015, 0.975, "more is spent than is claimed", **words)
        axis.set_xticks(sorted(set(claims)), [f"{claim:.3g}" for claim in sorted(set(claims))])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(base=2))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        delta = f"delta {reports[0].delta:g}"
        axis.set(xlabel=f"claimed epsilon at {delta}", ylabel=f"measured epsilon at {delta}")
        axis.spines[["top", "right"]].set_visible(False)
        title = f"Audit with {reports[0].num_canaries:,} canaries in {reports[0].num_parameters:,} parameters"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        _save(figure, file)
    finally:
        pyplot.close(figure)


def plan_in_words(choice: Mapping[str, Any]) -> str:
    """
    >>> plan_in_words({"noise_multiplier": 1.0, "rounds": 50, "cohort_size": 99.6})
    'noise 1, 50 rounds, 100 clients a round'
    """
    clients = f"{choice['cohort_size']:.0f} clients a round"
    return f"noise {choice['noise_multiplier']:.4g}, {choice['rounds']} rounds, {clients}"


def _side_by_side(claims: Sequence[float]) -> list[float]:
    """On a logarithmic axis: those with the same claim a little apart.

    >>> [round(each, 2) for each in _side_by_side([1.0, 2.0, 1.0])]
    [0.98, 2.0, 1.02]
    """
    places = [claims[:index].count(claim) - (claims.count(claim) - 1) / 2 for index, claim in enumerate(claims)]
    return [claim * 1.05**place for claim, place in zip(claims, places, strict=True)]


def _audit_legend(axis: Any, reports: Sequence[AuditReport]) -> None:
    from matplotlib.lines import Line2D

    interval = f"interval of {100 * reports[0].confidence:g} %, if the noise is Gaussian"
    intervals = [
        Line2D([], [], color="#1f5f8b", lw=6, label=interval),
        Line2D([], [], color="#c0392b", lw=6, label="the same, above the claim: violated"),
    ]
    entries = [
        *(intervals if any(report.epsilon_interval is not None for report in reports) else ()),
        Line2D([], [], color="#444444", lw=0, marker="_", mew=1.8, ms=10, label="lower bound, for any mechanism"),
        Line2D([], [], color="#888888", lw=1, ls="--", label="as claimed (arrows: beyond the plot)"),
    ]
    axis.legend(handles=entries, frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.03))


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    try:
        # With the format given, matplotlib writes this very file: it would add .png to a name without an ending.
        figure.savefig(file, dpi=120, format=file.suffix[1:] or "png")
    except OSError as error:
        raise ConfigError(
            f"the plot {file} cannot be written: {error.strerror or error}",
            hint="give the path of a file in a folder that exists and that you may write to",
        ) from error
    except ValueError as error:  # a format that matplotlib does not know
        raise ConfigError(
            f"the plot {file} cannot be written: {error}", hint="give a path that ends in .png"
        ) from error


def _labels(axis: Any, partition: Mapping[str, Any]) -> None:
    from matplotlib import colormaps

    from fedrounds.deployments.cli.humanize import shown_class

    clients, names = partition["client_labels"], partition["class_names"]
    num_labels = len(partition["labels"])
    # Beyond so many colours nobody tells them apart: the most frequent ones, and the others together.
    order = sorted(range(num_labels), key=lambda label: -partition["labels"][label])
    shown = sorted(order[: MAX_COLOURS - 1] if num_labels > MAX_COLOURS else order)
    colour = colormaps["tab10" if len(shown) <= 10 else "tab20"]
    left = [0] * len(clients)
    for index, label in enumerate(shown):
        counts = [each[label] for each in clients.values()]
        axis.barh(list(clients), counts, left=left, color=colour(index), label=shown_class(names[label]), height=0.8)
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
