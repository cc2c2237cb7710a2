"""The check that a model fits the data: on synthetic rows, with copies of the model that are never trained."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedrounds.fl_components.errors import ModelError, one_line
from fedrounds.fl_components.models.rowwise import meeting_place
from fedrounds.fl_components.models.state import ModuleState, refuse_changes

Mode = Literal["training", "evaluation"]

PARAMETER_SCALES: Final = (0.1, 1.0, 30.0)
"""The standard deviations of the parameters that are drawn for trials, besides the initial ones."""


@dataclass(frozen=True, slots=True)
class RowFormat:
    """What is known of the rows of a data set without looking at private values.

    Args:
      shape: of one row.
      is_tokens: whether rows hold int64 tokens; else float32 numbers.
      lowest, highest: the range of each position's tokens, int64 of the row's shape, where it may be known.

    >>> RowFormat((2,), is_tokens=True).describe()
    'rows of int64 [2]'
    """

    shape: tuple[int, ...]
    is_tokens: bool = False
    lowest: NDArray[np.int64] | None = None
    highest: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, *rows: NDArray[Any], ranges: bool) -> RowFormat:
        """The format of the rows of several arrays; the ranges of their tokens only on request."""
        shape, is_tokens = rows[0].shape[1:], rows[0].dtype == np.int64
        if not (is_tokens and ranges and any(map(len, rows))):
            return cls(shape, is_tokens)
        some = [each for each in rows if len(each)]
        lowest = np.minimum.reduce([each.min(axis=0) for each in some])
        return cls(shape, is_tokens, lowest, np.maximum.reduce([each.max(axis=0) for each in some]))

    def describe(self) -> str:
        return f"rows of {'int64' if self.is_tokens else 'float32'} {list(self.shape)}"

    def samples(self, num_rows: int) -> dict[str, Tensor]:
        """Synthetic rows [num_rows, *shape] of several kinds, by name; the same in every process."""
        generator = torch.Generator().manual_seed(0)
        shape = (num_rows, *self.shape)
        if self.is_tokens:
            low, high = (
                torch.full(self.shape, default) if bound is None else torch.from_numpy(bound)
                for bound, default in ((self.lowest, 0), (self.highest, 1))
            )
            share = torch.rand(shape, generator=generator, dtype=torch.float64)
            drawn = low + (share * (high - low + 1)).long().clamp_(max=high - low)
            return {"drawn": drawn, "highest": high.expand(shape).clone(), "lowest": low.expand(shape).clone()}
        normal, uniform = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        rows = torch.arange(num_rows).view(-1, *(1,) * len(self.shape))
        return {
            "normal": normal,
            "uniform": uniform,
            "zeros": torch.zeros(shape),
            "bytes": (uniform * 255).round(),
            "one bright row": torch.where(rows == num_rows - 1, uniform * 255, uniform * 0.2),
            "large": normal * 1e4,
            "huge": normal * 1e30,
        }


def check_fits(
    module: nn.Module,
    rows: RowFormat,
    output_shape: tuple[int, ...],
    *,
    one_row: dict[Mode, str] | None = None,
) -> None:
    """Raise `ModelError` unless the module gives finite scores [B, *output_shape] for rows of this format, in training
    mode and in evaluation mode, and stays as it is.

    The trials run on deep copies, with synthetic rows of several scales, and with the initial parameters as well as
    others: `module` itself is neither run nor changed, and no row of anybody's is looked at. A module that changes its
    parameters, its buffers or any attribute in a forward or backward pass is refused: what it writes would be neither
    averaged, clipped nor noised. Changes to the input are harmless, since models are only ever given copies.

    Args:
      one_row: the modes in which batches of one row occur, each with the reason; they are tried too.

    >>> check_fits(nn.Linear(4, 2), RowFormat((4,)), (2,))
    """
    _check_layers(module)
    with torch.random.fork_rng(devices=[]):
        for mode in ("training", "evaluation"):
            _Trials(module, rows, output_shape, mode, 2, "").run()
        for mode, reason in (one_row or {}).items():
            _Trials(module, rows, output_shape, mode, 1, reason).run()


def _check_layers(module: nn.Module) -> None:
    """Raise `ModelError` for layers and parameters that cannot be trained as they are."""
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or 'the model'} is compiled by TorchScript: its code cannot be checked",
                hint="give the torch.nn.Module itself, before torch.jit.script or torch.jit.trace",
            )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ModelError(
                f"the parameter {name} is lazy: its shape is not known before a batch is seen",
                hint="give all sizes: torch.nn.Linear(in_features, out_features) in place of torch.nn.LazyLinear",
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ModelError(
                f"the parameter {name} has a gradient hook, which a copy of the model loses",
                hint="bound gradients by training.max_gradient_norm, or change them in a torch.autograd.Function",
            )


def check_scores(scores: Any, num_rows: int, output_shape: tuple[int, ...], came_in: str) -> Tensor:
    """The scores of a model for `num_rows` rows. Raises `ModelError` where they are no floats of the right shape."""
    shape = ["rows", *output_shape]
    size = output_shape[-1]
    returned = f"one score (logit) for each of {size} classes" if size > 1 else "one number a target"
    hint = f"let the model return {returned}: [{', '.join(map(str, shape))}], in training and in evaluation"
    if not isinstance(scores, Tensor):
        raise ModelError(f"the model returned a {type(scores).__name__}, not a tensor", hint=hint)
    if scores.ndim != len(shape) or scores.shape[:-1] != (num_rows, *output_shape[:-1]):
        what = f"{num_rows} {came_in}" if num_rows > 1 else f"a batch of one row ({came_in})"
        raise ModelError(f"the model returned the shape {list(scores.shape)} for {what}", hint=hint)
    if not scores.is_floating_point():
        raise ModelError(f"the model returned {scores.dtype}, not floats", hint=hint)
    if scores.shape[-1] != output_shape[-1]:
        raise ModelError(
            f"the model returned {scores.shape[-1]} scores a row, and "
            + (f"the labels have {size} classes" if size > 1 else "the learning task needs 1"),
            hint=hint,
        )
    return scores


@dataclass
class _Trials:
    """Runs copies of a module in one mode, with batches of one size."""

    module: nn.Module
    rows: RowFormat
    output_shape: tuple[int, ...]
    mode: Mode
    num_rows: int
    reason: str

    def run(self) -> None:
        samples = self.rows.samples(self.num_rows)
        errors: dict[str, Exception] = {}
        finite = []
        for kind, x in samples.items():
            try:
                scores = self._try(self.module, x)
            except ModelError:
                raise
            except Exception as error:
                errors[kind] = error
                if self.rows.is_tokens:  # which no model can tell from other tokens of its vocabulary
                    break
                continue
            try:
                check_scores(scores, self.num_rows, self.output_shape, self.rows.describe())
            except ModelError as error:
                raise ModelError(error.message + self._when(), hint=error.hint) from None
            finite.append(bool(torch.isfinite(scores).all()))
        if (self.rows.is_tokens and errors) or not finite:
            kind, first_error = next(iter(errors.items()))
            self._refuse(samples[kind], first_error)
        if not any(finite):
            raise ModelError(
                "the model's scores are not finite before any training",
                hint="start from smaller parameters, or scale the features to about [-1, 1]",
            )
        if meeting_place(self.module) is not None:
            self._redraw(samples)

    def _redraw(self, samples: dict[str, Tensor]) -> None:
        """Try other parameters: what a call does may depend on them."""
        generator = torch.Generator().manual_seed(1)
        for scale in PARAMETER_SCALES:
            module = _copy(self.module)
            with torch.no_grad():
                for each in module.parameters():
                    if each.requires_grad:
                        each.copy_(torch.randn(each.shape, generator=generator) * scale)
            for x in list(samples.values())[:2]:
                try:
                    self._try(module, x)
                except ModelError:
                    raise
                except Exception:  # not one that the model starts from
                    continue

    def _try(self, module: nn.Module, x: Tensor) -> Any:
        """The scores of a copy for a copy of the rows; refuses what changes."""
        module, x = _copy(module).train(self.mode == "training"), x.clone()
        state = ModuleState(module)
        for _ in range(3):  # another thread may draw, too
            drawn = _library_draws()
            scores = self._call(module, x.clone())
            refuse_changes(state.changes(module))
            if drawn == _library_draws():
                return scores
        raise ModelError(
            "the model draws from Python's or numpy's random numbers, which no seed of a run decides",
            hint="draw with torch (torch.rand, torch.nn.Dropout), whose generator is seeded for each client",
        )

    def _call(self, module: nn.Module, x: Tensor) -> Any:
        if self.mode == "evaluation":
            with torch.no_grad():
                return module(x)
        scores = module(x)
        trained = [each for each in module.parameters() if each.requires_grad]
        if isinstance(scores, Tensor) and scores.requires_grad:
            torch.autograd.grad(scores.sum(), trained, allow_unused=True)
            return scores.detach()
        return scores

    def _when(self) -> str:
        size = f" ({self.reason})" if self.reason else ""
        return f"{size}; the model was in {self.mode} mode" if self.mode == "evaluation" or size else ""

    def _refuse(self, x: Tensor, error: Exception) -> None:
        module = _copy(self.module).train(self.mode == "training")
        where = failing_layer(module, x)
        if self.num_rows == 1:
            raise ModelError(
                f"the model cannot take a batch of one row in {self.mode} mode{where}: {one_line(error)}; such "
                f"batches occur: {self.reason}",
                hint="use layers that take one row (torch.nn.GroupNorm needs several values a group; squeeze() drops "
                "the axis of the rows: name the axes), or choose another training.batch_size",
            ) from error
        when = " when it is evaluated" if self.mode == "evaluation" else ""
        raise ModelError(
            f"the model cannot take {self.rows.describe()}{when}{where}: {one_line(error)}",
            hint=_embedding_hint(module, x) or self._hint(),
        ) from error

    def _hint(self) -> str:
        if self.rows.is_tokens:
            highest = 1 if self.rows.highest is None else int(self.rows.highest.max())
            return (
                f"these are int64 tokens up to {highest}: begin the model with an embedding of at least {highest + 1} "
                "tokens, or give the data as floats"
            )
        if any(isinstance(layer, nn.Embedding) for layer in self.module.modules()):
            return "the model begins with an embedding, which takes int64 tokens: choose another model, or give tokens"
        return f"make the model's first layer take {list(self.rows.shape)}"


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied: {one_line(error)}",
            hint="copy.deepcopy must be able to copy it: keep no files, locks, generators or computed tensors on self",
        ) from error


def _library_draws() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    numpys = state["state"]
    return random.getstate(), numpys["key"].tobytes(), numpys["pos"], state["gauss"]


def failing_layer(module: nn.Module, x: Tensor) -> str:
    """The innermost layer in which the module fails for rows like these, in words; empty where it does not fail.

    >>> failing_layer(nn.Sequential(nn.Identity(), nn.Linear(3, 2)), torch.zeros(1, 4))
    ' (in 1, Linear)'
    """
    layers = _entered(module, x)
    if not layers:
        return ""
    name, layer, _ = layers[-1]
    return f" (in {name or 'the model'}, {type(layer).__name__})"


def _embedding_hint(module: nn.Module, x: Tensor) -> str:
    """The hint for an embedding in which the module fails on synthetic rows; empty where another layer fails."""
    layers = _entered(module, x)
    if not layers:
        return ""
    name, layer, args = layers[-1]
    tokens = args[0] if args else None
    if not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) or not isinstance(tokens, Tensor):
        return ""
    if tokens.is_floating_point() or not tokens.numel():
        return ""
    low, high = int(tokens.min()), int(tokens.max())
    hint = f"{name or 'the model'} holds the tokens 0 to {layer.num_embeddings - 1} and is given {low} to {high}: "
    return hint + ("give tokens from 0 on" if low < 0 else f"make it an embedding of at least {high + 1} tokens")


def _entered(module: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, tuple[Any, ...]]]:
    """The layers that a call of the module enters and does not leave, with their arguments.

    None where it works, else the last one is the one that fails.
    """
    entered: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    handles = []
    for name, layer in module.named_modules():

        def enter(layer: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            entered.append((name, layer, args))

        def leave(layer: nn.Module, args: Any, out: Any) -> None:
            entered.pop()

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(Exception):
            module(x.clone())
    finally:
        for handle in handles:
            handle.remove()
    return entered
