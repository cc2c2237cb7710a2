"""What training simulated clients needs, and how much work it is."""

from __future__ import annotations

import numpy as np

from fedrounds.fl_components.executors import ArrayType, Workload
from fedrounds.fl_components.server.federation import Federation


def workload(federation: Federation) -> Workload:
    """Return what local training needs of a federation."""
    num_coordinates = federation.update_layout.size
    if federation.streamed is None:
        result: ArrayType = (np.float32, (federation.largest_shard, num_coordinates))
    elif federation.central is not None:
        result = (np.float64, (num_coordinates + 1,))
    else:
        result = (np.float32, (num_coordinates,))
    return Workload(
        module=federation.module,
        spec=federation.model_spec,
        task=federation.config.task,
        examples=federation.simulated.memory,
        num_parameters=num_coordinates,
        result=result,
    )


def average_work_N(federation: Federation) -> list[float]:
    """Return the work of each client of an average cohort in a round: examples times parameters."""
    num_examples = round(federation.population.num_examples_n.mean())
    work = federation.config.training.num_samples_processed(num_examples) * federation.num_parameters
    return [float(work)] * round(federation.sampling.cohort_size)
