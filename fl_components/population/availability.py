"""Which simulated clients are there in a round.

An availability rule answers for the rows it is asked about, in time proportional to them, and gives the same answer
whoever asks: a draw depends on the seed, the round and the client alone.
"""

from __future__ import annotations

import csv
import math
from abc import abstractmethod
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedrounds.fl_components.errors import DataError
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rules import Rule

Rows = NDArray[np.int64]


class AvailabilityRule(Rule):
    """Which clients could take part."""

    kind: str

    @property
    def mean_share(self) -> float | None:
        """The share of the clients that are there in a round, averaged over rounds; None where it is not known."""
        return None

    @abstractmethod
    def available(self, rows_N: Rows, round: int, seed: int) -> NDArray[np.bool_]:
        """Whether the clients in these rows are there in this round, bool [N]."""


class Always(AvailabilityRule):
    """Every client, every round.

    >>> Always().available(np.array([3, 5]), round=1, seed=0)
    array([ True,  True])
    """

    kind: Literal["always"] = "always"

    @property
    def mean_share(self) -> float:
        return 1.0

    def available(self, rows_N: Rows, round: int, seed: int) -> NDArray[np.bool_]:
        return np.ones(len(rows_N), np.bool_)


class Bernoulli(AvailabilityRule):
    """Each client independently, in each round anew, with the same probability."""

    kind: Literal["bernoulli"] = "bernoulli"
    probability: float = Field(gt=0, le=1)

    @property
    def mean_share(self) -> float:
        return self.probability

    def available(self, rows_N: Rows, round: int, seed: int) -> NDArray[np.bool_]:
        return uniform(rows_N, derive_key(seed, round, "availability")) < self.probability


class Diurnal(AvailabilityRule):
    """A probability that goes up and down between `low` and `high` once in `period_rounds`, as day and night do.

    Each client has a phase of its own, drawn once: clients live around the globe.
    """

    kind: Literal["diurnal"] = "diurnal"
    period_rounds: int = Field(default=24, ge=2)
    low: float = Field(default=0.05, ge=0, le=1)
    high: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> Diurnal:
        if self.low > self.high:
            raise ValueError(
                f"simulation.availability.low is {self.low:g} and simulation.availability.high {self.high:g}; make low "
                "at most high"
            )
        return self

    @property
    def mean_share(self) -> float:
        return (self.low + self.high) / 2

    def available(self, rows_N: Rows, round: int, seed: int) -> NDArray[np.bool_]:
        phase_N = uniform(rows_N, derive_key(seed, 0, "time zone"))
        wave_N = (1 + np.cos(2 * math.pi * (round / self.period_rounds + phase_N))) / 2
        return uniform(rows_N, derive_key(seed, round, "availability")) < self.low + (self.high - self.low) * wave_N


class Trace(AvailabilityRule):
    """As recorded in a CSV file with the columns client, start_round and stop_round.

    `client` is a row of the table of clients, from 0; it is there in the rounds from `start_round` up to but not in
    `stop_round`. A client may have several lines; one without any is never there. A relative path is taken from the
    configuration's folder.
    """

    kind: Literal["trace"] = "trace"
    file: str

    def available(self, rows_N: Rows, round: int, seed: int) -> NDArray[np.bool_]:
        spans = _read_trace(self.file)
        return np.array(
            [any(start <= round < stop for start, stop in spans.get(row, ())) for row in rows_N.tolist()], bool
        )


@cache
def _read_trace(file: str) -> dict[int, list[tuple[int, int]]]:
    """The spans [start, stop) of each client that has any. Raises `DataError`."""
    hint = "give a CSV file with the header client,start_round,stop_round and whole numbers, each start before its stop"
    spans: dict[int, list[tuple[int, int]]] = {}
    try:
        with Path(file).open(newline="", encoding="utf-8-sig") as text:
            lines = csv.reader(text)
            header = next(lines, [])
            if [field.strip() for field in header] != ["client", "start_round", "stop_round"]:
                raise DataError(f"{file}, line 1: the header is {','.join(header)[:80]!r}", hint=hint)
            for line in filter(None, lines):
                try:
                    client, start, stop = map(int, line)
                    if client < 0 or start >= stop:
                        raise ValueError
                except ValueError:
                    raise DataError(
                        f"{file}, line {lines.line_num}: {','.join(line)[:80]!r} is no span", hint=hint
                    ) from None
                spans.setdefault(client, []).append((start, stop))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read: {error}", hint=hint) from error
    if not spans:
        raise DataError(f"{file} holds no span: nobody would ever be there", hint=hint)
    return spans


def uniform(rows_N: Rows, key: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each row: splitmix64's output function (Steele, Lea and Flood 2014) of row and key.

    >>> uniform(np.array([7]), key=1) == uniform(np.array([3, 7]), key=1)[1:]
    array([ True])
    """
    # One step of its counter for each row; the key's two halves keep the streams of two keys apart.
    with np.errstate(over="ignore"):
        z_N = rows_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key % 2**64)
        for half in (np.uint64(key >> 64), np.uint64(0)):
            z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z_N = (z_N ^ (z_N >> np.uint64(31))) + half
    return (z_N >> np.uint64(11)).astype(np.float64) * 2.0**-53
