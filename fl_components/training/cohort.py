"""Local training of a wave of clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fl_components.errors import ModelError, one_line
from fl_components.training.sgd import SGD
from fl_components.training.threads import one_thread
from fl_components.values import ClientTask, Float32, UpdateBatch

STRAGGLER: Final = "straggler: it did not finish its local work"


def train_cohort(
    training: SGD,
    module: torch.nn.Module,
    params_D: Float32,
    tasks: Sequence[ClientTask],
    examples: Callable[[int], tuple[NDArray[Any], NDArray[np.int64]]],
) -> UpdateBatch:
    """Each client's update from the same parameters, one client after the other.

    `examples(index)` gives the inputs and labels of the client in that row. Stragglers that are to be dropped are
    absent.
    """
    absent: dict[str, str] = {}
    if training.drop_stragglers:
        absent = {each.client_id: STRAGGLER for each in tasks if training.work_of(each.seed) is not None}
        tasks = [task for task in tasks if task.client_id not in absent]
    deltas_ND = np.empty((len(tasks), len(params_D)), np.float32)
    losses = []
    with one_thread():
        for row, task in enumerate(tasks):
            x, y = examples(task.index)
            try:
                deltas_ND[row], loss = training.train(module, params_D, x, y, task.seed)
            except Exception as error:
                raise ModelError(
                    f"the model failed while client {task.client_id} trained: {one_line(error)}",
                    hint="mend the model, then resume the run",
                ) from error
            losses.append(loss)
    return UpdateBatch(tuple(task.client_id for task in tasks), deltas_ND, tuple(losses), absent=absent)
