"""Where local training runs, and in what pieces."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fl_components.rules import Rule

COPIES_OF_AN_UPDATE = 5  # as trained, as a frame, as decoded, among its shard's, and room to add it up


class LocalExecution(Rule):
    """In this process. A wave is as many whole shards as `memory_mb` holds.

    `shard_size` (clients summed together) is the unit of determinism: it decides the last bits of a result, while
    memory and the number of processes never do.

    >>> LocalExecution(shard_size=4, memory_mb=1).waves(10, num_parameters=10_000)  # 200 kB a client: one shard
    (slice(0, 4, None), slice(4, 8, None), slice(8, 10, None))
    """

    kind: Literal["local"] = "local"
    memory_mb: int = Field(default=1024, ge=1)
    shard_size: int = Field(default=16, ge=1)

    def waves(self, cohort_size: int, num_parameters: int) -> tuple[slice, ...]:
        """The cohort cut into waves; one empty wave where nobody was selected."""
        bytes_per_client = COPIES_OF_AN_UPDATE * 4 * num_parameters
        shards = max(1, int(self.memory_mb * 1e6) // (bytes_per_client * self.shard_size))
        size = shards * self.shard_size
        return tuple(slice(start, min(start + size, cohort_size)) for start in range(0, max(1, cohort_size), size))

    def shards(self, num_updates: int) -> tuple[slice, ...]:
        """A wave cut into shards."""
        return tuple(
            slice(start, min(start + self.shard_size, num_updates)) for start in range(0, num_updates, self.shard_size)
        )


Execution = LocalExecution
