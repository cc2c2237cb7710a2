"""A chunk of clients, trained together step by step: `SGD.train` for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_components.training.layers import DualForm, View
from fl_components.training.replicas import Replicas
from fl_components.training.sgd import SGD
from fl_components.values import IGNORED

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """All clients' training examples: features [M, ...], labels [M, ...], and client i's rows `starts[i]:stops[i]`."""

    x: Tensor
    y: Tensor
    starts: Rows
    stops: Rows


class Updates:
    """What C clients came to: w_local - w_global of each, float32 [C, D], held as it was computed."""

    def __init__(self, layout: Layout, deltas: Tensor) -> None:
        self._layout, self._deltas = layout, deltas

    def norms(self) -> Tensor:
        """The L2 norm of each client's update, float64 [C]; not finite where the update is not."""
        squares = torch.linalg.vector_norm(self._deltas, dim=1, dtype=torch.float64).square()
        for form in self._layout.duals.values():
            squares += form.squared_norms()
        norms: Tensor = squares.sqrt()
        return norms

    def add_weighted(self, total_D: Tensor, weights_C: Tensor) -> None:
        """total_D += sum of weights_C * updates; weight 0 leaves a client out, whatever its update is."""
        deltas = torch.where((weights_C != 0)[:, None], self._deltas, 0) if (weights_C == 0).any() else self._deltas
        sum_ = torch.mv(deltas.T, weights_C)
        for whole, own in self._layout.primal:
            total_D[whole] += sum_[own]
        for whole, form in self._layout.dual:
            form.add_weighted(total_D[whole].view(form.weight.shape), weights_C)

    def stack(self) -> Tensor:
        """The updates themselves, float32 [C, D]."""
        if not self._layout.duals:
            return self._deltas
        parts = {whole.start: self._deltas[:, own] for whole, own in self._layout.primal}
        parts |= {whole.start: form.deltas().flatten(1) for whole, form in self._layout.dual}
        return torch.cat([parts[start] for start in sorted(parts)], dim=1)


class Layout:
    """Where each parameter is: in the vector of all [D], and in the block [C, D'] of those that are not dual."""

    def __init__(self, shapes: Sequence[torch.Size], duals: dict[int, DualForm]) -> None:
        self.shapes, self.duals = shapes, duals
        self.places: dict[int, slice] = {}
        self.primal: list[tuple[slice, slice]] = []
        self.dual: list[tuple[slice, DualForm]] = []
        start = at = 0
        for index, shape in enumerate(self.shapes):
            whole = slice(start, start := start + shape.numel())
            if index in duals:
                self.dual.append((whole, duals[index]))
            else:
                own = self.places[index] = slice(at, at := at + shape.numel())
                self.primal.append((whole, own))

    def start(self, params_D: Tensor) -> Tensor:
        """The parameters that are in the block, [D']."""
        return torch.cat([params_D[whole] for whole, _ in self.primal] or [params_D[:0]])

    def parts(self, block: Tensor) -> list[Tensor | None]:
        """Views of a block, one for each parameter; None for one in dual form."""
        return [
            block[:, self.places[index]].view(len(block), *shape) if index in self.places else None
            for index, shape in enumerate(self.shapes)
        ]

    def views(self, block: Tensor) -> list[View]:
        """The same with the dual forms in their places."""
        return [self.duals[index] if part is None else part for index, part in enumerate(self.parts(block))]


def train_chunk(
    replicas: Replicas,
    rule: SGD,
    params_D: Tensor,
    examples: Examples,
    batches: Sequence[Sequence[Rows]],
    generators: Sequence[torch.Generator],
) -> tuple[Updates, Tensor, Tensor]:
    """Train C clients from the same parameters.

    Returns their updates; each one's loss summed over the labels that it stepped through, float64 [C]; and how many
    labels these were, int64 [C].

    `batches[c]` are the rows of client c's steps; who has more steps comes first, so that those still training are
    always the first ones.
    """
    sizes = [[len(each[step]) for each in batches if len(each) > step] for step in range(len(batches[0]))]
    layout = Layout(replicas.shapes, _dual_forms(replicas, rule, params_D, len(batches), sum(map(max, sizes))))
    start = layout.start(params_D)
    block = start.expand(len(batches), -1).clone()
    velocity = torch.zeros_like(block) if rule.momentum else None
    replicas.use(layout.views(block))
    losses = torch.zeros(len(batches), dtype=torch.float64, device=params_D.device)
    labels = torch.zeros(len(batches), dtype=torch.int64, device=params_D.device)
    for step, own in enumerate(sizes):
        active = len(own)
        x, y = _gather(examples, [each[step] for each in batches[:active]], own)
        full = min(own) == max(own)
        loss = replicas.losses(x, y, rule.label_smoothing, None if full else own, generators)
        counted = (y != IGNORED).flatten(1).sum(1)
        losses[:active] += loss * counted
        labels[:active] += counted
        with torch.no_grad():
            _move(rule, replicas, layout, block[:active], start, None if velocity is None else velocity[:active])
    return Updates(layout, block.sub_(start)), losses, labels


def is_plain(rule: SGD) -> bool:
    """Whether its steps are those of plain SGD, as `DualForm` needs them."""
    return not (rule.momentum or rule.weight_decay or rule.proximal or rule.max_gradient_norm is not None)


def _dual_forms(
    replicas: Replicas, rule: SGD, params_D: Tensor, num_clients: int, num_examples: int
) -> dict[int, DualForm]:
    if not is_plain(rule):
        return {}
    parts = torch.split(params_D, [shape.numel() for shape in replicas.shapes])
    return {
        index: DualForm(parts[index].view(replicas.shapes[index]), num_clients, rows, rule.learning_rate)
        for index, rows in replicas.dual(num_examples).items()
    }


def _gather(examples: Examples, rows: Sequence[Rows], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The batches of the clients in one: x [C, B, ...] and y [C, B, ...], shorter ones padded."""
    longest = max(sizes)
    if min(sizes) == longest:
        index = np.stack(rows)
    else:
        index = np.full((len(rows), longest), rows[0][0])
        for client, own in enumerate(rows):
            index[client, : len(own)] = own
    flat = torch.from_numpy(index.ravel()).to(examples.x.device)
    x, y = (each.index_select(0, flat).view(*index.shape, *each.shape[1:]) for each in (examples.x, examples.y))
    if min(sizes) < longest:
        y[torch.arange(longest) >= torch.tensor(sizes)[:, None]] = IGNORED
    return x, y


def _move(rule: SGD, replicas: Replicas, layout: Layout, block: Tensor, start: Tensor, velocity: Tensor | None) -> None:
    """One step of every client, in the order that `SGD` states."""
    rate, pull, decay = rule.learning_rate, rule.proximal, rule.weight_decay
    if rule.max_gradient_norm is not None:
        gradient = torch.zeros_like(block)
        replicas.add_gradients(layout.parts(gradient), 1.0)
        if pull:
            gradient.add_(block - start, alpha=pull)
        norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((rule.max_gradient_norm / norms).clamp_(max=1.0)).add_(block, alpha=decay)
        if velocity is not None:
            gradient = velocity.mul_(rule.momentum).add_(gradient)
        block.sub_(gradient, alpha=rate)
    elif velocity is not None:
        velocity.mul_(rule.momentum)
        if pull or decay:
            velocity.add_(block, alpha=pull + decay).sub_(start, alpha=pull)
        replicas.add_gradients(layout.parts(velocity), 1.0)
        block.sub_(velocity, alpha=rate)
    else:
        if pull or decay:
            block.mul_(1 - rate * (pull + decay)).add_(start, alpha=rate * pull)
        replicas.add_gradients(layout.parts(block), -rate)
