"""A shadow of a silo, in which canaries take part: for audits of what silos claim about their examples."""

from __future__ import annotations

import copy
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedrounds.fl_components import randomness
from fedrounds.fl_components.arrays import Float32
from fedrounds.fl_components.errors import FedroundsError, ModelError, one_line
from fedrounds.fl_components.models import rowwise
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.training.chunk import ExampleTable, synthetic_like
from fedrounds.fl_components.training.opacus_sampler import OneAtATime, OpacusGradSampler
from fedrounds.fl_components.training.private import PrivateChunks, Way, choose_grad_sampler
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.values import SimulatedClient

CANARY_GAIN: Final = 2.0**20
"""What a canary's own part of its gradient is multiplied by: far more than the rest of it, and far from the largest
float32."""


class CanaryClient:
    """A silo that holds public rows, and makes one step on them and on canaries as the silos of a run make theirs.

    The run's model, its way of finding the gradients of single examples, its clipping, its noise.

    Each canary has a parameter of its own, which is zero: `CANARY_GAIN` times it is added to one score of what the
    model makes of a public row. So nearly all of the canary's gradient is there: clipped, it is as long as clipping
    allows, in a coordinate of its own (a "Dirac canary"), and yet it is an example's, by a backward pass through the
    whole model.

    The score and the target are those that the learning task finds hard (`hard_targets`), so that the gradient is
    negative for every canary, and not small.

    Args:
      module: the run's, with the parameters that a step starts from. It stays as it is.
      rows: R examples that are nobody's secret. Canary j shows the model row j mod R.
      rule: how clients train in a round, with its noise multiplier (`SGD.resolve`). Its batches hold all examples:
        sampling takes no part.
      num_canaries: M.

    Raises what `choose_grad_sampler` raises.

    >>> rule = SGD.model_validate({"learning_rate": 0.1, "epochs": 1, "privacy": {"kind": "example_level",
    ...     "noise_multiplier": 1.0, "max_grad_norm": 0.5, "sampling_rate": 0.1}})
    >>> rows = ExampleTable(torch.zeros(3, 4), torch.tensor([0, 1, 1]), np.array([0]), np.array([3]))
    >>> shadow = CanaryClient(nn.Linear(4, 2), rows, rule, num_canaries=100)
    >>> shadow.num_parameters, shadow.step(np.arange(100) < 50, key=bytes(32)).shape
    (110, (110,))
    """

    def __init__(self, module: nn.Module, rows: ExampleTable, rule: SGD, num_canaries: int) -> None:
        assert rule.example_level is not None
        everyone = rule.example_level.model_copy(update={"sampling_rate": 1.0, "max_batch_size": None})
        one_step = {"steps": 1, "epochs": None}
        self._rule = rule.model_copy(update={**one_step, "privacy": everyone})
        self._num_canaries = num_canaries
        try:
            self._module = _WithCanaries(copy.deepcopy(module), rows, num_canaries)
        except Exception as error:
            raise _failure(error) from error
        shown = torch.arange(num_canaries + len(rows.y)) % len(rows.y)
        self._targets = torch.cat([self._module.targets[shown[:num_canaries]], rows.y[shown[num_canaries:]]])
        make: Any = type(choose_grad_sampler(module, synthetic_like(rows)))  # what is right for the run's own module
        self._task = rows.task
        self._way: Way = make(self._module, rows.task)
        self._start_D = flatten(self._module)

    @property
    def num_parameters(self) -> int:
        """D: the model's, and those of the canaries, which come last."""
        return len(self._start_D)

    def step(self, joined_M: NDArray[np.bool_], key: bytes) -> Float32:
        """The update of a step, float32 [D]. The larger its last M coordinates, the likelier a canary joined.

        Args:
          joined_M: which canaries join. All public rows do.
          key: the client's own secret, 32 bytes, never used before.

        Raises `ModelError` for an update that is not finite.
        """
        members = np.concatenate([np.flatnonzero(joined_M), np.arange(self._num_canaries, len(self._targets))])
        # In any order: what goes wrong in one part of a batch must not spare the canaries.
        places = torch.from_numpy(randomness.generator(key, 0, "order").permutation(members))
        task = SimulatedClient("shadow", 0, len(places), randomness.derive_key(key, 0, "draws of the model"), key=key)
        try:
            update_D = self._train(places[:, None], self._targets[places], task)
        except FedroundsError:
            raise
        except Exception as error:
            raise _failure(error) from error
        if not np.isfinite(update_D).all():
            raise ModelError("the update of a step over canaries is not finite", hint="lower training.learning_rate")
        return update_D

    def _train(self, x: Tensor, y: Tensor, task: SimulatedClient) -> Float32:
        if isinstance(self._way, (OpacusGradSampler, OneAtATime)):
            return self._way.train(self._rule, self._start_D, x, y, task)[0]
        chunks = PrivateChunks(self._way, self._module, self._rule, torch.from_numpy(self._start_D))
        batches = self._rule.private_batches_of(len(x), task.key)
        updates, _ = chunks.train(ExampleTable(x, y, np.array([0]), np.array([len(x)]), self._task), [task], [batches])
        update_D: Float32 = updates.stack()[0].numpy()
        return update_D


def _failure(error: Exception) -> ModelError:
    return ModelError(
        f"the model failed in the audit of its claim, on public rows and canaries: {one_line(error)}",
        hint="the model must take the rows of the data in evaluation mode as well as in training mode",
    )


@rowwise
class _WithCanaries(nn.Module):
    """A model that takes places, int64 [B, 1], instead of rows.

    Place p stands for row p mod R; the first M places are canaries, the R after them are the rows as they are.

    Attributes:
      targets: of each row as canaries show it.
    """

    rows: Tensor
    loud: Tensor

    def __init__(self, module: nn.Module, rows: ExampleTable, num_canaries: int) -> None:
        super().__init__()
        self.module, self.num_canaries = module.eval(), num_canaries
        self.canaries = nn.Linear(num_canaries, 1, bias=False, device="meta").to_empty(device="cpu")  # draws nothing
        nn.init.zeros_(self.canaries.weight)
        with torch.no_grad():
            scores = self.module(rows.x.clone())
        by_target = scores.reshape(len(scores), -1, scores.shape[-1])  # [R, targets of a row, C]
        targets, places = rows.task.hard_targets(by_target[:, 0])
        self.targets = torch.full_like(rows.y, rows.task.targets.ignored)
        self.targets.view(len(scores), -1)[:, 0] = targets
        loud = by_target.new_zeros(by_target.shape)
        loud[torch.arange(len(scores)), 0, places] = CANARY_GAIN
        self.register_buffer("rows", rows.x)
        self.register_buffer("loud", loud.view(scores.shape))

    def forward(self, places: Tensor) -> Tensor:
        places = places[:, 0]
        rows = places % len(self.rows)
        scores: Tensor = self.module(self.rows[rows])
        own = places[:, None] == torch.arange(self.num_canaries, device=places.device)  # no row is a canary
        heard: Tensor = self.canaries(own.to(scores.dtype))
        return scores + self.loud[rows] * heard.view(-1, *(1,) * (scores.ndim - 1))
