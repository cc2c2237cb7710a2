"""The gradients of single examples, clipped and added up, for C clients at once: two ways that never hold them all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedrounds.fl_components.privacy.clipping import squared_norms
from fedrounds.fl_components.privacy.steps import PIECE_ROWS, Mechanism, counts
from fedrounds.fl_components.task import LearningTask
from fedrounds.fl_components.training.isolation import VmappedModule
from fedrounds.fl_components.training.layers import Batch, ClientLinear, ClientWeights, UnsupportedLayer
from fedrounds.fl_components.training.replicas import LayeredReplicas

FORMED_FLOATS: Final = 1 << 24
"""The most numbers of formed gradients at a time, of all clients together (64 MiB); one of each client at least."""


class ClippedReplicas:
    """`use` gives the clients' parameters, `add_clipped` runs a piece of their batches and adds up what it clipped."""

    name: ClassVar[str]
    trainable: dict[str, nn.Parameter]
    shapes: list[torch.Size]

    @abstractmethod
    def use(self, views: Sequence[ClientWeights]) -> None:
        """The clients' parameters, [C, *shape] each. They are read, and moved by whoever gave them."""

    @property
    @abstractmethod
    def formed(self) -> int:
        """How many numbers of an example's gradient are formed."""

    def rows_at_once(self, num_clients: int) -> int:
        """How many rows of each client `add_clipped` takes."""
        return max(1, min(PIECE_ROWS, FORMED_FLOATS // max(1, num_clients * self.formed)))

    @abstractmethod
    def add_clipped(
        self, batch: Batch, label_smoothing: float, mechanism: Mechanism, targets: Sequence[Tensor], *, fresh: bool
    ) -> Tensor:
        """targets [C, *shape] += the sum of the gradients of each client's examples, clipped, in units; = where they
        are `fresh`. Returns the mean loss of each example, [C, B]."""


class GhostNorms(LayeredReplicas, ClippedReplicas):
    """Where only linear layers train.

    An example's gradient by a weight is then g x^T (x went into the layer, g is the loss's gradient by what came out),
    whose norm is |g| |x|: it is clipped by scaling g, and never formed (Goodfellow 2015, "Efficient per-example
    gradient computations", https://arxiv.org/abs/1510.01799).

    Where a layer sees several rows of an example (sequences) or a weight is used more than once, an example's gradient
    is a sum of such products, which may cancel: then float32 has no bound for the norm of the unformed one, and a
    formed one costs no more multiplications.
    """

    name = "ghost norms"

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        super().__init__(module, task)
        for layer, indices in self._layers:
            if indices and not isinstance(layer, ClientLinear):
                raise UnsupportedLayer(
                    f"a {type(layer).__name__.removeprefix('Client')} trains, not linear layers alone"
                )
        self._formed: set[int] = set()  # parameters, as far as batches have shown

    @property
    def formed(self) -> int:
        return sum(self.shapes[index].numel() for index in self._formed)

    def add_clipped(
        self, batch: Batch, label_smoothing: float, mechanism: Mechanism, targets: Sequence[Tensor], *, fresh: bool
    ) -> Tensor:
        counted = self.task.targets.counted(batch.y).view(*batch.y.shape[:2], -1).sum(2).to(torch.float32)  # [C, B]
        shares = torch.where(counted > 0, 1 / counted, 0)  # of a target in its example's mean
        weights = shares.view(*shares.shape, *(1,) * (batch.y.ndim - 2)).expand(batch.y.shape)
        losses = self._run(batch, label_smoothing, weights.reshape(-1))
        with torch.no_grad():
            self._clip(shares.shape, mechanism, targets, fresh)
        return losses.view(*shares.shape, -1).sum(2) * shares

    def _clip(self, shape: torch.Size, mechanism: Mechanism, targets: Sequence[Tensor], fresh: bool) -> None:
        uses: list[list[Factors]] = [[] for _ in targets]
        for layer, indices in self._layers:
            if isinstance(layer, ClientLinear):
                for by_weight in layer.passes.factors:
                    uses[indices[0]].append(by_weight)
                    for bias in indices[1:]:
                        uses[bias].append((None, by_weight[1]))
                layer.passes.factors.clear()
        squares = torch.zeros(shape, dtype=torch.float64, device=targets[0].device)
        unformed: dict[int, Factors] = {}
        formed: dict[int, Tensor] = {}
        for index, factors in enumerate(uses):
            if len(factors) == 1 and factors[0][1].shape[1] == shape[1]:
                inputs, g = unformed[index] = factors[0]
                own = _row_squares(g)
                squares += own if inputs is None else own.mul_(_row_squares(inputs))
            elif not factors:  # it took no part
                if fresh:
                    targets[index].zero_()
            else:
                formed[index] = _gradients(*factors[0], shape[1])
                for use in factors[1:]:
                    formed[index] += _gradients(*use, shape[1])
                squares += squared_norms(formed[index].flatten(2).flatten(0, 1)).view(shape)
        self._formed |= formed.keys()
        scales, all_count = mechanism.factors(squares), bool(counts(squares).all())
        for index, each in formed.items():
            _add_weighted(targets[index], each, scales, all_count, fresh)
        for index, (inputs, g) in unformed.items():
            scaled = _left(g, scales, all_count) * scales[:, :, None]
            if inputs is None:
                total = scaled.sum(1)
                targets[index].copy_(total if fresh else total + targets[index])
            else:
                targets[index].baddbmm_(scaled.mT, _left(inputs, scales, all_count), beta=0 if fresh else 1)


Factors = tuple[Tensor | None, Tensor]
"""x and g of one use of a weight, or None and g of one of a bias: [C, rows, width] each."""


def _row_squares(rows: Tensor) -> Tensor:
    """The squared length of each row, float64 [C, B], of [C, B, width]."""
    squares: Tensor = rows.double().square_().sum(2)
    return squares


def _gradients(x: Tensor | None, g: Tensor, num_rows: int) -> Tensor:
    """Of each example, by a weight or a bias: [C, B, ...], of the T rows of it that the layer saw, [C, B * T, ...]."""
    own = g.reshape(len(g) * num_rows, -1, g.shape[-1])
    formed = own.sum(1) if x is None else torch.bmm(own.mT, x.reshape(len(own), -1, x.shape[-1]))
    return formed.view(len(g), num_rows, *formed.shape[1:])


def _left(rows: Tensor, scales: Tensor, all_count: bool) -> Tensor:
    """Rows [C, B, width], but for those that do not count: zero times what is not finite is not zero."""
    return rows if all_count else torch.where((scales != 0)[:, :, None], rows, 0)


def _add_weighted(target: Tensor, formed: Tensor, scales: Tensor, all_count: bool, fresh: bool) -> None:
    """target [C, ...] += (= where it is fresh) the sum over B of scales [C, B] times what was formed, [C, B, ...]."""
    rows = _left(formed.flatten(2), scales, all_count)
    target.view(len(target), 1, -1).baddbmm_(scales[:, None, :], rows, beta=0 if fresh else 1)


class VmapExamples(ClippedReplicas):
    """Any module that torch.func.vmap can differentiate for many clients and examples."""

    name = "vmap"

    _own_parameters = False

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        self.task = task
        self.trainable = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.shapes = [each.shape for each in self.trainable.values()]
        self._vmapped = VmappedModule(module)
        self._views: list[Tensor] = []
        self._census = True

    @property
    def formed(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def use(self, views: Sequence[ClientWeights]) -> None:
        self._views = [view for view in views if isinstance(view, Tensor)]

    def add_clipped(
        self, batch: Batch, label_smoothing: float, mechanism: Mechanism, targets: Sequence[Tensor], *, fresh: bool
    ) -> Tensor:
        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs: Tensor = functional_call(self._vmapped.module, params, (x[None],))
            counted: Tensor = self.task.targets.counted(y).sum().clamp(min=1)
            return self.task.loss(outputs, y[None], "none", label_smoothing).sum() / counted

        params = {name: view[: len(batch.x)] for name, view in zip(self.trainable, self._views, strict=True)}
        if self._own_parameters:
            params = {name: each[:, None].expand(*batch.x.shape[:2], *each.shape[1:]) for name, each in params.items()}
        examples_of_one = vmap(grad_and_value(loss), in_dims=(0 if self._own_parameters else None, 0, 0))
        losses: Tensor
        with sdpa_kernel(SDPBackend.MATH):  # of which vmap can make one operation for all
            census, self._census = self._census, False
            gradients, losses = self._vmapped.run(examples_of_one, params, batch.x, batch.y, census=census)
        with torch.no_grad():
            formed = list(gradients.values())
            squares = torch.stack([squared_norms(each.flatten(2).flatten(0, 1)) for each in formed]).sum(0)
            squares = squares.view(losses.shape)
            scales, all_count = mechanism.factors(squares), bool(counts(squares).all())
            for target, each in zip(targets, formed, strict=True):
                _add_weighted(target, each, scales, all_count, fresh)
        return losses.detach()


class VmapAlone(VmapExamples):
    """The same, slower, for modules that only work if each example comes with parameters of its own (torch.nn.GRU)."""

    _own_parameters = True
