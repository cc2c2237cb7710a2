"""A module for C clients at once: their losses, and the gradients of these by each client's own parameters."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from fedrounds.fl_components.models import meeting_place
from fedrounds.fl_components.task import LearningTask
from fedrounds.fl_components.training.isolation import VmappedModule
from fedrounds.fl_components.training.layers import (
    LAYERS,
    Batch,
    ClientLayer,
    ClientLinear,
    ClientWeights,
    CurrentBatch,
    UnsupportedLayer,
)


class Replicas(ABC):
    """`use` gives the clients' parameters, `losses` runs a batch forward and back, `add_gradients` hands it on.

    `shapes` are those of the trainable parameters, in the order of `named_parameters`.
    """

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        self.task = task
        self.trainable = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.shapes = [each.shape for each in self.trainable.values()]

    def dual(self, num_examples: int) -> dict[int, int]:
        """Which parameters are better kept in their dual form, where a client trains on `num_examples` in a round (each
        pass counts); and how many rows their layer sees then."""
        return {}

    @abstractmethod
    def use(self, views: Sequence[ClientWeights]) -> None:
        """The clients' parameters. They are read, and moved by whoever gave them."""

    @abstractmethod
    def losses(self, batch: Batch, label_smoothing: float) -> Tensor:
        """The mean loss [C] of each client's batch."""

    @abstractmethod
    def add_gradients(self, targets: Sequence[Tensor | None], alpha: float) -> None:
        """targets += alpha * gradients of the last losses; a target is None where the form is dual."""


class LayeredReplicas(Replicas):
    """The module with each trainable layer replaced by its form for many clients (layers.py).

    The rows of all clients run through it as one batch. So it takes only modules whose types say that each row is
    treated by itself (`meeting_place`). Raises `UnsupportedLayer` for others, and for a module with trainable
    parameters outside the layers that have a form for many clients.
    """

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        super().__init__(module, task)
        self._check_layers(module)
        meets = meeting_place(module)
        if meets is not None:
            raise UnsupportedLayer(f"{meets} is not among the layers that are known to treat each row by itself")
        self._in_hand = CurrentBatch()
        self._layers: list[tuple[ClientLayer, list[int]]] = []
        self._gradients: list[Tensor] = []
        position = {id(parameter): index for index, parameter in enumerate(self.trainable.values())}
        replaced: dict[int, nn.Module] = {}
        for name, layer in module.named_modules():
            trained = [position[id(each)] for each in layer.parameters(recurse=False) if each.requires_grad]
            if not trained and not isinstance(layer, nn.Dropout):
                continue
            made = replaced[id(layer)] = LAYERS[type(layer)](layer, self._in_hand, name)
            self._layers.append((made, trained))
        count = Counter(index for _, indices in self._layers for index in indices)
        self._shared = {index for index, layers in count.items() if layers > 1}
        # deepcopy takes what its memo holds for a copy that is made already.
        self._module = copy.deepcopy(module, memo=dict(replaced)).train()

    def _check_layers(self, module: nn.Module) -> None:
        for name, layer in module.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            num_trained = sum(each.requires_grad for each in own.values())
            where = f"{name or 'the model'} ({type(layer).__name__})"
            if not num_trained and not isinstance(layer, nn.Dropout):
                continue
            if type(layer) not in LAYERS or not own.keys() <= {"weight", "bias"}:
                raise UnsupportedLayer(f"{where} has parameters of its own and no form for many clients")
            if num_trained != len(own) or layer._forward_hooks or layer._forward_pre_hooks:
                raise UnsupportedLayer(f"{where} is frozen in part or has hooks, which has no form for many clients")

    def dual(self, num_examples: int) -> dict[int, int]:
        found = {}
        for layer, indices in self._layers:
            if isinstance(layer, ClientLinear) and layer.passes.most_uses <= 1 and indices[0] not in self._shared:
                rows, (out, in_) = num_examples * layer.passes.rows_of_one, layer.shape
                if rows * (out + in_) <= out * in_:
                    found[indices[0]] = rows
        return found

    def use(self, views: Sequence[ClientWeights]) -> None:
        for layer, indices in self._layers:
            layer.use([views[index] for index in indices])

    def losses(self, batch: Batch, label_smoothing: float) -> Tensor:
        num_clients = len(batch.x)
        shares = 1 / torch.tensor(batch.counts, dtype=torch.float32, device=batch.x.device)  # of a target in its mean
        losses = self._run(batch, label_smoothing, shares.repeat_interleave(batch.y.numel() // num_clients))
        return losses.view(num_clients, -1).sum(1) * shares

    def _run(self, batch: Batch, label_smoothing: float, weights: Tensor) -> Tensor:
        """Forward, and back from the targets' losses with these weights. Returns the losses; both flat."""
        self._in_hand.batch = batch
        outputs = self._module(batch.x.flatten(0, 1))
        losses = self.task.loss(outputs, batch.y, "none", label_smoothing)
        leaves = [leaf for layer, _ in self._layers for leaf in layer.leaves()]
        self._gradients[:] = torch.autograd.grad(losses, leaves, weights, allow_unused=True, materialize_grads=True)
        return losses.detach()

    def add_gradients(self, targets: Sequence[Tensor | None], alpha: float) -> None:
        remaining = iter(self._gradients)
        for layer, indices in self._layers:
            gradients = [next(remaining) for _ in layer.leaves()]
            layer.add_gradients(gradients, [targets[index] for index in indices], alpha)


class VmapReplicas(Replicas):
    """Any module that torch.func.vmap can differentiate for many clients.

    A client's batch is padded only where the module's types say that each row is treated by itself; otherwise clients
    whose batches have the same size run together.
    """

    def __init__(self, module: nn.Module, task: LearningTask) -> None:
        super().__init__(module, task)
        self._vmapped = VmappedModule(module)
        self._views: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._census = True  # of the first call: the code that runs is the same in all

    def use(self, views: Sequence[ClientWeights]) -> None:
        self._views = [view for view in views if isinstance(view, Tensor)]

    def losses(self, batch: Batch, label_smoothing: float) -> Tensor:
        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            outputs: Tensor = functional_call(self._vmapped.module, params, (x,))
            return self.task.loss(outputs, y, "mean", label_smoothing)

        params = {name: view[: len(batch.x)] for name, view in zip(self.trainable, self._views, strict=True)}
        losses: Tensor
        if self._vmapped.is_rowwise or min(batch.sizes) == batch.x.shape[1]:
            gradients, losses = self._run(grad_and_value(loss), params, batch.x, batch.y)
            self._gradients = list(gradients.values())
            return losses
        losses = torch.empty(len(batch.x), device=batch.x.device)
        self._gradients = [torch.empty_like(each) for each in params.values()]
        sizes = torch.tensor(batch.sizes)
        for size in sorted(set(batch.sizes)):
            alike = torch.nonzero(sizes == size).flatten().to(batch.x.device)
            own = {name: each[alike] for name, each in params.items()}
            gradients, losses[alike] = self._run(
                grad_and_value(loss), own, batch.x[alike, :size], batch.y[alike, :size]
            )
            for into, each in zip(self._gradients, gradients.values(), strict=True):
                into[alike] = each
        return losses

    def _run(self, function: Callable[..., Any], params: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        census, self._census = self._census, False
        return self._vmapped.run(function, params, x, y, census=census)

    def add_gradients(self, targets: Sequence[Tensor | None], alpha: float) -> None:
        for target, gradient in zip(targets, self._gradients, strict=True):
            assert target is not None
            target.add_(gradient, alpha=alpha)
        self._gradients = []
