"""The schedule of a round: the cohort in shards (what trains together) and waves (what fits in memory)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.values import ClientTask


def schedule(federation: Federation, cohort: tuple[ClientTask, ...]) -> dict[str, Any]:
    """Return a cohort in shards and waves: the fields of `RoundPlan` of these names.

    Whoever sees the round's tasks can count the waves. Where the cohort is withheld, their number follows from public
    values: as many as the largest cohort needs, each with an equal part of the actual one, perhaps empty.
    """
    config = federation.config
    rule, num_coordinates = config.execution, federation.update_layout.size
    work_N = [config.training.num_samples_processed(task.num_examples) * federation.num_parameters for task in cohort]
    additive = federation.streamed is not None
    if federation.hides_participation:
        waves = rule.equal_waves(len(cohort), federation.largest_cohort, num_coordinates, additive=additive)
        shards = tuple(
            slice(wave.start + shard.start, wave.start + shard.stop)
            for wave in waves
            for shard in _split(rule.shards(work_N[wave]), federation.largest_shard)
        )
    else:
        shards = _split(rule.shards(work_N), federation.largest_shard)
        waves = rule.waves(shards, num_coordinates, additive=additive)
    return {"cohort": cohort, "shards": shards, "waves": waves}


def _split(shards: Sequence[slice], largest: int) -> tuple[slice, ...]:
    """Return the shards, cut into pieces of at most `largest` clients."""
    return tuple(
        slice(start, min(shard.stop, start + largest))
        for shard in shards
        for start in range(shard.start, shard.stop, largest)
    )
