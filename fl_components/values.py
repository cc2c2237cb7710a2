"""The values that travel between the stages of a round. All frozen; a stage takes values and returns new ones.

Arrays carry their shape in their name: N clients of a cohort, D trainable parameters.
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
    """What one client is asked to do.

    Args:
      client_id, index: its name, and its row in the table of clients.
      num_examples: how many training examples it has.
      seed: of its own draws.
      key: the client's own secret of the round (32 bytes), where it makes a claim about each of its examples: batches
        and noise are drawn from it.
      work: after how many epochs (or steps) a simulated straggler stops; None for a client that does them all.
    """

    client_id: str
    index: int
    num_examples: int
    seed: int
    key: bytes | None = field(default=None, repr=False)
    work: int | None = None


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

    `base_digest` names the parameters that every update must start from; `shards` cut the cohort into what is trained
    and summed together, `waves` into whole shards that fit the memory budget; `collection` is the number of this
    round's reservation in the ledger (0 until authorised). `clipping_norm` is that of this round, under a privacy
    claim. `excluded` are clients that were selected and take no part, each with the reason.
    """

    run_id: str
    round: int
    base_digest: str
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
    """One wave's updates as the clients computed them, float32 [N, D], and each one's training loss.

    `absent` are the selected clients from which no update came, each with the reason.
    """

    client_ids: tuple[str, ...]
    deltas_ND: Float32
    losses: tuple[Weighted, ...]
    download_bytes: int = 0
    absent: Mapping[str, Rejection] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """One wave's updates as they travel: one frame of bytes per client.

    `error` is the squared norm of what compression lost over that of what was compressed, of all or of a few of the
    clients; `residuals_ND` is what each of them keeps to add to its next update, with error feedback.
    """

    client_ids: tuple[str, ...]
    frames: tuple[bytes, ...]
    losses: tuple[Weighted, ...]
    download_bytes: int = 0
    absent: Mapping[str, Rejection] = field(default_factory=dict)
    error: Weighted = field(default_factory=Weighted)
    residuals_ND: Float32 | None = None


@dataclass(frozen=True, slots=True)
class Accumulator:
    """What an aggregation rule keeps of the updates seen so far: its own tensors, and how many updates they hold."""

    tensors: Tensors
    count: int = 0

    def __add__(self, other: Accumulator) -> Accumulator:
        tensors = {name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}
        return Accumulator(tensors, self.count + other.count)


@dataclass(frozen=True, slots=True)
class UpdateSum:
    """One wave's updates, checked and added up where they were made, so that N x D never exists.

    `loss` is that of the updates in the sum; `rejected` are those that were left out of it, `absent` the clients from
    which no update came, each with the reason. `frames` are updates as they would travel, each with how many there are
    of that length: none before the compress stage.
    """

    client_ids: tuple[str, ...]
    partial: Accumulator
    loss: Weighted
    download_bytes: int = 0
    rejected: Mapping[str, Rejection] = field(default_factory=dict)
    absent: Mapping[str, Rejection] = field(default_factory=dict)
    frames: tuple[tuple[bytes, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CohortResult:
    """The outcome of a round's collection, which the seal makes durable: all that the rest of the round needs.

    `client_states` holds the keys of what clients keep for their next round, by client. `largest_bytes` is the length
    of the longest update, `slowest_s` the simulated time of the slowest client.
    """

    partial: Accumulator
    train_loss: Weighted = field(default_factory=Weighted)
    compression_error: Weighted = field(default_factory=Weighted)
    client_states: Mapping[str, str] = field(default_factory=dict)
    selected: int = 0
    rejected: Mapping[str, Rejection] = field(default_factory=dict)  # by client id
    upload_bytes: int = 0
    download_bytes: int = 0
    largest_bytes: int = 0
    slowest_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return pack(
            self.partial.tensors,
            {
                "count": self.partial.count,
                "train_loss": [self.train_loss.total, self.train_loss.weight],
                "compression_error": [self.compression_error.total, self.compression_error.weight],
                "rejected": {client_id: [each.code, each.detail] for client_id, each in self.rejected.items()},
                **{name: getattr(self, name) for name in _PLAIN_OF_COLLECTED},
            },
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> CohortResult:
        tensors, header = unpack(data)
        return cls(
            partial=Accumulator(tensors, header["count"]),
            train_loss=Weighted(*header["train_loss"]),
            compression_error=Weighted(*header["compression_error"]),
            rejected={
                client_id: Rejection(RejectionCode(code), detail)
                for client_id, (code, detail) in header["rejected"].items()
            },
            **{name: header[name] for name in _PLAIN_OF_COLLECTED},
        )


_PLAIN_OF_COLLECTED: Final = (
    "client_states",
    "selected",
    "upload_bytes",
    "download_bytes",
    "largest_bytes",
    "slowest_s",
    "seconds",
)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The whole state of a federation after `round` rounds: the checkpoint is this one value.

    `broadcast` is what clients hold of the parameters, where these travel as differences.

    >>> state = ServerState(0, np.zeros(3, np.float32), {"m": np.ones(3, np.float32)}, "ab12")
    >>> ServerState.from_bytes(state.to_bytes()).server_optimizer["m"]
    array([1., 1., 1.], dtype=float32)
    """

    round: int
    params_D: Float32
    server_optimizer: Tensors
    config_digest: str
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


_PARTS_OF_STATE: Final = ("server_optimizer", "clipping", "broadcast")


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
