"""The sweep that this process works through: its cells, checked before the first is trained, and how they end."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.config import (
    FederationConfig,
    config_digest,
    load_fields,
    parse_axis,
    parse_config,
    source_folder,
    with_absolute_paths,
    with_value,
)
from fedrounds.fl_components.errors import ConfigError, FedroundsError, RunCancelled
from fedrounds.fl_components.models.base import REGISTERED_MODEL
from fedrounds.fl_components.store import Store, SweepRecord, cell_name
from fedrounds.tasks.outcome import Outcome
from fedrounds.tasks.progress import Listener, Progress, nobody_listens
from fedrounds.tasks.session import ConfigSource

Over = Sequence[str] | Mapping[str, Sequence[Any]]
"""The axes of a grid: each of the form `a.b=1,2,3`, or fields and their values."""

MAX_CELLS = 999
"""So that the three digits of a cell's run id are enough, and a slip of the hand is found."""

_open: dict[str, SweepSession] = {}


class SweepSession:
    """A sweep held by this process.

    `errors` has what ended each cell that failed, by its run id; the sweep's flow sets `outcome` when it ends. `shown`
    says where the sweep is in Prefect and MLflow, as far as the flow knows.
    """

    def __init__(self, store: Store, record: SweepRecord, listener: Listener) -> None:
        self.store, self.record, self.listener = store, record, listener
        self.cells = parse_cells(record)
        self.cancelled = threading.Event()
        self.errors: dict[str, FedroundsError] = {}
        self.outcome = Outcome(None)
        self.shown: dict[str, str | None] = {}

    @property
    def sweep_id(self) -> str:
        return self.record.sweep_id

    def unfinished(self) -> list[str]:
        """The cells that have not begun, or that a resume has something to do for, in the grid's order."""
        begun = {run.run_id for run in self.store.runs(sweep_id=self.sweep_id, deleted=True)}
        unfinished = {run.run_id for run in self.store.runs(sweep_id=self.sweep_id, unfinished=True)}
        return [run_id for run_id in self.cells if run_id not in begun or run_id in unfinished]

    def listener_of(self, run_id: str) -> Listener:
        """Passes on what a cell tells, with its place in the sweep."""
        number = list(self.cells).index(run_id) + 1
        place = f"cell {number} of {len(self.cells)}: {cell_name(self.record.cells[run_id])}"
        return lambda news: self.listener(replace(news, sweep_id=self.sweep_id, cell=place))

    def check_cancelled(self) -> None:
        """Raises `RunCancelled` when the sweep was asked to stop."""
        if self.cancelled.is_set():
            raise RunCancelled(
                f"sweep {self.sweep_id} was stopped on request",
                hint=f"`fedrounds resume {self.sweep_id}` goes on with it",
            )

    def say(self, text: str) -> None:
        self.listener(Progress("message", text, sweep_id=self.sweep_id))


@contextmanager
def sweep_session(
    sweep_id: str,
    config: ConfigSource = None,
    over: Over = (),
    overrides: Sequence[str] = (),
    listener: Listener = nobody_listens,
) -> Iterator[SweepSession]:
    """The session of `sweep_id`: the one that is already open in this process, else a new one.

    `config` is a path, a tree of plain values, or None for a sweep that exists. Raises `ConfigError`, naming the cell
    that makes no sense, and what `Store.create_sweep` raises.
    """
    if sweep_id in _open:
        yield _open[sweep_id]
        return
    if config is None and (over or overrides):
        raise ConfigError("a grid or overrides are given but no configuration", hint="name the configuration file too")
    planned = plan(sweep_id, config, over, overrides) if config is not None else None
    with Store.open() as store:
        if planned is None:
            record = store.sweep(sweep_id)
        else:
            record = store.create_sweep(
                sweep_id=sweep_id,
                name=planned.name,
                config=planned.config,
                over=planned.over,
                source_folder=planned.source_folder,
            )
        _open[sweep_id] = SweepSession(store, record, listener)
        try:
            yield _open[sweep_id]
        finally:
            del _open[sweep_id]


def plan(sweep_id: str, config: str | Mapping[str, Any], over: Over = (), overrides: Sequence[str] = ()) -> SweepRecord:
    """The sweep that is asked for, each of its cells checked. Raises `ConfigError`.

    A value of an axis is kept as the configuration has it: '0.1' in quotes, for a number, becomes 0.1.
    """
    axes = [parse_axis(axis) if isinstance(axis, str) else axis for axis in _items(over)]
    fields = [field for field, _ in axes]
    if not axes:
        raise ConfigError("a sweep needs a field to vary", hint="for instance --over training.learning_rate=0.01,0.1")
    for field in fields:
        if fields.count(field) > 1:
            raise ConfigError(f"{field} is varied twice", hint="give all of its values in one --over")
    if "name" in fields:
        raise ConfigError(
            "name cannot be varied: all cells of a sweep are in one MLflow experiment", hint="begin a sweep for each"
        )
    base = load_fields(config, overrides)
    try:
        base, axes = json.loads(canonical_json([base, [[field, list(values)] for field, values in axes]]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a value is none that JSON has ({error})", hint="write a date as text, in quotes") from error
    record = SweepRecord(
        sweep_id, name="", config=base, over=axes, source_folder=str(source_folder(config)), created_at=0.0
    )
    cells = parse_cells(record)
    kept = [(field, _distinct(cells, record, field)) for field in fields]
    return replace(record, name=next(iter(cells.values())).name, over=kept)


def parse_cells(sweep: SweepRecord) -> dict[str, FederationConfig]:
    """The configuration of each cell, by its run id. Raises `ConfigError`, naming the cell that makes no sense."""
    size = math.prod(len(values) for _, values in sweep.over)
    if size > MAX_CELLS:
        raise ConfigError(f"the grid has {size:,} cells; a sweep has at most {MAX_CELLS}", hint="vary fewer values")
    grid = sweep.cells
    cells: dict[str, FederationConfig] = {}
    seen: dict[str, str] = {}
    for run_id, values in grid.items():
        fields: Mapping[str, Any] = sweep.config
        try:
            for field, value in values.items():
                fields = with_value(fields, field, value)
            cells[run_id] = parse_config(with_absolute_paths(fields, Path(sweep.source_folder)))
        except ConfigError as error:
            raise ConfigError(
                f"the cell {cell_name(values)} makes no sense: {error.message}", hint=error.hint
            ) from error
        twin = seen.setdefault(config_digest(cells[run_id]), run_id)
        if twin != run_id:
            raise ConfigError(
                f"the cells {cell_name(grid[twin])} and {cell_name(values)} are the same configuration",
                hint="give each value once, and vary only fields that do not replace each other",
            )
    for run_id, config in cells.items():
        _check_start(config.model.start_from, cell_name(grid[run_id]))
    return cells


def _check_start(start_from: str, cell: str) -> None:
    registered = REGISTERED_MODEL.fullmatch(start_from)
    if start_from != "fresh" and (registered is None or registered["version"] is None):
        raise ConfigError(
            f"model.start_from is {start_from!r} in the cell {cell}: it would begin where the cell before it ended",
            hint="use fresh, or a version of a registered model: models:/NAME/VERSION",
        )


def _items(over: Over) -> list[Any]:
    return list(over.items()) if isinstance(over, Mapping) else list(over)


def _distinct(cells: Mapping[str, FederationConfig], sweep: SweepRecord, field: str) -> list[Any]:
    """The values of one field over the grid, each once, in the order of their first cells."""
    found = (canonical_json(_as_read(cells[run_id], field, values[field])) for run_id, values in sweep.cells.items())
    return [json.loads(text) for text in dict.fromkeys(found)]


def _as_read(config: FederationConfig, field: str, value: Any) -> Any:
    """A single value as the configuration has it; a list or a group of fields as it was given."""
    read: Any = config.model_dump(mode="json")
    for name in field.split("."):
        read = read.get(name) if isinstance(read, dict) else None
    return value if isinstance(value, list | dict) or isinstance(read, list | dict | None) else read
