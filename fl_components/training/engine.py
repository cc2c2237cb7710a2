"""The cohort engine: the local training of a shard of clients on one thread, many clients at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedrounds.fl_components.admission import RoundAdmission
from fedrounds.fl_components.arrays import Float32, Float64
from fedrounds.fl_components.errors import FedroundsError, ModelError, one_line
from fedrounds.fl_components.models import failing_layer
from fedrounds.fl_components.parameters import flatten, load_into
from fedrounds.fl_components.privacy.clipping import add_contributions
from fedrounds.fl_components.rejections import Rejection
from fedrounds.fl_components.training.channels import ClientChannels
from fedrounds.fl_components.training.chunk import ChunkUpdates, ExampleTable, Rows, synthetic_like, train_chunk
from fedrounds.fl_components.training.layers import UnsupportedLayer
from fedrounds.fl_components.training.opacus_sampler import OneAtATime, OpacusGradSampler
from fedrounds.fl_components.training.per_example import ClippedReplicas
from fedrounds.fl_components.training.private import PrivateChunks, Way, choose_grad_sampler
from fedrounds.fl_components.training.replicas import LayeredReplicas, Replicas, VmapReplicas
from fedrounds.fl_components.training.sgd import SGD, torch_seed
from fedrounds.fl_components.training.step import is_vanilla
from fedrounds.fl_components.training.threads import one_thread
from fedrounds.fl_components.values import ClientTask, SimulatedClient, Weighted

CHUNK_BYTES: Final = 18_000_000
"""Of the parameters of clients that are trained together, and of what moves them: what stays in a processor's cache."""

NAMED: Final = 12  # clients in a message


class Weighing(Protocol):
    """What the engine must know of a linear aggregator in order to sum updates as they come."""

    @property
    def max_weight(self) -> float | None:
        """The largest weight that a client can have, where there is one."""

    def weigh(self, num_examples_N: Float64) -> Float64:
        """Return the weight of each client."""


@dataclass(frozen=True, slots=True)
class StreamingSum:
    """How a round's updates are admitted and summed as they come.

    Where the admission clips, contributions are summed (privacy/clipping.py), each times its weight over the largest
    possible one: whole numbers, so that the sum is exact. One more coordinate, the last, counts those that were not
    clipped: each adds 1/2, each of the others -1/2.
    """

    rule: Weighing
    admission: RoundAdmission

    def size(self, num_coordinates: int) -> int:
        """Return the length of the sum of updates of `num_coordinates` (M)."""
        return num_coordinates + (self.admission.clip is not None)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a shard of clients came to, besides the array of its updates or of their sum.

    Args:
      client_ids, losses: of those that sent an update.
      rejected: those whose update was left out of the sum, with the reason.
      weight, count: of those in the sum.
    """

    client_ids: tuple[str, ...]
    losses: tuple[Weighted, ...]
    rejected: dict[str, Rejection] = field(default_factory=dict)
    weight: float = 0.0
    count: int = 0


def names_of(tasks: Sequence[ClientTask]) -> str:
    """Clients, the first dozen of them, in words.

    >>> names_of([ClientTask(f"c{row}", row, 1, seed=0) for row in range(2)])
    'clients c0, c1'
    """
    names = [task.client_id for task in tasks]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"client{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED])}{more}"


class Engine:
    """Trains clients of one model.

    It has three ways: layers that hold many clients' parameters at once, torch.func.vmap, and one client after the
    other. Each keeps clients apart by construction. It takes the first that makes a few small steps as `SGD.train`
    makes them, on synthetic rows and from the initial parameters: the choice is the same whenever it is made. Where
    clients make a claim about their examples the ways are others (private.py, `choose_grad_sampler`), found when that
    is first asked for.

    Args:
      module: with its initial parameters. It stays as it is.
      examples: all clients' training examples, on the device that is to train.

    Attributes:
      note: why it is not the first way; empty where it is.
    """

    def __init__(self, module: nn.Module, examples: ExampleTable) -> None:
        self._examples, self._device = examples, examples.x.device
        self._module = copy.deepcopy(module).to(self._device)  # never trained: what is found of it is found anywhere
        self._scratch = copy.deepcopy(self._module)
        self._shapes = [each.shape for each in module.parameters() if each.requires_grad]
        self._sizes = [shape.numel() for shape in self._shapes]
        with one_thread():
            self._replicas, self.note = _fastest(self._module, synthetic_like(examples))
        self._way: Way | None = None

    def train(
        self,
        rule: SGD,
        base_M: Float32,
        tasks: Sequence[SimulatedClient],
        out: NDArray[np.floating],
        streaming: StreamingSum | None = None,
    ) -> ShardReport:
        """Train a shard of clients from the same broadcast, and return the report.

        Args:
          base_M: what the server sent, float32 [M]: the parameters, then each channel of the objective.
          out: without `streaming`, its first rows receive the updates [N, M], in the order of the tasks. With it, it
            receives the weighted sum of the admitted updates [M] (float64 [M + 1] where contributions are summed), and
            no array [N, M] exists.

        Raises:
          ModelError: the model fails, or has no gradients of single examples where these are needed.
        """
        if rule.example_level is not None and not all(task.key for task in tasks):
            raise ValueError("clients that make a claim about their examples need a key each")
        if rule.example_level is not None and self._way is None:
            with one_thread():
                self._way = choose_grad_sampler(self._module, synthetic_like(self._examples))
        losses, rejected = [Weighted()] * len(tasks), dict[str, Rejection]()
        weights_N = np.array([each.num_examples for each in tasks], np.float64)
        weights_N = streaming.rule.weigh(weights_N).copy() if streaming is not None else weights_N
        clip = None if streaming is None else streaming.admission.clip
        if clip is not None:
            out[:] = 0
        with one_thread():  # all of it: a second thread, once awake, spins for a while
            total_M = torch.zeros(len(base_M), device=self._device)
            base_on_device_M = torch.from_numpy(base_M).to(self._device)
            for positions, updates, chunk_losses in self._chunks(rule, base_on_device_M, tasks):
                for position, loss in zip(positions, chunk_losses, strict=True):
                    losses[position] = loss
                if streaming is None:
                    out[positions] = updates.stack().cpu().numpy()
                    continue
                if clip is not None:
                    assert streaming.rule.max_weight is not None
                    shares_C = torch.from_numpy(weights_N[positions] / streaming.rule.max_weight)
                    add_contributions(out, updates.parts(), shares_C, clip)
                    continue
                if any(streaming.admission.rejection(bound) for bound in updates.norm_bounds().tolist()):
                    for position, norm in zip(positions, updates.norms().tolist(), strict=True):
                        reason = streaming.admission.rejection(norm)
                        if reason is not None:
                            rejected[tasks[position].client_id] = reason
                            weights_N[position] = 0
                weights_C = torch.from_numpy(weights_N[positions]).to(total_M)
                updates.add_weighted(total_M, weights_C)
        if streaming is not None and clip is None:
            out[:] = total_M.cpu().numpy()
        return ShardReport(
            client_ids=tuple(task.client_id for task in tasks),
            losses=tuple(losses),
            rejected=rejected,
            weight=float(weights_N.sum()),
            count=len(tasks) - len(rejected) if streaming else 0,
        )

    def _chunks(
        self, rule: SGD, base_M: Tensor, tasks: Sequence[SimulatedClient]
    ) -> Iterator[tuple[list[int], ChunkUpdates, list[Weighted]]]:
        """The clients in chunks, those with the most steps first: their positions, updates and losses."""
        steps = [self._steps(rule, task) for task in tasks]
        private = None
        if rule.example_level is not None and isinstance(self._way, ClippedReplicas):
            private = PrivateChunks(self._way, self._module, rule, base_M[: sum(self._sizes)])
        order = sorted(range(len(tasks)), key=lambda position: -len(steps[position]))
        while order:
            if private is not None:
                size = _chunk_size(len(order), private.floats)
            else:
                size = self._chunk_size(rule, [sum(map(len, steps[position])) for position in order])
            positions, order = order[:size], order[size:]
            chunk, batches = [tasks[position] for position in positions], [steps[position] for position in positions]
            try:
                trained = self._train_chunk(rule, base_M, chunk, batches, private)
            except Exception as error:
                raise self._failure(rule, base_M, chunk, batches, private, error) from error
            yield positions, *trained

    def _failure(
        self,
        rule: SGD,
        base_M: Tensor,
        chunk: Sequence[SimulatedClient],
        batches: Sequence[Sequence[Rows]],
        private: PrivateChunks | None,
        error: Exception,
    ) -> ModelError:
        """What to raise where the model failed while these clients trained.

        It names the first of them with which it fails alone, and the layer in which it does.
        """
        for task, steps in zip(chunk, batches, strict=True) if len(chunk) > 1 else ():
            try:
                self._train_chunk(rule, base_M, [task], [steps], private)
            except Exception as own_error:
                chunk, error = [task], own_error
                break
        layer = self._failing_layer(base_M, chunk[0]) if len(chunk) == 1 else ""
        what = error.message if isinstance(error, FedroundsError) else one_line(error)
        return ModelError(
            f"the model failed while {names_of(chunk)} trained{layer}: {what}",
            hint=getattr(error, "hint", None) or "correct the model, then resume the run",
        )

    def _failing_layer(self, base_M: Tensor, task: SimulatedClient) -> str:
        """The layer that fails for a client's rows, in words; empty where none does."""
        module = copy.deepcopy(self._module).train()
        load_into(module, base_M[: sum(self._sizes)].cpu().numpy())
        return failing_layer(
            module, self._examples.x[self._examples.starts[task.index] : self._examples.stops[task.index]]
        )

    def _steps(self, rule: SGD, task: SimulatedClient) -> list[Rows]:
        """The rows of each step's batch, among all clients' rows; one who trains alone needs none."""
        if self._goes_alone(rule):
            return []
        first = self._examples.starts[task.index]
        if rule.example_level is not None:
            return [first + rows for rows in rule.private_batches_of(task.num_examples, task.key, task.work)]
        return [first + rows for rows in rule.steps_of(task.num_examples, task.seed, task.work)]

    def _goes_alone(self, rule: SGD) -> bool:
        """Whether clients train one after the other."""
        if rule.example_level is None:
            return self._replicas is None
        return not isinstance(self._way, ClippedReplicas)

    def _train_chunk(
        self,
        rule: SGD,
        base_M: Tensor,
        clients: Sequence[SimulatedClient],
        steps: Sequence[Sequence[Rows]],
        private: PrivateChunks | None,
    ) -> tuple[ChunkUpdates, list[Weighted]]:
        if self._goes_alone(rule):
            (client,) = clients
            return self._train_alone(rule, base_M, client)
        channels = None
        if rule.objective.channels:
            channels = ClientChannels(rule.objective, base_M, [client.kept for client in clients])
        if private is not None:
            return private.train(self._examples, clients, steps, channels)
        assert self._replicas is not None
        generators = [torch.Generator().manual_seed(torch_seed(client.seed)) for client in clients]
        params_D = base_M[: sum(self._sizes)]
        return train_chunk(self._replicas, rule, params_D, self._examples, steps, generators, channels)

    def _train_alone(self, rule: SGD, base_M: Tensor, client: SimulatedClient) -> tuple[ChunkUpdates, list[Weighted]]:
        examples = self._examples
        rows = slice(examples.starts[client.index], examples.stops[client.index])
        x, y = examples.x[rows], examples.y[rows]
        if isinstance(self._way, (OpacusGradSampler, OneAtATime)) and rule.example_level is not None:
            update_M, loss = self._way.train(rule, base_M.cpu().numpy(), x, y, client)
        else:
            update_M, loss = rule.train(
                self._scratch,
                base_M.cpu().numpy(),
                x,
                y,
                client.seed,
                work=client.work,
                kept=client.kept,
                learning_task=examples.task,
            )
        update_1M = torch.from_numpy(update_M[None]).to(base_M.device)
        sizes = self._sizes * (1 + len(rule.objective.channels))
        return ChunkUpdates(update_1M.split_with_sizes(sizes, dim=1)), [loss]

    def _chunk_size(self, rule: SGD, num_examples: Sequence[int]) -> int:
        """How many of the clients to come train together.

        `num_examples` are those that each steps through: those who come first have the same parameters in dual form,
        and the bytes of all stay within `CHUNK_BYTES`.
        """
        if self._goes_alone(rule):
            return 1
        assert self._replicas is not None
        duals = self._replicas.dual(max(num_examples)) if is_vanilla(rule) else {}
        alike = 1
        while alike < len(num_examples) and (
            not is_vanilla(rule) or self._replicas.dual(num_examples[alike]).keys() == duals.keys()
        ):
            alike += 1
        floats = 2 * sum(shape.numel() for index, shape in enumerate(self._shapes) if index not in duals)
        floats += sum(rows * sum(self._shapes[index]) for index, rows in duals.items())
        return _chunk_size(alike, floats)


def _chunk_size(num_clients: int, floats: int) -> int:
    """How many of so many clients, alike in what they take (`floats` each), train together: in chunks of equal size."""
    most = max(1, CHUNK_BYTES // (4 * max(1, floats)))
    return -(-num_clients // -(-num_clients // most))


def _fastest(module: nn.Module, examples: ExampleTable) -> tuple[Replicas | None, str]:
    """The first way that makes a few small steps as `SGD.train` does, and why not an earlier one."""
    notes = []
    for make, name in ((LayeredReplicas, "many clients at once"), (VmapReplicas, "torch.func.vmap")):
        try:
            replicas = make(copy.deepcopy(module), examples.task)
            difference = _difference(replicas, copy.deepcopy(module), examples)
        except Exception as error:
            notes.append(f"{name}: {error if isinstance(error, UnsupportedLayer) else one_line(error)}")
            continue
        if difference is None:
            return replicas, "; ".join(notes)
        notes.append(f"{name}: {difference}")
    return None, "; ".join(notes)


def _difference(replicas: Replicas, module: nn.Module, examples: ExampleTable) -> str | None:
    """How two clients' updates by `replicas` differ from what each comes to alone; None where they agree.

    The clients have five rows and two, in batches of three: some are padded, and one client finishes first. First with
    momentum, then with plain steps, where parameters may be in dual form.
    """
    start_D = flatten(module)
    params_D = torch.from_numpy(start_D).to(examples.x.device)
    rows = [np.arange(start, stop) for start, stop in zip(examples.starts, examples.stops, strict=True)]
    for rule in (
        SGD(learning_rate=0.01, momentum=0.5, batch_size=3, epochs=1),
        SGD(learning_rate=0.01, batch_size=3, epochs=1),
    ):
        steps = [[own[each] for each in rule.steps_of(len(own), seed)] for seed, own in enumerate(rows)]
        generators = [torch.Generator().manual_seed(torch_seed(seed)) for seed in range(2)]
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            together = train_chunk(replicas, rule, params_D, examples, steps, generators)[0].stack()
            if not torch.equal(before, torch.get_rng_state()):
                return "it draws random numbers elsewhere than in torch.nn.Dropout"
        alone = torch.from_numpy(
            np.stack(
                [
                    rule.train(module, start_D, examples.x[own], examples.y[own], seed, learning_task=examples.task)[0]
                    for seed, own in enumerate(rows)
                ]
            )
        ).to(params_D.device)
        allowed = 1e-3 * alone.abs().max() + 1e-6 * params_D.abs().max()
        error = (together - alone).abs().max()
        if not error <= allowed:
            return f"its updates differ by {error:.2g} from those of clients that train alone"
    return None
