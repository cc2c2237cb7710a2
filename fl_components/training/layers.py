"""Layers that hold the parameters of C clients at once.

Their batches come folded into one, [C * B, ...], so that all that lies between them (activations, pooling, attention)
runs as it is written, once for all clients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedrounds.fl_components.models.transformer import LearnedPositions


class UnsupportedLayer(Exception):
    """A module, or a layer of it, that has no form for many clients."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The batches of C clients in one step.

    Args:
      x, y: examples and targets, [C, B, ...] each.
      sizes: how many of each client's B rows are its own; the others are padding, whose targets do not count.
      counts: how many targets of each client's rows count.
      generators: the clients' own, for what a module draws. Where examples are trained on by themselves, each row's
        own; `sizes` then says of each row whether it is no padding.
    """

    x: Tensor
    y: Tensor
    sizes: Sequence[int]
    counts: Sequence[int]
    generators: Sequence[torch.Generator]


class CurrentBatch:
    """The batch that a module's layers are at, held by all of them."""

    batch: Batch

    @property
    def num_clients(self) -> int:
        return len(self.batch.x)

    def unfold(self, x: Tensor) -> Tensor:
        """[C * B, ...] as [C, B, ...]."""
        return x.reshape(self.num_clients, -1, *x.shape[1:])


class FactoredWeight:
    """A linear layer's weight for C clients, as the weight that all started from less the learning rate times the sum
    of g^T x over the rows that the client has seen (x went into the layer, g is the loss's gradient by what came out).

    With few rows that is less work than a weight for each client; the products with the common weight are one large
    multiplication for all clients, and so is the weighted sum of their updates. For steps of plain SGD.

    Args:
      weight: the common weight, [out, in].
      num_clients, num_rows: C, and how many rows a client will have seen in the end (room is made for more).
      learning_rate: that of every step.
    """

    def __init__(self, weight: Tensor, num_clients: int, num_rows: int, learning_rate: float) -> None:
        out, in_ = weight.shape
        self.weight, self.learning_rate = weight, learning_rate
        self._x = weight.new_empty(num_clients, num_rows, in_)
        self._g = weight.new_empty(num_clients, num_rows, out)
        self._seen = 0

    def multiply(self, x: Tensor) -> Tensor:
        """x [C, R, in] times each client's weight, transposed: [C, R, out]."""
        num_clients, rows, _ = x.shape
        y = (x.reshape(num_clients * rows, -1) @ self.weight.T).view(num_clients, rows, -1)
        if self._seen:
            seen_x, seen_g = self._x[:num_clients, : self._seen], self._g[:num_clients, : self._seen]
            y.baddbmm_(torch.bmm(x, seen_x.mT), seen_g, alpha=-self.learning_rate)
        return y

    def gradient(self, x: Tensor, g: Tensor, *, needs_input: bool) -> Tensor | None:
        """The gradient by x, of g [C, R, out]; from here on the weights have moved by it."""
        num_clients, rows, _ = g.shape
        by_input = None
        if needs_input:
            by_input = (g.view(num_clients * rows, -1) @ self.weight).view(num_clients, rows, -1)
            if self._seen:
                seen_x, seen_g = self._x[:num_clients, : self._seen], self._g[:num_clients, : self._seen]
                by_input.baddbmm_(torch.bmm(g, seen_g.mT), seen_x, alpha=-self.learning_rate)
        new = slice(self._seen, self._seen + rows)
        if new.stop > self._x.shape[1]:
            self._x, self._g = (
                torch.cat([each, each.new_empty(len(each), new.stop, each.shape[2])], 1) for each in (self._x, self._g)
            )
        self._x[:num_clients, new], self._g[:num_clients, new] = x, g
        if num_clients < len(self._x):  # the others have finished
            self._x[num_clients:, new], self._g[num_clients:, new] = 0, 0
        self._seen += rows
        return by_input

    def squared_norms(self) -> Tensor:
        """||w_local - w_global||^2 of each client, float64 [C]: the sum of (g_i g_j) (x_i x_j) over pairs of rows."""
        x, g = self._x[:, : self._seen].double(), self._g[:, : self._seen].double()
        squares: Tensor = (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        return squares.clamp_(min=0).mul_(self.learning_rate**2)  # rounding may leave less than nothing

    def norm_bounds(self) -> Tensor:
        """No less than ||w_local - w_global|| of each client, float64 [C]: the sum of |g| |x| over the rows."""
        x, g = (torch.linalg.vector_norm(each[:, : self._seen], dim=2) for each in (self._x, self._g))
        bounds: Tensor = (x.double() * g).sum(1)
        return bounds.mul_(self.learning_rate)

    def deltas(self) -> Tensor:
        """Each client's w_local - w_global, [C, out, in]."""
        return torch.bmm(self._g[:, : self._seen].mT, self._x[:, : self._seen]).mul_(-self.learning_rate)

    def add_weighted(self, total: Tensor, weights: Tensor) -> None:
        """total [out, in] += the sum over clients of weights [C] times w_local - w_global; weight 0 leaves one out."""
        x, g = self._x[:, : self._seen], self._g[:, : self._seen] * weights[:, None, None]
        if not weights.all():  # what is left out may not be finite
            taken = (weights != 0)[:, None, None]
            x, g = torch.where(taken, x, 0), torch.where(taken, g, 0)
        total.addmm_(g.flatten(0, 1).T, x.flatten(0, 1), alpha=-self.learning_rate)


class DenseWeight:
    """The same with a weight for each client, [C, out, in]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def multiply(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight[: len(x)].mT)

    def gradient(self, x: Tensor, g: Tensor, *, needs_input: bool) -> Tensor | None:
        return torch.bmm(g, self.weight[: len(g)]) if needs_input else None


ClientWeights = Tensor | FactoredWeight
"""The clients' values of one parameter: [C, *shape], or their dual form."""


class ClientLayer(nn.Module):
    """One layer for C clients: `use` gives it their parameters, `add_gradients` hands on what a backward pass left."""

    def __init__(self, layer: nn.Module, in_hand: CurrentBatch, name: str = "") -> None:
        super().__init__()
        self.in_hand, self.name = in_hand, name
        self._views: list[Any] = []
        self._leaves: list[Tensor] = []

    def use(self, views: Sequence[ClientWeights]) -> None:
        """The clients' parameters: weight, then bias. The layer reads them; whoever gave them moves them."""
        self._views[:] = views
        self._leaves.clear()

    def leaves(self) -> list[Tensor]:
        """What autograd is to differentiate the last forward pass by."""
        return self._leaves

    def add_gradients(self, gradients: Sequence[Tensor], targets: Sequence[Tensor | None], alpha: float) -> None:
        """targets += alpha * gradients, those by `leaves()`; a target is None where the form is dual."""
        if self._leaves:  # else it took no part in the pass
            for target, gradient in zip(targets, gradients, strict=True):
                assert target is not None
                target.add_(gradient, alpha=alpha)
        self._leaves.clear()

    def own(self) -> list[Tensor]:
        """The parameters of those clients that are in the batch, as leaves of the graph."""
        if not self._leaves:
            self._leaves += [view[: self.in_hand.num_clients].detach().requires_grad_() for view in self._views]
        return self._leaves

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for a folded batch."""


class ClientLinear(ClientLayer):
    """A linear layer.

    The gradient by its weight is a product of two thin matrices, which are kept apart until they are added to the
    weights in one pass (`baddbmm_`); in the dual form they are never multiplied out.
    """

    def __init__(self, layer: nn.Linear, in_hand: CurrentBatch, name: str = "") -> None:
        super().__init__(layer, in_hand, name)
        self.shape = (layer.out_features, layer.in_features)
        self.passes = _Passes()

    def use(self, views: Sequence[ClientWeights]) -> None:
        weight, *bias = views
        super().use(bias)
        self.passes.form = weight if isinstance(weight, FactoredWeight) else DenseWeight(weight)
        self.passes.bias = self._views[0] if bias else None
        self.passes.factors.clear()

    def leaves(self) -> list[Tensor]:
        return [self.passes.anchor]

    def add_gradients(self, gradients: Sequence[Tensor], targets: Sequence[Tensor | None], alpha: float) -> None:
        weight, *biases = targets
        for x, g in self.passes.factors:
            if weight is not None:
                weight.baddbmm_(g.mT, x, alpha=alpha)
            for bias in biases:
                assert bias is not None
                bias.add_(g.sum(1), alpha=alpha)
        self.passes.most_uses = max(self.passes.most_uses, len(self.passes.factors))
        self.passes.factors.clear()

    def forward(self, x: Tensor) -> Tensor:
        passes = self.passes
        rows = x.reshape(self.in_hand.num_clients, -1, x.shape[-1])
        passes.rows_of_one = -(-rows.shape[1] // self.in_hand.batch.x.shape[1])
        out: Tensor = _Product.apply(rows, passes.anchor, passes)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)


class _Passes:
    """What a linear layer holds from one pass to the next.

    In an object of its own, since setting an attribute of a torch module is slow.

    `rows_of_one` and `most_uses` are what was seen so far: the rows for one example of a batch, the uses in one pass.
    """

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)  # leads autograd to a layer whose input needs no gradient
        self.form: DenseWeight | FactoredWeight
        self.bias: Tensor | None = None
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.rows_of_one, self.most_uses = 1, 0


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, passes: _Passes) -> Tensor:
        y = passes.form.multiply(x)
        ctx.passes = passes
        ctx.save_for_backward(x)
        return y if passes.bias is None else y.add_(passes.bias[: len(x), None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), g = ctx.saved_tensors, gradients[0].contiguous()
        ctx.passes.factors.append((x, g))
        return ctx.passes.form.gradient(x, g, needs_input=ctx.needs_input_grad[0]), None, None


class ClientConv(ClientLayer):
    """A convolution, one client after the other: on a CPU that is faster than one convolution in groups."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, in_hand: CurrentBatch, name: str = "") -> None:
        super().__init__(layer, in_hand, name)
        self._convolve: Callable[..., Tensor] = layer._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        weights, *biases = (each.unbind() for each in self.own())
        rows = x.chunk(len(weights))
        own_biases = biases[0] if biases else (None,) * len(rows)
        return torch.cat([self._convolve(*each) for each in zip(rows, weights, own_biases, strict=True)])


class ClientEmbedding(ClientLayer):
    """An embedding: the clients' tables one under the other.

    A token outside a table raises `IndexError`, before another client's table is read.
    """

    def __init__(self, layer: nn.Embedding, in_hand: CurrentBatch, name: str = "") -> None:
        super().__init__(layer, in_hand, name)
        if layer.max_norm is not None or layer.padding_idx is not None or layer.scale_grad_by_freq or layer.sparse:
            raise UnsupportedLayer("an embedding with options has no form for many clients")

    def forward(self, x: Tensor) -> Tensor:
        (tables,) = self.own()
        num_clients, num_tokens, _ = tables.shape
        if x.numel():
            low, high = (int(each) for each in torch.aminmax(x))
            if low < 0 or high >= num_tokens:
                raise IndexError(f"index out of range in {self.name or 'the model'}, a table of {num_tokens}")
        first = torch.arange(num_clients, device=x.device).view(-1, *(1 for _ in x.shape)) * num_tokens
        return functional.embedding((self.in_hand.unfold(x) + first).flatten(0, 1), tables.flatten(0, 1))


class ClientNorm(ClientLayer):
    """Layer or group normalisation: the same for all but for each client's scale and shift."""

    def __init__(self, layer: nn.LayerNorm | nn.GroupNorm, in_hand: CurrentBatch, name: str = "") -> None:
        super().__init__(layer, in_hand, name)
        self._of_channels = isinstance(layer, nn.GroupNorm)
        if isinstance(layer, nn.GroupNorm):
            self._how: tuple[Callable[..., Tensor], Any, float] = (functional.group_norm, layer.num_groups, layer.eps)
        else:
            self._how = (functional.layer_norm, layer.normalized_shape, layer.eps)

    def forward(self, x: Tensor) -> Tensor:
        normalise, over, eps = self._how
        y = self.in_hand.unfold(normalise(x, over, eps=eps))  # [C, B, ...]
        scale, *shifts = (self._broadcast(each, y.ndim) for each in self.own())
        y = y * scale
        return (y + shifts[0] if shifts else y).flatten(0, 1)

    def _broadcast(self, each: Tensor, ndim: int) -> Tensor:
        before = 1 if self._of_channels else ndim - each.ndim
        return each.view(len(each), *(1,) * before, *each.shape[1:], *(1,) * (ndim - before - each.ndim))


class ClientPositions(ClientLayer):
    """Learned positions, added to [C * B, T, width]."""

    def forward(self, x: Tensor) -> Tensor:
        (positions,) = self.own()
        return (self.in_hand.unfold(x) + positions[:, None]).flatten(0, 1)


class ClientDropout(ClientLayer):
    """Dropout. Each client draws its zeros from its own generator, the same as if it trained alone."""

    def __init__(self, layer: nn.Dropout, in_hand: CurrentBatch, name: str = "") -> None:
        super().__init__(layer, in_hand, name)
        self._p = layer.p

    def forward(self, x: Tensor) -> Tensor:
        if not self._p:
            return x
        kept = torch.zeros(x.shape)  # drawn on the processor, whatever the device: the same draws everywhere
        sizes, generators = self.in_hand.batch.sizes, self.in_hand.batch.generators  # these of the finished too
        for rows, size, generator in zip(kept.chunk(len(sizes)), sizes, generators, strict=False):
            rows[:size].bernoulli_(1 - self._p, generator=generator)
        return x * kept.div_(1 - self._p).to(x.device)


LAYERS: Final[dict[type[nn.Module], Callable[[Any, CurrentBatch, str], ClientLayer]]] = {
    nn.Linear: ClientLinear,
    nn.Conv1d: ClientConv,
    nn.Conv2d: ClientConv,
    nn.Conv3d: ClientConv,
    nn.Embedding: ClientEmbedding,
    nn.LayerNorm: ClientNorm,
    nn.GroupNorm: ClientNorm,
    LearnedPositions: ClientPositions,
    nn.Dropout: ClientDropout,
}
"""The layers that have a form for many clients, by their exact type."""
