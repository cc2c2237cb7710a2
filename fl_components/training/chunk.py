"""A chunk of clients, trained together step by step: `SGD.train` for many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrounds.fl_components.task import Classification, LearningTask
from fedrounds.fl_components.training.channels import ClientChannels
from fedrounds.fl_components.training.layers import Batch, ClientWeights, FactoredWeight
from fedrounds.fl_components.training.replicas import Replicas
from fedrounds.fl_components.training.sgd import SGD
from fedrounds.fl_components.training.step import descend, is_vanilla, regularise
from fedrounds.fl_components.values import Weighted

Rows = NDArray[np.int64]


class ExampleTable:
    """All clients' training examples: features [M, ...], targets [M, ...], and client i's rows `starts[i]:stops[i]`.

    `task` says what the targets are, and what is learnt from them.
    """

    def __init__(self, x: Tensor, y: Tensor, starts: Rows, stops: Rows, task: LearningTask | None = None) -> None:
        self.x, self.y, self.starts, self.stops = x, y, starts, stops
        self.task = task or Classification()
        # How many targets of a row count; None where each row has one, which does.
        self._counts = None if y.ndim == 1 else self.task.targets.num_counted_by_row(y).numpy(force=True)

    def gather(
        self, rows: Sequence[Rows], generators: Sequence[torch.Generator], spare: Sequence[int] | None = None
    ) -> Batch:
        """C clients' rows as one batch, shorter ones padded. `spare` are rows to pad with, where one may have none."""
        sizes = list(map(len, rows))
        longest, padded = max(sizes), min(sizes) < max(sizes)
        if padded:  # by a client's own row: what is wrong with one client's data must not reach another
            index = np.empty((len(rows), longest), np.int64)
            for client, own in enumerate(rows):
                index[client, : len(own)] = own
                index[client, len(own) :] = own[0] if spare is None else spare[client]
        else:
            index = np.stack(rows)
        flat = torch.from_numpy(index.ravel()).to(self.x.device)
        x, y = (each.index_select(0, flat).view(*index.shape, *each.shape[1:]) for each in (self.x, self.y))
        if padded:
            y[torch.arange(longest) >= torch.tensor(sizes)[:, None]] = self.task.targets.ignored
        counts = sizes if self._counts is None else [int(self._counts[own].sum()) for own in rows]
        return Batch(x, y, sizes, counts, generators)


def synthetic_like(examples: ExampleTable, sizes: Sequence[int] = (5, 2)) -> ExampleTable:
    """Rows like these, but nobody's, for clients of these sizes.

    How all clients are trained must not depend on what some of them hold.
    """
    generator, stops = torch.Generator().manual_seed(0), np.cumsum(sizes, dtype=np.int64)

    shape = (sum(sizes), *examples.x.shape[1:])
    if examples.x.is_floating_point():
        x = torch.randn(shape, generator=generator)
    else:
        x = torch.randint(0, 2, shape, generator=generator)  # tokens of any vocabulary
    y = examples.task.synthetic_targets((sum(sizes), *examples.y.shape[1:]), generator)
    return ExampleTable(x.to(examples.x), y.to(examples.y), stops - sizes, stops, examples.task)


class ChunkUpdates:
    """The updates of C clients, float32 [C, M], in parts: one for each parameter, then one for each channel."""

    def __init__(self, parts: Sequence[ClientWeights]) -> None:
        self._parts = parts

    def norms(self) -> Tensor:
        """The L2 norm of each client's update, float64 [C]; not finite where the update is not."""
        return _length(
            [part.squared_norms() if isinstance(part, FactoredWeight) else _squares(part) for part in self._parts]
        )

    def norm_bounds(self) -> Tensor:
        """No less than `norms`, and cheaper."""
        return _length(
            [
                part.norm_bounds().square() if isinstance(part, FactoredWeight) else _squares(part)
                for part in self._parts
            ]
        )

    def add_weighted(self, total_D: Tensor, weights_C: Tensor) -> None:
        """total_D += sum of weights_C * updates; weight 0 leaves a client out, whatever its update is."""
        start, all_count = 0, bool(weights_C.all())
        for part in self._parts:
            if isinstance(part, FactoredWeight):
                stop = start + part.weight.numel()
                part.add_weighted(total_D[start:stop].view(part.weight.shape), weights_C)
            else:
                deltas = part.flatten(1)
                stop = start + deltas.shape[1]
                counted = deltas if all_count else torch.where((weights_C != 0)[:, None], deltas, 0)
                total_D[start:stop].addmv_(counted.T, weights_C)
            start = stop

    def parts(self) -> list[Tensor]:
        """The updates themselves in pieces, float32 [C, d] each: one for each parameter. May be written to."""
        return [(part.deltas() if isinstance(part, FactoredWeight) else part).flatten(1) for part in self._parts]

    def stack(self) -> Tensor:
        """The updates themselves, float32 [C, D]."""
        return torch.cat(self.parts(), dim=1)


def _squares(part: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float64)
    return norms.square_()


def _length(squares: list[Tensor]) -> Tensor:
    total: Tensor = torch.stack(squares).sum(0)
    return total.sqrt_()


def train_chunk(
    replicas: Replicas,
    rule: SGD,
    params_D: Tensor,
    examples: ExampleTable,
    batches: Sequence[Sequence[Rows]],
    generators: Sequence[torch.Generator],
    channels: ClientChannels | None = None,
) -> tuple[ChunkUpdates, list[Weighted]]:
    """Return the updates of C clients that train from the same parameters, and each one's loss over the targets that it
    stepped through.

    `batches[c]` are the rows of client c's steps; who has more steps comes first, so that those still training are
    always the first ones.
    """
    num_clients = len(batches)
    actives = [sum(len(each) > step for each in batches) for step in range(len(batches[0]))]
    longest = sum(max(len(each[step]) for each in batches[:active]) for step, active in enumerate(actives))
    dual = replicas.dual(longest) if is_vanilla(rule) else {}
    start = [
        part.view(shape)
        for part, shape in zip(
            torch.split(params_D, [shape.numel() for shape in replicas.shapes]), replicas.shapes, strict=True
        )
    ]
    views: list[ClientWeights] = [
        FactoredWeight(part, num_clients, dual[index], rule.learning_rate)
        if index in dual
        else part.expand(num_clients, *part.shape).clone()
        for index, part in enumerate(start)
    ]
    params = [None if isinstance(view, FactoredWeight) else view for view in views]
    velocities = [None if each is None or not rule.momentum else torch.zeros_like(each) for each in params]
    corrections = None if channels is None else channels.corrections(replicas.shapes)
    replicas.use(views)
    means = torch.zeros(len(actives), num_clients, device=params_D.device)
    counts = torch.zeros(len(actives), num_clients, dtype=torch.float64)
    for step, active in enumerate(actives):
        batch = examples.gather([each[step] for each in batches[:active]], generators)
        means[step, :active] = replicas.losses(batch, rule.label_smoothing)
        counts[step, :active] = torch.tensor(batch.counts)
        with torch.no_grad():
            _move(rule, replicas, _first(params, active), start, _first(velocities, active), corrections)
    updates = [
        view if isinstance(view, FactoredWeight) else view.sub_(part) for view, part in zip(views, start, strict=True)
    ]
    if channels is not None:
        delta_CD = ChunkUpdates(updates).stack()
        updates += channels.sent(delta_CD, [len(each) for each in batches], rule.learning_rate)
    losses = (means.cpu() * counts).sum(0)
    return ChunkUpdates(updates), [
        Weighted(*each) for each in zip(losses.tolist(), counts.sum(0).tolist(), strict=True)
    ]


def _first(tensors: Sequence[Tensor | None], num_clients: int) -> list[Tensor | None]:
    return [None if tensor is None else tensor[:num_clients] for tensor in tensors]


def _move(
    rule: SGD,
    replicas: Replicas,
    params: Sequence[Tensor | None],
    start: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    corrections: Sequence[Tensor] | None,
) -> None:
    """One step of every client, in the order that `SGD` states; what is in dual form (None) moves by itself."""
    if is_vanilla(rule):
        replicas.add_gradients(params, -rule.learning_rate)
        return
    own = [each for each in params if each is not None]
    kept = [each for each in velocities if each is not None]
    in_velocities = bool(kept) and rule.max_gradient_norm is None  # then the gradients go straight to them
    if in_velocities:
        gradients = [velocity.mul_(rule.momentum) for velocity in kept]
    else:
        gradients = [torch.zeros_like(each) for each in own]
    replicas.add_gradients(gradients, 1.0)
    corrected = None if corrections is None else [each[: len(own[0])] for each in corrections]
    regularise(rule, gradients, own, start, corrected)
    descend(rule, gradients, own, [] if in_velocities else kept)
