"""Tables of budgets, ledgers, privacy plans and audits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedrounds.deployments.cli.humanize import UNKNOWN, counted, event, number
from fedrounds.deployments.cli.layout import columns, grid, indented

UNCLAIMED_SHOWN = 10


def budgets(data: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Each population with a bar, and its runs."""
    if not data:
        return Text("No population has a budget yet: `fedrounds privacy budget set` gives one.")
    parts: list[RenderableType] = []
    for budget in data:
        limit, epsilon = budget["epsilon_limit"], budget["epsilon"]
        heading = Text.assemble((budget["population"], "bold"), f"  epsilon {number(epsilon)}")
        if budget["clients"] is None:
            heading.append(" without a limit" if limit is None else f" of {limit:g}")
        else:
            heading.append(f", the largest of {counted(budget['clients'], 'client')},")
        heading.append(
            f" at delta {budget['delta']:g} ({budget['unit']}, {budget['neighbouring']}, {budget['accountant']})",
            style="dim",
        )
        if budget["demonstration"]:
            heading.append("  a demonstration on public data", style="yellow")
        parts += [Text("")] if parts else []
        parts.append(heading)
        if budget["clients"] is None:
            parts += _left(budget)
        else:
            each = "no limit" if limit is None else f"a limit of {limit:g}"
            parts.append(Text(f"  {each} for each client that has none of its own"))
            if budget["least_left"] is not None:
                parts += [Text(f"  least left: {budget['least_left']['population']}"), *_left(budget["least_left"])]
        if budget.get("unclaimed_runs"):
            parts += _unclaimed(budget["unclaimed_runs"])
        if budget["runs"]:
            tightest = any(run["epsilon_tightest"] is not None for run in budget["runs"])
            table = columns("run", "rounds", "epsilon", *["tightest"] * tightest)
            for run in budget["runs"]:
                epsilons = [number(run["epsilon"]), *[number(run["epsilon_tightest"])] * tightest]
                table.add_row(f"{run['run_id']} ({run['name']})", str(run["rounds"]), *epsilons)
            parts.append(indented(table))
    return Group(*parts)


def _unclaimed(runs: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """The runs on the same data that no epsilon covers."""
    shown = [
        Text(
            f"    {run['run_id']} ({run['name']}), begun {run['began_at'][:10]}, {counted(run['rounds'], 'round')}"
            + ", deleted since" * run["deleted"]
        )
        for run in runs[:UNCLAIMED_SHOWN]
    ]
    more = [Text(f"    and {len(runs) - UNCLAIMED_SHOWN} more")] * (len(runs) > UNCLAIMED_SHOWN)
    heading = f"  not covered by this epsilon: {counted(len(runs), 'run')} on these data without this claim"
    return [Text(heading, style="yellow"), *shown, *more]


def _left(budget: Mapping[str, Any]) -> list[RenderableType]:
    """A bar of what is spent, where something may be."""
    limit = budget["epsilon_limit"]
    if not limit:
        return []
    left = f" {number(budget['epsilon_remaining'])} of {limit:g} left"
    return [Text.assemble("  ", _budget_bar(budget["epsilon"] / limit), left)]


def plan_examples(data: Mapping[str, Any]) -> RenderableType:
    """What each client needs, the smallest first."""
    title = Text.assemble(
        (data["name"], "bold"),
        f"  what keeps epsilon {data['epsilon']:g} at delta {data['delta']:g} for each example "
        f"({data['neighbouring']}), by {counted(data['rounds'], 'round')} of {counted(data['steps'], 'step')} at a "
        f"sampling rate of {data['sampling_rate']:g}",
    )
    table = columns("client", "rows", "batch", "noise", "noise on the mean", "epsilon as configured", "rounds enough")
    for each in data["clients"]:
        over = each["configured_epsilon"] > data["epsilon"]
        table.add_row(
            each["client"],
            f"{each['examples']:,}",
            f"{each['batch']:,.1f}",
            f"{each['noise_multiplier']:.4g}",
            f"{each['noise_on_the_mean']:.3g}",
            Text(number(each["configured_epsilon"]), style="red" if over else "green"),
            f"{each['configured_rounds']:,}",
        )
    more = data["num_clients"] - len(data["clients"])
    notes = [Text(f"and {counted(more, 'larger one')}", style="dim")] * (more > 0)
    notes += [  # lines that fit 80 columns
        Text("noise is in clipping norms; the same noise weighs more on the mean gradient", style="dim"),
        Text("of a step the fewer rows a client has", style="dim"),
    ]
    return Group(title, indented(table), *map(indented, notes))


def _budget_bar(share: float) -> Text:
    """
    >>> _budget_bar(0.5).plain.count("█")
    20
    """
    filled = min(40, round(share * 40))
    colour = "green" if share < 0.8 else "yellow" if share < 1 else "red"
    return Text.assemble(("█" * filled, colour), ("░" * (40 - filled), "dim"))


def ledger(data: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The charges, one a line."""
    if not data:
        return Text("Nothing is charged to this population.")
    table = columns("run", "round", "collection", "state")
    table.add_column("cost")
    for row in data:
        table.add_row(
            row["run_id"] + " (deleted)" * row["run_deleted"],
            str(row["round"]) if row["event"] else counted(row["round"], "round"),
            str(row["collection"]) if row["event"] else UNKNOWN,
            row["state"],
            event(row["event"]) if row["event"] else "not covered: begun " + row["began_at"][:10],
        )
    return table


def audit(data: Mapping[str, Any]) -> RenderableType:
    """The verdict, and what it rests on."""
    verdict = (
        Text("Claim violated", style="bold red")
        if data["claim_violated"]
        else Text("Consistent with the claim", style="bold green")
    )
    parts: list[RenderableType] = [Text.assemble(verdict, f"  run {data['run_id']}"), indented(_audit(data))]
    if data["examples"]:
        parts += [Text("  Each client's examples", style="bold"), indented(_audit(data["examples"]))]
    return Group(*parts)


def _audit(report: Mapping[str, Any]) -> RenderableType:
    facts, interval = grid(), report["epsilon_interval"]
    of_what = "one step without sampling" if interval is None else "one release"
    facts.add_row("claimed", f"epsilon {number(report['claimed_epsilon'])} at delta {report['delta']:g}, {of_what}")
    if interval is not None:
        low, high = interval
        facts.add_row(
            "measured",
            f"epsilon {number(low)} to {number(high)} at {100 * report['confidence']:g} %, if the noise is Gaussian",
        )
    facts.add_row("at least", f"epsilon {number(report['epsilon_lower_bound'])}, whatever the mechanism is")
    times = f"in each of {report['num_releases']} releases" if report["num_releases"] > 1 else "in one release"
    facts.add_row("canaries", f"{report['num_canaries']} {times}, {report['num_parameters']:,} parameters")
    facts.add_row("guesses", f"{report['num_right']} of {report['num_guesses']} right")
    return facts


def plan(data: Mapping[str, Any]) -> RenderableType:
    """The choices that keep an epsilon."""
    title = Text.assemble(
        (data["name"], "bold"),
        f"  what keeps epsilon {data['epsilon']:g} at delta {data['delta']:g} ({data['neighbouring']})",
    )
    table = columns("free", "noise", "rounds", "clients a round", "epsilon", "noise on the mean")
    for choice in data["choices"]:
        over = choice["epsilon"] > data["epsilon"]
        table.add_row(
            choice["free"],
            f"{choice['noise_multiplier']:.4g}",
            f"{choice['rounds']:,}",
            f"{choice['cohort_size']:,.0f}",
            Text(number(choice["epsilon"]), style="red" if over else "green"),
            f"{choice['noise_on_the_mean']:.4g} C",
        )
    return Group(title, indented(table), Text(""), _curves(data))


def _curves(data: Mapping[str, Any], width: int = 60, height: int = 12) -> RenderableType:
    """Epsilon by round, in characters: a digit for each choice."""
    curves = [choice["curve"] for choice in data["choices"] if choice["curve"]]
    most_rounds = max(curve[-1][0] for curve in curves)
    most_epsilon = max(data["epsilon"] * 1.2, min(max(curve[-1][1] for curve in curves), data["epsilon"] * 3))
    grid = [[" "] * width for _ in range(height)]
    limit = height - 1 - round(data["epsilon"] / most_epsilon * (height - 1))
    grid[limit] = ["-"] * width
    for number_, choice in enumerate(data["choices"], 1):
        for rounds, epsilon in choice["curve"]:
            row = height - 1 - round(epsilon / most_epsilon * (height - 1))
            if row >= 0:
                grid[row][min(width - 1, round(rounds / most_rounds * (width - 1)))] = str(number_)
    lines = []
    for row, cells in enumerate(grid):
        label = (
            f"{most_epsilon * (height - 1 - row) / (height - 1):8.2f} " if row in (0, limit, height - 1) else " " * 9
        )
        lines.append(Text(f"{label}│{''.join(cells)}"))
    lines.append(Text(f"{' ' * 9}└{'─' * width}"))
    lines.append(Text(f"{' ' * 10}1{'rounds':^{width - 2 - len(str(most_rounds))}}{most_rounds}", style="dim"))
    names = "  ".join(f"{number_} {choice['free']}" for number_, choice in enumerate(data["choices"], 1))
    return Group(*lines, Text(f"{' ' * 10}{names}", style="dim"))
