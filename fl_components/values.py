"""The values that travel between the stages of a round. All frozen; a stage takes values and returns new ones.

Arrays carry their shape in their name: N clients of a cohort, D trainable parameters, M coordinates of an update.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedrounds.fl_components.arrays import Float32, Tensors, params_digest
from fedrounds.fl_components.errors import StoreError
from fedrounds.fl_components.rejections import Rejection, RejectionCode


@dataclass(frozen=True, slots=True)
class ClientTask:
    """What one client is asked to do in a round; part of the plan.

    Args:
      client_id, index: its name, and its place in the table of clients.
      num_examples: how many training examples it has.
      seed: of its public draws.
      work: the epochs (or steps) after which a simulated straggler stops; None for a client that does them all.
    """

    client_id: str
    index: int
    num_examples: int
    seed: int
    work: int | None = None


@dataclass(frozen=True, slots=True)
class SimulatedClient(ClientTask):
    """A task with what its client holds itself, where clients are simulated. It is no part of the plan.

    Args:
      key: the client's secret of the round (32 bytes), where it makes a claim about each of its examples: batches and
        noise are drawn from it.
      kept: the channels of the objective that the client keeps from round to round, float32 [D] each.
    """

    key: bytes | None = field(default=None, repr=False)
    kept: Mapping[str, Float32] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, task: ClientTask, key: bytes | None = None, kept: Mapping[str, Float32] | None = None
    ) -> SimulatedClient:
        """Return the client of a task."""
        return cls(task.client_id, task.index, task.num_examples, task.seed, task.work, key, kept or {})


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a cohort is drawn from `population_size` clients, as far as a privacy claim may lean on it.

    "poisson": each by a coin of its own, with `rate` for heads; "fixed_size": each set of `cohort_size` equally likely;
    "everyone": all of them; "other": in a way that no claim leans on. `cohort_size` is the expected one.
    """

    kind: Literal["poisson", "fixed_size", "everyone", "other"]
    population_size: int
    cohort_size: float
    rate: float


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """All that is decided about a round before any client is contacted.

    `base_digest` names the parameters that every update must start from, `download_bytes` is the length of the frame in
    which a client receives them; `shards` cut the cohort into what is trained
    and summed together, `waves` into whole shards that fit the memory budget; `collection` is the number of this
    round's reservation in the ledger (0 until authorised). `clipping_norm` is that of this round, under a privacy
    claim. `excluded` are clients that were selected and take no part, each with the reason.
    """

    run_id: str
    round: int
    base_digest: str
    download_bytes: int
    cohort: tuple[ClientTask, ...]
    shards: tuple[slice, ...]
    waves: tuple[slice, ...]
    min_updates: int
    clipping_norm: float | None = None
    collection: int = 0
    excluded: Mapping[str, Rejection] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A mean that adds: `total` over `weight`.

    >>> (Weighted(3.0, 2.0) + Weighted(1.0, 2.0)).mean
    1.0
    """

    total: float = 0.0
    weight: float = 0.0

    def __add__(self, other: Weighted) -> Weighted:
        return Weighted(self.total + other.total, self.weight + other.weight)

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else float("nan")


@dataclass(frozen=True, slots=True)
class UpdateBatch:
    """The updates of one wave as the clients computed them, float32 [N, M], and each one's training loss.

    `absent` are the selected clients that sent no update, each with the reason.
    """

    client_ids: tuple[str, ...]
    updates_NM: Float32
    losses: tuple[Weighted, ...]
    absent: Mapping[str, Rejection] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The updates of one wave as they travel: one frame of bytes for each client.

    `error` is the squared norm of what compression lost over that of what was compressed, of all or of some of the
    clients; `client_states` is what each client keeps for its next round, where clients keep something.
    """

    client_ids: tuple[str, ...]
    frames: tuple[bytes, ...]
    losses: tuple[Weighted, ...]
    absent: Mapping[str, Rejection] = field(default_factory=dict)
    error: Weighted = field(default_factory=Weighted)
    client_states: tuple[Tensors, ...] = ()


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A running sum of updates: the tensors of a linear aggregator, and how many updates they hold."""

    tensors: Tensors
    count: int = 0

    def __add__(self, other: Accumulator) -> Accumulator:
        tensors = {name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}
        return Accumulator(tensors, self.count + other.count)


@dataclass(frozen=True, slots=True)
class UpdateSum:
    """The updates of one wave, admitted and summed where they were computed, so that no array [N, M] exists.

    `loss` is that of the updates in the sum; `rejected` are those that were left out of it, `absent` the clients that
    sent no update, each with the reason. `frame_bytes` are the lengths of the frames [N] in which the updates would
    travel, in the order of `client_ids`: empty before the stage `compress`.
    """

    client_ids: tuple[str, ...]
    total: Accumulator
    loss: Weighted
    rejected: Mapping[str, Rejection] = field(default_factory=dict)
    absent: Mapping[str, Rejection] = field(default_factory=dict)
    frame_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CohortStatistics:
    """What a round's collection came to, besides the updates.

    Args:
      selected, received: how many clients were selected, and how many updates were admitted.
      rejected: the clients whose updates do not count, each with the reason.
      client_states: the keys of what clients keep for their next round, by client.
      upload_bytes, download_bytes, largest_bytes: of all updates, of all broadcasts, and of the longest update.
      slowest_s: the simulated time of the slowest client.
      metrics: what the aggregator measured.
      seconds: spent in each stage until the seal.
    """

    selected: int = 0
    received: int = 0
    rejected: Mapping[str, Rejection] = field(default_factory=dict)
    train_loss: Weighted = field(default_factory=Weighted)
    compression_error: Weighted = field(default_factory=Weighted)
    client_states: Mapping[str, str] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0
    largest_bytes: int = 0
    slowest_s: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_header(self) -> dict[str, Any]:
        """Return the statistics as JSON values."""
        return {
            **{name: getattr(self, name) for name in _PLAIN_STATISTICS},
            **{name: [getattr(self, name).total, getattr(self, name).weight] for name in _WEIGHTED_STATISTICS},
            "rejected": {client_id: [reason.code, reason.detail] for client_id, reason in self.rejected.items()},
        }

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> CohortStatistics:
        """Return the statistics that `to_header` wrote."""
        rejected = {
            client_id: Rejection(RejectionCode(code), detail)
            for client_id, (code, detail) in header["rejected"].items()
        }
        weighted: dict[str, Any] = {name: Weighted(*header[name]) for name in _WEIGHTED_STATISTICS}
        return cls(**{name: header[name] for name in _PLAIN_STATISTICS}, **weighted, rejected=rejected)


_PLAIN_STATISTICS: Final = (
    "selected",
    "received",
    "client_states",
    "upload_bytes",
    "download_bytes",
    "largest_bytes",
    "slowest_s",
    "metrics",
    "seconds",
)
_WEIGHTED_STATISTICS: Final = ("train_loss", "compression_error")


@dataclass(frozen=True, slots=True)
class SealedCohort:
    """The outcome of a round's collection, which the seal makes durable: all that the rest of the round needs.

    `tensors` hold the exact sum of the contributions (`sum`) under a claim, on which noise is drawn after the seal;
    otherwise the aggregate (`aggregate`) and the aggregator's new state (`state.NAME`).
    """

    tensors: Tensors
    statistics: CohortStatistics = field(default_factory=CohortStatistics)

    @property
    def aggregator_state(self) -> Tensors:
        """The aggregator's new state."""
        return _part(self.tensors, "state")

    def to_bytes(self) -> bytes:
        """Return the value as one safetensors file."""
        return pack(self.tensors, self.statistics.to_header())

    @classmethod
    def from_bytes(cls, data: bytes) -> SealedCohort:
        """Return the value that `to_bytes` wrote. Raises `StoreError` where it is none."""
        tensors, header = unpack(data)
        return cls(tensors, CohortStatistics.from_header(header))


@dataclass(frozen=True, slots=True)
class ServerState:
    """The whole state of a federation after `round` rounds: the checkpoint is this one value.

    `aggregator` is the aggregator's state; `channels` are what the server sends besides the parameters; `broadcast` is
    what clients hold, where the parameters travel as differences.

    >>> state = ServerState(0, np.zeros(3, np.float32), {"m": np.ones(3, np.float32)}, "ab12")
    >>> ServerState.from_bytes(state.to_bytes()).server_optimizer["m"]
    array([1., 1., 1.], dtype=float32)
    """

    round: int
    params_D: Float32
    server_optimizer: Tensors
    config_digest: str
    aggregator: Tensors = field(default_factory=dict)
    channels: Tensors = field(default_factory=dict)
    clipping: Tensors = field(default_factory=dict)
    broadcast: Tensors = field(default_factory=dict)

    @property
    def params_digest(self) -> str:
        return params_digest(self.params_D)

    def to_bytes(self) -> bytes:
        tensors = _flat({name: getattr(self, name) for name in _PARTS_OF_STATE})
        return pack({"params": self.params_D, **tensors}, {"round": self.round, "config_digest": self.config_digest})

    @classmethod
    def from_bytes(cls, data: bytes) -> ServerState:
        tensors, header = unpack(data)
        return cls(
            round=header["round"],
            params_D=tensors["params"],
            config_digest=header["config_digest"],
            **{name: _part(tensors, name) for name in _PARTS_OF_STATE},
        )


_PARTS_OF_STATE: Final = ("server_optimizer", "aggregator", "channels", "clipping", "broadcast")


def _flat(parts: Mapping[str, Tensors]) -> Tensors:
    """Tensors of several parts, each named by its part and its name there."""
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _part(tensors: Tensors, part: str) -> Tensors:
    """Those of one part, by their names there."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A committed round as people and trackers see it; `metrics` are grouped by slash (`eval/accuracy`)."""

    round: int
    params_digest: str
    metrics: Mapping[str, float]
    rejected: Mapping[str, int]  # reason -> how many
    seconds: Mapping[str, float]
    left_out: Sequence[str] = ()  # the clients whose budgets were spent
    withheld: Mapping[str, Any] = field(
        default_factory=dict, compare=False
    )  # no view gets it; not kept with the others


def pack(tensors: Tensors, header: Mapping[str, Any]) -> bytes:
    """Tensors and a small JSON header as one safetensors file; equal values give equal bytes.

    The header is one canonical string under one key, since safetensors keeps several keys in no fixed order.
    """
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save(contiguous, {"fedrounds": json.dumps(header, sort_keys=True, separators=(",", ":"))})


def unpack(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The inverse of `pack`. Raises `StoreError` when `data` is not such a file."""
    try:
        tensors, header = load(data), json.loads(read_metadata(data)["fedrounds"])
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:  # RecursionError: a deeply nested header
        raise StoreError(f"not a checkpoint of fedrounds: {error}") from error
    if not isinstance(header, dict):
        raise StoreError(f"not a checkpoint of fedrounds: its header is a {type(header).__name__}")
    return tensors, header


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file held in memory (its layout: 8 bytes of length, then a JSON header)."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}
