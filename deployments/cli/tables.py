"""Results as people read them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedrounds.deployments.cli.humanize import UNKNOWN, ago, counted, event, number, shown_class, size, whole_duration
from fedrounds.deployments.cli.progress import FirstThatFits, RoundLine, RoundsTable, withholds
from fedrounds.fl_components.run_state import RunState

CLIENTS_SHOWN = 12
UNCLAIMED_SHOWN = 10
STAGES_SHOWN = 3
LABELS_SHOWN = 26
CLIENTS_NAMED = 4
NAMES_WIDTH = 34
HISTOGRAM_FROM = 8
BASELINES = {
    "pooled_majority": "the majority label for all",
    "client_majority": "each client's own majority label",
    "pooled_mean": "the mean of all targets",
    "client_mean": "each client's own mean target",
    "unigram": "the most frequent token (unigram)",
    "bigram": "what most often follows the token (bigram)",
}
STATE_STYLES: dict[str, str] = {
    RunState.COMPLETED: "green",
    RunState.RUNNING: "cyan",
    RunState.PENDING: "cyan",
    RunState.BUDGET_EXHAUSTED: "yellow",
    RunState.CANCELLED: "yellow",
    RunState.INTERRUPTED: "yellow",
}


def result(data: Mapping[str, Any]) -> RenderableType:
    """A run that has ended: what it reached, what that is worth, what it cost, and where to look next."""
    more = {"rounds": f"fedrounds show {data['run_id']}"}
    return Group(_heading(data), "", *_test_metrics(data), _facts(data), "", _where_next(data, more))


def sweep(data: Mapping[str, Any]) -> RenderableType:
    """The cells of a sweep in the grid's order, the best one marked, and where they can be compared."""
    cells = data["cells"]
    done = sum(RunState(cell["state"]).is_finished for cell in cells)
    heading = _state(data["state"])
    heading.append("  ").append(data["name"], style="bold")
    heading.append(f", {done} of {len(cells)} cells, sweep {data['sweep_id']}")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for field in data["over"]:
        table.add_column(field, justify="right", overflow="fold")
    primary = data["primary_metric"]
    for name in (primary or "", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("run", "state"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for cell in cells:
        best = cell["run_id"] == data["best"]
        values = [value if isinstance(value, str) else json.dumps(value) for value in cell["values"].values()]
        row = [
            *values,
            number(cell["metrics"].get(f"eval/{primary}")),
            "best" if best else "",
            cell["run_id"],
            _state(cell["state"]),
        ]
        table.add_row(*row, style="bold" if best else None)
    failed = [cell for cell in cells if cell.get("error")]
    errors = [Text(f"{cell['run_id']}: {cell['error']['message']}", style="red") for cell in failed]
    comparison = data["compare_url"] or ""
    places = {
        "Prefect": data["prefect_flow_run_url"],
        "MLflow": comparison
        if comparison.startswith("http")
        else f"experiment {data['name']}, run {data['sweep_id']}, which links to the parallel coordinates",
        "one cell": f"fedrounds show {data['best'] or cells[0]['run_id']}",
        "both pages": "fedrounds ui",
        "go on": f"fedrounds resume {data['sweep_id']}" if data["state"] != RunState.COMPLETED else None,
    }
    return Group(heading, "", _indented(table), "", *([*errors, Text()] if errors else []), _places(places))


def details(data: Mapping[str, Any]) -> RenderableType:
    """All that is known of one run, with its rounds."""
    parts = [_heading(data), "", *_test_metrics(data), _facts(data)]
    history = data.get("history") or []
    if history:
        lines = [
            RoundLine.of(row["round"], row["metrics"], row.get("seconds"), data["primary_metric"]) for row in history
        ]
        parts += ["", Text("Rounds", style="bold"), _indented(RoundsTable(lines))]
    return Group(*parts, "", _where_next(data, {}))


def runs(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a run, in the order given."""
    if not rows:
        return Text("No runs yet. Begin one with: fedrounds train CONFIG")
    return FirstThatFits([_runs(rows, narrow=False), _runs(rows, narrow=True)])


def _primary_value(run: Mapping[str, Any]) -> str:
    """A run's value of its own primary metric."""
    return number((run.get("metrics") or {}).get(f"eval/{run['primary_metric']}"))


def _runs(rows: Sequence[Mapping[str, Any]], *, narrow: bool) -> Table:
    """The experiment and the data in columns of their own, or in a line below the run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run",) if narrow else ("run", "experiment", "data"):
        table.add_column(name, overflow="fold")
    table.add_column("state", no_wrap=True)
    primaries = {row["primary_metric"] for row in rows}
    is_common = len(primaries) == 1
    for name in ("rounds", primaries.pop() if is_common else "primary metric", "duration"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("when", no_wrap=True)
    for row in rows:
        data, updated_at = row["data"], row["updated_at"]
        source = (data["source"] or "").rstrip("/").rpartition("/")[2]
        run_id, experiment, data_set = row["run_id"], row["name"], f"{data['kind']} {source}".rstrip()
        below = Text.assemble(run_id, (f"\n  {experiment} on {data_set}", "dim"))
        table.add_row(
            *([below] if narrow else [run_id, experiment, data_set]),
            _state(row["state"]),
            f"{row['committed_round']}/{row['rounds']}",
            _primary_value(row) if is_common else f"{row['primary_metric']} {_primary_value(row)}",
            UNKNOWN if row["duration_s"] is None else whole_duration(row["duration_s"]),
            ago(time.time() - updated_at) if updated_at else UNKNOWN,
        )
    return table


def data_sets(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a public data set."""
    table = _columns("data set", "files")
    table.add_column("where", overflow="fold")
    for row in rows:
        num_files = len(row["files"])
        present = num_files - len(row["missing"])
        where = row["folder"]
        if not present:
            where = row["instead"] or f"get it with: fedrounds data get {row['name']}"
        table.add_row(row["name"], f"{present} of {num_files}" if num_files else UNKNOWN, where)
    return table


def downloaded(data: Mapping[str, Any]) -> RenderableType:
    if data["folder"] is None:
        return Text(f"{data['name']} needs no files: {data['instead']}.")
    if not data["downloaded"]:
        return Text(f"The files of {data['name']} are already in {data['folder']}.")
    return Text(f"{counted(len(data['downloaded']), 'file')} of {data['name']} downloaded into {data['folder']}.")


def checked_config(data: Mapping[str, Any]) -> RenderableType:
    """What a configuration would run."""
    facts = _grid()
    for label, key in (
        ("name", "name"),
        ("population", "population"),
        ("rounds", "rounds"),
        ("clients", "num_clients"),
        ("cohort", "cohort_size"),
        ("parameters", "num_parameters"),
        ("digest", "config_digest"),
    ):
        value = data.get(key)
        if value is not None:
            words = value[:12] if key == "config_digest" else f"{value:,}" if isinstance(value, int) else str(value)
            facts.add_row(label, words)
    tried = "num_parameters" in data
    if tried:
        up, down = (data["communication"][f"{way}_bytes"] for way in ("upload", "download"))
        facts.add_row("communication", f"about {size(up)} up, {size(down)} down")
    parts: list[RenderableType] = [
        Text.assemble(
            ("Valid", "bold green"),
            "  this configuration would run"
            if tried
            else "  as it is written; --data tries its data and its model too",
        ),
        "",
        _indented(facts),
    ]
    for words in data.get("not_reproducible") or ():
        parts += [
            "",
            Text(f"  not reproducible: {words}; a resume would be refused, or end with another model", style="yellow"),
        ]
    clients = data.get("clients") or []
    if clients:
        measured = [part for part in ("train", "test") if part in clients[0]]
        table = _columns("client", *(f"{part} examples" for part in measured))
        for client in clients[:CLIENTS_SHOWN]:
            table.add_row(str(client["id"]), *(f"{client[part]:,}" for part in measured))
        parts += ["", _indented(table)]
        if len(clients) > CLIENTS_SHOWN:
            parts.append(Text(f"  and {data['num_clients'] - CLIENTS_SHOWN:,} more clients", style="dim"))
    if data.get("withheld"):
        parts += ["", Text(f"  withheld under the privacy claim: {data['withheld']}")]
    if data.get("partition") and data["num_clients"] >= HISTOGRAM_FROM:
        parts += ["", _indented(_sizes(data["partition"]))]
    if data.get("classes"):
        parts += ["", _indented(_classes(data["classes"], data["num_clients"]))]
    for group in data.get("look_alikes") or ():
        names = ", ".join(repr(name) for name in group[:CLIENTS_SHOWN])
        warning = f"  {names} are different classes; if they are spellings of one, write it alike in all files"
        parts += ["", Text(warning, style="yellow")]
    if data.get("columns"):
        parts += ["", _indented(_columns_read(data["columns"]))]
    if data.get("left_alone"):
        names = data["left_alone"][:CLIENTS_SHOWN]
        more = len(data["left_alone"]) - len(names)
        words = ", ".join(names) + (f" and {more:,} more" if more else "")
        parts += ["", Text(f"  left alone in the clients' folder: {words}", style="dim")]
    baselines = _columns("without a model", f"test {_baseline_metric(data.get('baselines') or {})}")
    for key, label in BASELINES.items():
        if key in (data.get("baselines") or {}):
            baselines.add_row(label, number(data["baselines"][key]))
    if baselines.row_count:
        parts += ["", _indented(baselines)]
    return Group(*parts)


def _sizes(partition: Mapping[str, Any]) -> RenderableType:
    """The sizes of clients, as bars."""
    sizes = _columns("training examples", "clients", "")
    bins = partition["size_histogram"]
    for low, high, count in bins:
        words = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        sizes.add_row(words, f"{count:,}", _bar(count, max(each[2] for each in bins)))
    found = partition["examples"]
    sizes.add_row(Text(f"median {found['median']:,.0f}, mean {found['mean']:,.1f}", style="dim"), "", "")
    return sizes


def _classes(classes: Sequence[Mapping[str, Any]], num_clients: int) -> RenderableType:
    """The classes by name: how often each occurs, as bars, and which clients have it."""
    table = _columns("class", "training rows", "")
    table.add_column("clients")
    most = max(each["rows"] for each in classes)
    for each in classes[:LABELS_SHOWN]:
        bar = _bar(each["rows"], most, width=12)
        table.add_row(shown_class(each["class"]), f"{each['rows']:,}", bar, _which(each, num_clients))
    if len(classes) > LABELS_SHOWN:
        table.add_row(Text(f"and {len(classes) - LABELS_SHOWN} more", style="dim"), "", "", "")
    return table


def _which(of_class: Mapping[str, Any], num_clients: int) -> str:
    """
    >>> _which({"num_clients": 3, "clients": ["east"], "all_but": True}, 4)
    'all but east'
    >>> _which({"num_clients": 40, "clients": ["a", "b", "c", "d", "e"], "all_but": False}, 100)
    '40 of 100'
    >>> _which({"num_clients": 28, "clients": ["client-0001", "client-0002", "client-0003"], "all_but": True}, 31)
    '28 of 31'
    """
    having, listed = of_class["num_clients"], of_class["clients"]
    if having in (0, num_clients):
        return "all" if having else "none"
    names = "all but " * of_class["all_but"] + ", ".join(listed)
    complete = len(listed) in (having, num_clients - having)
    # names that need a second line are harder to read than a count, unless there are few clients in all
    short = len(listed) <= CLIENTS_NAMED and (len(names) <= NAMES_WIDTH or num_clients <= HISTOGRAM_FROM)
    return names if complete and short else f"{having:,} of {num_clients:,}"


def _columns_read(columns: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What the columns of tables hold: the kind, the range or the values, and the share of missing values."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for name in ("column", "kind", "range"):
        table.add_column(name, overflow="fold")
    table.add_column("missing", justify="right")
    if any(column["missing"] for column in columns):
        table.add_column("most at")
    for column in columns:
        if column["kind"] == "label" and not column["missing"]:
            continue
        words = "-"
        if column["range"] is not None:
            low, high = (each if isinstance(each, str) else f"{each:.6g}" for each in column["range"])
            words = low if low == high else f"{low} to {high}"
        elif column["counts"] is not None:
            counts = list(column["counts"].items())
            words = ", ".join(f"{shown_class(value)} {count:,}" for value, count in counts[:CLIENTS_NAMED])
            words += f" and {len(counts) - CLIENTS_NAMED} more" if len(counts) > CLIENTS_NAMED else ""
        client, share = max(column["missing_by_client"].items(), key=lambda item: item[1])
        most = f"{client} ({_percent(share)})" if share > column["missing"] else ""
        cells = (column["name"], column["kind"], words, _percent(column["missing"]), most)
        table.add_row(*cells[: len(table.columns)])
    return table


def _percent(share: float) -> str:
    """
    >>> _percent(0.0), _percent(0.0004), _percent(0.0812), _percent(1.0)
    ('0 %', '0.04 %', '8.1 %', '100 %')
    """
    return f"{100 * share:.1f} %" if 0.0005 <= share < 0.9995 else f"{100 * share:.2g} %" if share < 0.5 else "100 %"


def _bar(count: int, largest: int, *, width: int = 24) -> Text:
    """
    >>> _bar(1, 1000).plain, len(_bar(5, 5).plain)
    ('▏', 24)
    """
    eighths = round(count / max(largest, 1) * width * 8)
    whole, rest = divmod(max(eighths, 1 if count else 0), 8)
    return Text("█" * whole + (" ▏▎▍▌▋▊▉"[rest] if rest else ""), style="cyan", justify="left")


def deployment(data: Mapping[str, Any]) -> RenderableType:
    """A scheduled training, and what is still missing before it runs."""
    lines = [Text.assemble((data["name"], "bold"), f" trains {data['config']}")]
    facts = {
        "schedule": f"{data['cron']} (UTC), {'on' if data['active'] else 'off: switch it on in the page, or --active'}",
        "settings": " ".join(data["overrides"]),
        "page": data["url"],
        "run it by": "a worker, which fedrounds up starts",
    }
    lines += [Text.assemble((f"  {label:<13} ", "dim"), value) for label, value in facts.items() if value]
    if data["audit"] is not None:
        audit = data["audit"]
        lines.append(Text.assemble((audit["name"], "bold"), f" audits the newest run of {audit['run']}"))
        lines.append(Text.assemble(("  schedule      ", "dim"), f"{audit['cron']} (UTC)"))
        lines.append(Text.assemble(("  page          ", "dim"), audit["url"]))
    return Group(*lines)


def journal(data: Mapping[str, Any]) -> RenderableType:
    lines = [Text.assemble(("Intact", "bold green"), f"  {data['rows']:,} rows, head {data['head'] or 'none yet'}")]
    agree = "agrees" if data["anchors"] == 1 else "agree"
    lines.append(Text(f"  and {counted(data['anchors'], 'anchor')} in MLflow and Prefect {agree}", style="dim"))
    lines += [Text(f"  {problem}", style="yellow") for problem in data["not_reached"]]
    return Group(*lines)


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
            table = _columns("run", "rounds", "epsilon", *["tightest"] * tightest)
            for run in budget["runs"]:
                epsilons = [number(run["epsilon"]), *[number(run["epsilon_tightest"])] * tightest]
                table.add_row(f"{run['run_id']} ({run['name']})", str(run["rounds"]), *epsilons)
            parts.append(_indented(table))
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
    table = _columns("client", "rows", "batch", "noise", "noise on the mean", "epsilon as configured", "rounds enough")
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
    return Group(title, _indented(table), *map(_indented, notes))


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
    table = _columns("run", "round", "collection", "state")
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


def deleted(data: Mapping[str, Any]) -> RenderableType:
    """What was deleted, or would be, and what was kept."""
    runs, verb = data["runs"], "Would delete" if data["dry_run"] else "Deleted"
    lines: list[RenderableType] = [Text(f"{verb} {len(runs)} run{'s' * (len(runs) != 1)}{'.' if not runs else ':'}")]
    if runs:
        table = _columns("run", "experiment", "state", "rounds", "when")
        for row in runs:
            when = ago(time.time() - row["updated_at"])
            table.add_row(row["run_id"], row["name"], _state(row["state"]), str(row["committed_round"]), when)
        lines.append(table)
    lines += [Text(f"Kept {run_id}: {reason}.") for run_id, reason in data["kept"].items()]
    if data["dry_run"] or not runs:
        return Group(*lines)
    lines.append(Text(f"Their charges and the journal stay. Prefect lost {data['prefect']['flow_runs']} flow runs."))
    if data["mlflow"] is not None:
        found = data["mlflow"]
        versions = f"{found['model_versions']} registered version{'s' * (found['model_versions'] != 1)}"
        lines.append(Text(f"MLflow: {found['runs']} runs and {versions} deleted; `mlflow gc` frees their files."))
        lines += [Text(f"MLflow keeps {run_id}: {reason}.") for run_id, reason in found["kept"].items()]
    problems = [each["problem"] for each in (data["prefect"], data["mlflow"]) if each is not None and each["problem"]]
    lines += [Text(f"{problem}. Repeat the command with these runs to delete the rest.") for problem in problems]
    return Group(*lines)


def audit(data: Mapping[str, Any]) -> RenderableType:
    """The verdict, and what it rests on."""
    verdict = (
        Text("Claim violated", style="bold red")
        if data["claim_violated"]
        else Text("Consistent with the claim", style="bold green")
    )
    parts: list[RenderableType] = [Text.assemble(verdict, f"  run {data['run_id']}"), _indented(_audit(data))]
    if data["examples"]:
        parts += [Text("  Each client's examples", style="bold"), _indented(_audit(data["examples"]))]
    return Group(*parts)


def _audit(report: Mapping[str, Any]) -> RenderableType:
    facts, interval = _grid(), report["epsilon_interval"]
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
    table = _columns("free", "noise", "rounds", "clients a round", "epsilon", "noise on the mean")
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
    return Group(title, _indented(table), Text(""), _curves(data))


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


def _heading(data: Mapping[str, Any]) -> RenderableType:
    heading = _state(data["state"])
    heading.append("  ")
    heading.append(data["name"], style="bold")
    heading.append(f", {data['committed_round']} of {data['rounds']} rounds, run {data['run_id']}")
    if data.get("error"):
        heading.append(f"\n{data['error']['message']}", style="red")
        if data["error"].get("hint"):
            heading.append(f"\n{data['error']['hint']}")
    return heading


def _baseline_metric(baselines: Mapping[str, float]) -> str:
    """What the predictors without a model are measured by."""
    return "mse" if "pooled_mean" in baselines else "accuracy"


def _test_metrics(data: Mapping[str, Any]) -> list[RenderableType]:
    """The primary metric, pooled and by client, the other metrics pooled, and what is reached without a model."""
    metrics: Mapping[str, float] = data.get("metrics") or {}
    primary = data["primary_metric"]
    if withholds(metrics) and f"eval/{primary}" not in metrics:
        return []
    baselines: Mapping[str, float] = data.get("baselines") or {}
    prefix, suffix = "eval/client/", f"/{primary}"
    clients = {
        name[len(prefix) : -len(suffix)]: value
        for name, value in metrics.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }
    table = _columns(f"test {primary}", "")
    table.add_row(Text("all clients pooled", style="bold"), Text(number(metrics.get(f"eval/{primary}")), style="bold"))
    if len(clients) <= CLIENTS_SHOWN:
        for client, value in clients.items():
            table.add_row(f"  {client}", number(value))
    else:
        ordered = sorted(clients.values())
        for label, index in (("lowest", 0), ("median", len(ordered) // 2), ("highest", -1)):
            table.add_row(f"  {label} of {len(ordered):,} clients", number(ordered[index]))
    others = {name: value for name, value in metrics.items() if re.fullmatch(r"eval/\w+", name)}
    for name, value in others.items():
        if name not in (f"eval/{primary}", "eval/loss"):
            table.add_row(f"{name.removeprefix('eval/')}, pooled", number(value))
    measure = _baseline_metric(baselines)
    prefix = "without a model: " if measure == primary else f"{measure} without a model: "
    for key, label in BASELINES.items():
        if key in baselines:
            table.add_row(Text(f"{prefix}{label}", style="dim"), Text(number(baselines[key]), style="dim"))
    return [_indented(table), "", *_confusion(metrics)]


def _confusion(metrics: Mapping[str, float]) -> list[RenderableType]:
    """The confusion matrix, where it was evaluated: a row for each class, a column for each predicted one."""
    prefix = "eval/confusion_matrix/"
    counts = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    if not counts:
        return []
    entries, size = list(counts.items()), round(len(counts) ** 0.5)
    names = [name[: len(name) // 2] for name, _ in entries[:: size + 1]]  # of the diagonal: "NAME/NAME"
    table = _columns("class", *(f"as {name}" for name in names))
    for row, name in enumerate(names):
        table.add_row(name, *(f"{count:,.0f}" for _, count in entries[row * size : (row + 1) * size]))
    return [Text("  test rows of each class, and what they are predicted as", style="dim"), _indented(table), ""]


def _facts(data: Mapping[str, Any]) -> RenderableType:
    communication = data.get("communication") or {}
    facts = _grid()
    told = communication.get("upload_bytes") is not None
    if withholds(data.get("metrics") or {}):
        traffic = "" if told else "traffic, "
        facts.add_row("withheld", f"what is measured on clients: losses, test results, {traffic}times")
    if told or not withholds(data.get("metrics") or {}):
        up, down = size(communication.get("upload_bytes")), size(communication.get("download_bytes"))
        facts.add_row("communication", f"{up} up, {down} down")
    if communication.get("simulated_s") is not None:
        reached = list(communication["simulated_s_to_primary"].items())[-3:]
        after = "; ".join(f"{data['primary_metric']} {level} after {s:,.1f} s" for level, s in reached)
        facts.add_row("network", f"{communication['simulated_s']:,.1f} s simulated{after and f' ({after})'}")
    privacy = data.get("privacy") or {}
    facts.add_row("privacy", _privacy(privacy))
    left_out = privacy.get("left_out") or (privacy.get("examples") or {}).get("left_out")
    if left_out:
        from fedrounds.fl_components.reports.statement import left_out_in_words

        facts.add_row("left out", f"{left_out_in_words(left_out)}: their budgets are spent")
    if data.get("seconds"):
        facts.add_row("seconds", _seconds(data["seconds"]))
    if data.get("peak_memory_mb"):
        facts.add_row("memory", f"{data['peak_memory_mb']:,.0f} MB at most, training processes included")
    facts.add_row("parameters", f"sha256 {(data.get('params_digest') or UNKNOWN)[:12]}")
    for label, key in (("model", "model_uri"), ("continues", "ancestor")):
        if data.get(key):
            facts.add_row(label, str(data[key]))
    if data.get("attempt", 1) > 1:
        facts.add_row("attempts", str(data["attempt"]))
    return _indented(facts)


def _seconds(seconds: Mapping[str, float]) -> str:
    """The longest stages first, the short ones summed: one line.

    >>> _seconds({"load": 0.2, "train": 12.34, "evaluate": 1.2, "aggregate": 0.9, "compress": 0.5, "admit": 0.1})
    'train 12.3, evaluate 1.2, aggregate 0.9, all others 0.8'
    """
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    words = [f"{stage} {value:.1f}" for stage, value in ordered[:STAGES_SHOWN]]
    others = sum(value for _, value in ordered[STAGES_SHOWN:])
    return ", ".join(words + ([f"all others {others:.1f}"] if len(ordered) > STAGES_SHOWN else []))


def _privacy(privacy: Mapping[str, Any]) -> str:
    epsilon = privacy.get("epsilon")
    if epsilon is None:
        return "no privacy claim"
    terms = [f"delta {privacy['delta']:g}"] if privacy.get("delta") is not None else []
    terms += [str(privacy[key]) for key in ("unit", "neighbouring", "accountant") if privacy.get(key)]
    tightest, clients, examples = (privacy.get(key) for key in ("epsilon_tightest", "clients", "examples"))
    told = f"epsilon {number(epsilon)}" + (f" ({', '.join(terms)})" if terms else "")
    told += f", {number(tightest)} by privacy loss distributions" if tightest is not None else ""
    if privacy.get("unit") == "example":
        told += ", the largest of any client"
    if clients:
        named = [f"{name} {number(each)}" for name, each in list(clients.items())[:CLIENTS_SHOWN]]
        more = len(clients) - len(named)
        told += f": {', '.join(named)}" + (f" and {more} more" if more else "")
    if privacy.get("demonstration"):
        told += "; a demonstration on public data"
    return f"{told}; {_privacy(examples)}" if examples else told


def _where_next(data: Mapping[str, Any], more: Mapping[str, str]) -> RenderableType:
    places = {
        "Prefect": data.get("prefect_flow_run_url") or data.get("prefect_flow_run_id"),
        "MLflow": data.get("mlflow_run_url") or f"experiment {data['name']}, run {data['run_id']}",
        **more,
        "both pages": "fedrounds ui",
    }
    if not RunState(data["state"]).is_finished:
        places["go on"] = f"fedrounds resume {data['run_id']}"
    return _places(places)


def _places(places: Mapping[str, str | None]) -> RenderableType:
    # Lines of text, not a table: a table would cut a link that is wider than the terminal.
    lines = [Text("Where to look next", style="bold")]
    lines += [Text.assemble((f"  {label:<13} ", "dim"), value) for label, value in places.items() if value]
    return Group(*lines)


def _state(state: str) -> Text:
    return Text(state, style=f"bold {STATE_STYLES.get(state, 'red')}")


def _columns(first: str, *numbers: str) -> Table:
    """A column of words and columns of numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _grid() -> Table:
    """Labels on the left, values on the right."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    return grid


def _indented(what: RenderableType) -> RenderableType:
    return Padding(what, (0, 0, 0, 2), expand=False)
