"""Tables of runs, sweeps, deployments and the journal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedrounds.deployments.cli.humanize import UNKNOWN, ago, counted, number, size, whole_duration
from fedrounds.deployments.cli.layout import (
    BASELINES,
    CLIENTS_SHOWN,
    baseline_metric,
    columns,
    grid,
    indented,
    places_grid,
)
from fedrounds.deployments.cli.progress import FirstThatFits, RoundLine, RoundsTable, withholds
from fedrounds.fl_components.run_state import RunState

STAGES_SHOWN = 3


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
    return Group(heading, "", indented(table), "", *([*errors, Text()] if errors else []), places_grid(places))


def details(data: Mapping[str, Any]) -> RenderableType:
    """All that is known of one run, with its rounds."""
    parts = [_heading(data), "", *_test_metrics(data), _facts(data)]
    history = data.get("history") or []
    if history:
        lines = [
            RoundLine.of(row["round"], row["metrics"], row.get("seconds"), data["primary_metric"]) for row in history
        ]
        parts += ["", Text("Rounds", style="bold"), indented(RoundsTable(lines))]
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


def deleted(data: Mapping[str, Any]) -> RenderableType:
    """What was deleted, or would be, and what was kept."""
    runs, verb = data["runs"], "Would delete" if data["dry_run"] else "Deleted"
    lines: list[RenderableType] = [Text(f"{verb} {len(runs)} run{'s' * (len(runs) != 1)}{'.' if not runs else ':'}")]
    if runs:
        table = columns("run", "experiment", "state", "rounds", "when")
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
    table = columns(f"test {primary}", "")
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
    measure = baseline_metric(baselines)
    prefix = "without a model: " if measure == primary else f"{measure} without a model: "
    for key, label in BASELINES.items():
        if key in baselines:
            table.add_row(Text(f"{prefix}{label}", style="dim"), Text(number(baselines[key]), style="dim"))
    return [indented(table), "", *_confusion(metrics)]


def _confusion(metrics: Mapping[str, float]) -> list[RenderableType]:
    """The confusion matrix, where it was evaluated: a row for each class, a column for each predicted one."""
    prefix = "eval/confusion_matrix/"
    counts = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    if not counts:
        return []
    entries, size = list(counts.items()), round(len(counts) ** 0.5)
    names = [name[: len(name) // 2] for name, _ in entries[:: size + 1]]  # of the diagonal: "NAME/NAME"
    table = columns("class", *(f"as {name}" for name in names))
    for row, name in enumerate(names):
        table.add_row(name, *(f"{count:,.0f}" for _, count in entries[row * size : (row + 1) * size]))
    return [Text("  test rows of each class, and what they are predicted as", style="dim"), indented(table), ""]


def _facts(data: Mapping[str, Any]) -> RenderableType:
    communication = data.get("communication") or {}
    facts = grid()
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
    return indented(facts)


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
    return places_grid(places)


def _state(state: str) -> Text:
    return Text(state, style=f"bold {STATE_STYLES.get(state, 'red')}")
