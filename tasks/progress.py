"""What a run tells whoever watches it in the same process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Progress:
    """One piece of news. `message` carries text; `run` begins an attempt; then come `stage` and `round`, and `end`.

    In a sweep all that for each cell that is trained, with the sweep's id and which cell of how many it is, in words.
    `primary` is the name of the run's primary metric.
    """

    kind: Literal["message", "run", "stage", "round", "end"]
    text: str = ""
    run_id: str = ""
    rounds: int = 0
    round: int = 0
    stage: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    sweep_id: str = ""
    cell: str = ""
    primary: str = "accuracy"


Listener = Callable[[Progress], None]


def nobody_listens(_: Progress) -> None:
    """The null listener."""
