"""A chunk of clients that make a claim about each of their examples, and how their gradients are found."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedrounds.fl_components.errors import FedroundsError, ModelError, one_line
from fedrounds.fl_components.parameters import flatten
from fedrounds.fl_components.privacy import ExampleLevel
from fedrounds.fl_components.privacy.central import MIN_NOISE
from fedrounds.fl_components.privacy.steps import PIECE_ROWS, Mechanism
from fedrounds.fl_components.training.channels import ClientChannels
from fedrounds.fl_components.training.chunk import ChunkUpdates, ExampleTable, Rows, synthetic_like
from fedrounds.fl_components.training.layers import Batch, UnsupportedLayer
from fedrounds.fl_components.training.opacus_sampler import OneAtATime, OpacusGradSampler, is_dropout, objections
from fedrounds.fl_components.training.per_example import ClippedReplicas, GhostNorms, VmapAlone, VmapExamples
from fedrounds.fl_components.training.sgd import SGD, example_seed
from fedrounds.fl_components.training.step import descend, is_vanilla, regularise
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.values import SimulatedClient, Weighted

Way = ClippedReplicas | OpacusGradSampler | OneAtATime

_MIXED: Final = "gradients of examples would mix: what the model makes of an example depends on the others of its batch"


class PrivateChunks:
    """Trains chunks of clients as `SGD.train` does with a key.

    A client takes 2 D float32 (its parameters, a step's sum), one D more with momentum, two more while a batch has more
    than `PIECE_ROWS` rows; and for at most that many rows of a batch at a time what the model's layers make of them.
    Formed gradients of all clients together are at most 64 MiB, or one for each client.
    """

    def __init__(self, replicas: ClippedReplicas, module: nn.Module, rule: SGD, params_D: Tensor) -> None:
        assert rule.example_level is not None
        self._replicas, self._rule, self._private = replicas, rule, rule.example_level
        self._mechanism = Mechanism.of(self._private, len(params_D))
        self._draws = any(is_dropout(each) for each in module.modules())
        sizes = [shape.numel() for shape in replicas.shapes]
        self._start = [
            part.view(shape) for part, shape in zip(torch.split(params_D, sizes), replicas.shapes, strict=True)
        ]

    @property
    def floats(self) -> int:
        """What a client takes, besides what stays the same for all."""
        return (2 + bool(self._rule.momentum)) * self._mechanism.num_parameters + self._replicas.formed

    def train(
        self,
        examples: ExampleTable,
        tasks: Sequence[SimulatedClient],
        batches: Sequence[Sequence[Rows]],
        channels: ClientChannels | None = None,
    ) -> tuple[ChunkUpdates, list[Weighted]]:
        """Return the clients' updates and losses; `batches` and `channels` as for `train_chunk`.

        A batch may be empty.
        """
        rule, mechanism, num_clients = self._rule, self._mechanism, len(tasks)
        noises = [mechanism.noise(task.key) for task in tasks]
        scales = [mechanism.per_example(self._private.sampling_rate, task.num_examples) for task in tasks]
        params = [part.expand(num_clients, *part.shape).clone() for part in self._start]
        velocities = [torch.zeros_like(each) for each in params] if rule.momentum else []
        sums = [torch.empty_like(each) for each in params]
        losses = [Weighted()] * num_clients
        corrections = None if channels is None else channels.corrections(self._replicas.shapes)
        self._replicas.use(params)
        for step in range(len(batches[0])):
            active = sum(len(each) > step for each in batches)
            own, gradients, kept = ([each[:active] for each in tensors] for tensors in (params, sums, velocities))
            rows = [each[step] for each in batches[:active]]
            wholes, found = self._sum(examples, tasks, rows, step, gradients)
            for client, loss in enumerate(found):
                losses[client] += loss
            # A vanilla step is made as the noise comes, while what it is added to is in the cache.
            vanilla = is_vanilla(rule)
            with torch.no_grad():
                for client in range(active):
                    flat, flat_wholes, flat_own = (
                        [each[client].view(-1) for each in tensors] for tensors in (gradients, wholes, own)
                    )
                    if vanilla:
                        alpha = -rule.learning_rate * scales[client]
                        mechanism.release(flat_wholes, noises[client], flat_own, alpha)
                    else:
                        mechanism.release(flat_wholes, noises[client], flat, scales[client], fresh=True)
                if not vanilla:
                    corrected = None if corrections is None else [each[:active] for each in corrections]
                    regularise(rule, gradients, own, self._start, corrected)
                    descend(rule, gradients, own, kept)
        updates = [each.sub_(part) for each, part in zip(params, self._start, strict=True)]
        if channels is not None:
            delta_CD = ChunkUpdates(updates).stack()
            updates += channels.sent(delta_CD, [len(each) for each in batches], rule.learning_rate)
        return ChunkUpdates(updates), losses

    def _sum(
        self,
        examples: ExampleTable,
        tasks: Sequence[SimulatedClient],
        rows: Sequence[Rows],
        step: int,
        sums: Sequence[Tensor],
    ) -> tuple[Sequence[Tensor], list[Weighted]]:
        """A step's sums in units, in `sums` (used up) where there is one piece, else float64: those of rounded pieces.

        Also each client's loss.
        """
        longest, losses = max(map(len, rows)), [Weighted()] * len(rows)
        if not longest:
            return [each.zero_() for each in sums], losses
        several = longest > PIECE_ROWS
        wholes = [torch.zeros_like(each, dtype=torch.float64) for each in sums] if several else sums
        at_once = self._replicas.rows_at_once(len(rows))
        for piece in range(0, longest, PIECE_ROWS):
            for first in range(piece, min(longest, piece + PIECE_ROWS), at_once):
                stop = min(first + at_once, piece + PIECE_ROWS)
                batch = self._batch(examples, tasks, [own[first:stop] for own in rows], step, first)
                found = self._replicas.add_clipped(
                    batch, self._rule.label_smoothing, self._mechanism, sums, fresh=first == piece
                )
                counted = examples.task.targets.num_counted_by_row(batch.y.flatten(0, 1)).view(found.shape).to(found)
                totals = torch.where(counted > 0, found * counted, 0).sum(1)
                for client, loss in enumerate(zip(totals.tolist(), counted.sum(1).tolist(), strict=True)):
                    losses[client] += Weighted(*loss)
            if several:
                for total, each in zip(wholes, sums, strict=True):
                    total += each.round_()
        return wholes, losses

    def _batch(
        self, examples: ExampleTable, tasks: Sequence[SimulatedClient], rows: Sequence[Rows], step: int, first: int
    ) -> Batch:
        batch = examples.gather(rows, (), [int(examples.starts[task.index]) for task in tasks[: len(rows)]])
        if not self._draws:
            return batch
        longest = batch.x.shape[1]
        places = [(task, len(own), place) for task, own in zip(tasks, rows, strict=False) for place in range(longest)]
        generators = [
            torch.Generator().manual_seed(example_seed(task.seed, step, first + place)) for task, _, place in places
        ]
        return Batch(batch.x, batch.y, [int(place < size) for _, size, place in places], batch.counts, generators)


def grad_sampler_name(module: nn.Module, examples: ExampleTable) -> str:
    """How the gradients of single examples are found: "ghost norms", "vmap", "opacus" or "one example at a time".

    It follows from the model and from what its rows look like, not from what they hold. Raises `ModelError` for a model
    in which examples see each other whatever they hold, or that fails, and `ConfigError` where the way needs Opacus,
    which is not installed.
    """
    with one_thread():
        return choose_grad_sampler(module, synthetic_like(examples)).name


def choose_grad_sampler(module: nn.Module, rows: ExampleTable) -> Way:
    """The first way that makes a few small steps as `SGD.train` does, on synthetic rows (`synthetic_like`).

    Each way keeps examples apart by construction. Ghost norms and Opacus run whole batches, and take modules whose
    types say that each row is treated by itself; vmap runs the module's code for one example, and refuses code that
    branches on values; what remains is run with one example at a time. `module` stays as it is.
    """
    try:
        mixed = _mixes(copy.deepcopy(module), rows.x)
    except Exception as error:
        failed = f"the model fails on synthetic rows: {one_line(error)}"
        raise ModelError("; ".join([failed, *objections(copy.deepcopy(module))])) from error
    notes: list[str] = []
    for make in (GhostNorms, VmapExamples, VmapAlone, OpacusGradSampler, OneAtATime):
        if mixed and make is not OneAtATime:
            if make is VmapExamples and _runs_under_vmap(module, rows.x):
                break
            continue
        try:
            way = make(copy.deepcopy(module), rows.task)
            difference = _difference(way, copy.deepcopy(module), rows)
        except FedroundsError as error:
            # A fast way may fail where the model does not: one example at a time decides.
            if make is OneAtATime or not isinstance(error, ModelError):
                raise
            notes.append(f"{make.name}: {error.message}")
            continue
        except Exception as error:
            notes.append(f"{make.name}: {error if isinstance(error, UnsupportedLayer) else one_line(error)}")
            continue
        if difference is None:
            return way
        notes.append(f"{make.name}: {difference}")
    if mixed:
        hint = "normalise over an example's own features, with torch.nn.GroupNorm or torch.nn.LayerNorm"
        raise ModelError("; ".join([_MIXED, *objections(copy.deepcopy(module))]), hint=hint)
    why = "; ".join([*objections(copy.deepcopy(module)), *notes])
    raise ModelError(f"no way gives the gradients of this model's single examples: {why}")


def _runs_under_vmap(module: nn.Module, x: Tensor) -> bool:
    """Whether its code is the same for all values: if so, examples meet in it whatever they hold."""
    copied = copy.deepcopy(module).train()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            vmap(lambda row: copied(row[None]), randomness="different")(x.clone())
    except Exception:
        return False
    return True


def _mixes(module: nn.Module, x: Tensor) -> bool:
    """Whether what comes out for a row changes with the other rows of its batch, by a single bit."""
    module.train()

    def out(rows: Tensor) -> Tensor:
        torch.manual_seed(0)  # what is drawn is the same for each row
        scores: Tensor = module(rows.clone())
        return scores.view(len(rows), -1)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        scores = out(x)
        for place in (0, len(x) // 2, len(x) - 1):
            others = x.roll(1, 0)
            others[place] = x[place]
            if not torch.allclose(out(others)[place], scores[place], rtol=0, atol=0, equal_nan=True):
                return True
    return False


def _difference(way: Way, module: nn.Module, rows: ExampleTable) -> str | None:
    """How two clients' updates differ from what each comes to by one example after the other; None where they agree.

    They have five rows and two, and batches that coins draw, some of them empty. First with all gradients clipped, as a
    rule, and momentum; then with few or none of them clipped, and plain steps.
    """
    start_D = flatten(module)
    tasks = [
        SimulatedClient(str(index), index, size, index, key=bytes([index]) * 32) for index, size in enumerate((5, 2))
    ]
    for norm, momentum in ((0.1, 0.5), (10.0, 0.0)):
        # Hardly any noise: next to it a difference must not look small.
        private = ExampleLevel(noise_multiplier=MIN_NOISE, max_grad_norm=norm, sampling_rate=0.5)
        rule = SGD(learning_rate=0.1 / norm, momentum=momentum, steps=4, privacy=private)
        own = [slice(start, stop) for start, stop in zip(rows.starts, rows.stops, strict=True)]
        each = [(task, rows.x[mine], rows.y[mine]) for task, mine in zip(tasks, own, strict=True)]
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            if not isinstance(way, ClippedReplicas):
                found = [way.train(rule, start_D, x, y, task)[0] for task, x, y in each]
                together_CD = torch.from_numpy(np.stack(found))
            else:
                params_D = torch.from_numpy(start_D).to(rows.x.device)
                batches = [
                    [rows.starts[task.index] + drawn for drawn in rule.private_batches_of(len(y), task.key)]
                    for task, _, y in each
                ]
                together_CD = PrivateChunks(way, module, rule, params_D).train(rows, tasks, batches)[0].stack().cpu()
            if not (isinstance(way, OneAtATime) or torch.equal(before, torch.get_rng_state())):
                return "it draws random numbers elsewhere than in torch.nn.Dropout"
        alone_CD = torch.from_numpy(
            np.stack(
                [
                    rule.train(module, start_D, x, y, task.seed, task.key, learning_task=rows.task)[0]
                    for task, x, y in each
                ]
            )
        )
        allowed = 1e-3 * alone_CD.abs().max() + 1e-6 * float(np.abs(start_D).max())
        error = (together_CD - alone_CD).abs().max()
        if not error <= allowed:
            return f"its updates differ by {error:.2g} from those of one example after the other"
    return None
