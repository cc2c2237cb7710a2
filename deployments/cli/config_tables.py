"""Tables of a checked configuration, and of data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedrounds.deployments.cli.humanize import UNKNOWN, counted, number, shown_class, size
from fedrounds.deployments.cli.layout import BASELINES, CLIENTS_SHOWN, baseline_metric, columns, grid, indented

LABELS_SHOWN = 26


CLIENTS_NAMED = 4


NAMES_WIDTH = 34


HISTOGRAM_FROM = 8


def data_sets(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line a public data set."""
    table = columns("data set", "files")
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
    facts = grid()
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
        indented(facts),
    ]
    for words in data.get("not_reproducible") or ():
        parts += [
            "",
            Text(f"  not reproducible: {words}; a resume would be refused, or end with another model", style="yellow"),
        ]
    clients = data.get("clients") or []
    if clients:
        measured = [part for part in ("train", "test") if part in clients[0]]
        table = columns("client", *(f"{part} examples" for part in measured))
        for client in clients[:CLIENTS_SHOWN]:
            table.add_row(str(client["id"]), *(f"{client[part]:,}" for part in measured))
        parts += ["", indented(table)]
        if len(clients) > CLIENTS_SHOWN:
            parts.append(Text(f"  and {data['num_clients'] - CLIENTS_SHOWN:,} more clients", style="dim"))
    if data.get("withheld"):
        parts += ["", Text(f"  withheld under the privacy claim: {data['withheld']}")]
    if data.get("partition") and data["num_clients"] >= HISTOGRAM_FROM:
        parts += ["", indented(_sizes(data["partition"]))]
    if data.get("classes"):
        parts += ["", indented(_classes(data["classes"], data["num_clients"]))]
    for group in data.get("look_alikes") or ():
        names = ", ".join(repr(name) for name in group[:CLIENTS_SHOWN])
        warning = f"  {names} are different classes; if they are spellings of one, write it alike in all files"
        parts += ["", Text(warning, style="yellow")]
    if data.get("columns"):
        parts += ["", indented(_columns_read(data["columns"]))]
    if data.get("left_alone"):
        names = data["left_alone"][:CLIENTS_SHOWN]
        more = len(data["left_alone"]) - len(names)
        words = ", ".join(names) + (f" and {more:,} more" if more else "")
        parts += ["", Text(f"  left alone in the clients' folder: {words}", style="dim")]
    baselines = columns("without a model", f"test {baseline_metric(data.get('baselines') or {})}")
    for key, label in BASELINES.items():
        if key in (data.get("baselines") or {}):
            baselines.add_row(label, number(data["baselines"][key]))
    if baselines.row_count:
        parts += ["", indented(baselines)]
    return Group(*parts)


def _sizes(partition: Mapping[str, Any]) -> RenderableType:
    """The sizes of clients, as bars."""
    sizes = columns("training examples", "clients", "")
    bins = partition["size_histogram"]
    for low, high, count in bins:
        words = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        sizes.add_row(words, f"{count:,}", _bar(count, max(each[2] for each in bins)))
    found = partition["examples"]
    sizes.add_row(Text(f"median {found['median']:,.0f}, mean {found['mean']:,.1f}", style="dim"), "", "")
    return sizes


def _classes(classes: Sequence[Mapping[str, Any]], num_clients: int) -> RenderableType:
    """The classes by name: how often each occurs, as bars, and which clients have it."""
    table = columns("class", "training rows", "")
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
