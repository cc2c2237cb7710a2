"""Updates to frames and back, many at a time: what the stages `compress` and `admit` do with a wave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final, Literal

import numpy as np

from fedrounds.fl_components.arrays import Float32, Payload, Tensors, params_digest
from fedrounds.fl_components.compression import Broadcast, CodecContext, CompressionRule
from fedrounds.fl_components.errors import UpdateRejected, WireError
from fedrounds.fl_components.executors import RowMapper, map_inline
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.shared_memory import keep_freed_memory
from fedrounds.fl_components.values import ClientTask, RoundPlan, Weighted
from fedrounds.fl_components.wire import (
    Download,
    Update,
    decode_params,
    decode_update,
    encode_params,
    encode_update,
    max_update_bytes,
)

FLOATS_AT_ONCE: Final = 250_000
"""The numbers of updates that are compressed together: what stays in a processor's cache."""

MEASURED: Final = 8
"""Of a cohort, the updates of which it is measured what compression lost, where they need not all be decoded."""

RejectionOfNorm = Callable[[float], Rejection | None]
"""Why an update of this L2 norm does not count, if so."""


def admit_all(_: float) -> None:
    """Reject no norm: what is clipped counts whatever its norm is."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression rule with what both ends know of a round.

    Args:
      round_seed: of the draws that all clients share.
      shapes: of the model's parameters.

    `map_rows` says where the work is done; what comes out does not depend on it.
    """

    rule: CompressionRule
    round_seed: int
    shapes: Sequence[Sequence[int]]

    def known(self, tasks: Sequence[ClientTask]) -> CodecContext:
        """What both ends know of these clients' updates."""
        return CodecContext([task.seed for task in tasks], self.round_seed, self.shapes)

    @property
    def num_parameters(self) -> int:
        return self.known([]).num_parameters

    @property
    def block_rows(self) -> int:
        """How many updates are worked on together."""
        return max(1, FLOATS_AT_ONCE // self.num_parameters)

    def encode(
        self,
        plan: RoundPlan,
        tasks: Sequence[ClientTask],
        deltas_ND: Float32,
        residuals_ND: Float32 | None = None,
        map_rows: RowMapper = map_inline,
    ) -> tuple[tuple[bytes, ...], Weighted, Float32 | None]:
        """The frames [N] of updates, what compression lost of all or some of them, and what is lost of each where
        `residuals_ND`, what was lost before, is added to them first (error feedback)."""
        keeps = residuals_ND is not None
        if residuals_ND is not None:
            deltas_ND = deltas_ND + residuals_ND  # in whose place what is lost will be
        first = () if self.rule.transparent else plan.cohort[:MEASURED]
        is_measured_N = [keeps or task in first for task in tasks]
        encode = partial(self._encode, plan.base_digest, keeps)
        frames: list[bytes] = []
        error = Weighted()
        map_rows = map_inline if self.rule.transparent else map_rows  # whole updates: a copy here, two on the way
        access: Literal["r", "r+"] = "r+" if keeps else "r"
        for encoded, lost in map_rows(
            encode, deltas_ND, tasks, is_measured_N, block_rows=self.block_rows, access=access
        ):
            frames += encoded
            error = sum(lost, error)
        return tuple(frames), error, deltas_ND if keeps else None

    def _encode(
        self,
        base_digest: str,
        keeps: bool,
        deltas_ND: Float32,
        tasks: Sequence[ClientTask],
        is_measured_N: Sequence[bool],
    ) -> tuple[list[bytes], list[Weighted]]:
        """Return the frames of updates, and what is lost of those that are measured, the first; `keeps`: in their
        place."""
        keep_freed_memory()
        measured = sum(is_measured_N)
        frames: list[bytes] = []
        errors: list[Weighted] = []
        for rows in self._units(len(tasks)):
            own_ND, known = deltas_ND[rows], self.known(tasks[rows])
            payloads = self.rule.compress(own_ND, known)
            few = min(len(payloads), measured - rows.start)
            if few > 0:
                loss_ND = own_ND[:few] - self.rule.decompress(payloads[:few], known.of(range(few)))
                errors.append(Weighted(_squares(loss_ND), _squares(own_ND[:few])))
                if keeps:
                    own_ND[:] = loss_ND
            frames += [
                encode_update(Update(task.client_id, base_digest, payload))
                for task, payload in zip(tasks[rows], payloads, strict=True)
            ]
        return frames, errors

    def decode(
        self,
        plan: RoundPlan,
        tasks: Sequence[ClientTask],
        frames: Sequence[bytes],
        rejection: RejectionOfNorm,
        map_rows: RowMapper = map_inline,
    ) -> tuple[Float32, dict[int, Rejection]]:
        """The updates [N, D] in frames that these clients sent, and why those at some places do not count.

        `rejection` says so of an update's L2 norm (not_finite, norm_too_large). Other codes are too_large, undecodable,
        wrong_client, stale_base, wrong_tensors and wrong_shape; such an update is zeros.
        """
        deltas_ND = np.empty((len(frames), self.num_parameters), np.float32)
        map_rows = map_inline if self.rule.transparent else map_rows
        decode = partial(self._decode, plan.base_digest, rejection)
        blocks = map_rows(decode, deltas_ND, tasks, frames, block_rows=self.block_rows, access="w")
        return deltas_ND, {place: reason for place, reason in enumerate(chain(*blocks)) if reason is not None}

    def _decode(
        self,
        base_digest: str,
        rejection: RejectionOfNorm,
        deltas_ND: Float32,
        tasks: Sequence[ClientTask],
        frames: Sequence[bytes],
    ) -> list[Rejection | None]:
        """Why each of the updates does not count, if so; they are in `deltas_ND` then."""
        keep_freed_memory()
        reasons: list[Rejection | None] = [None] * len(frames)
        for rows in self._units(len(frames)):
            payloads: dict[int, Payload] = {}
            for place in range(rows.start, rows.stop):
                try:
                    payloads[place] = self._checked(base_digest, tasks[place], frames[place])
                except UpdateRejected as rejected:
                    reasons[place], deltas_ND[place] = rejected.rejection, 0
            places = list(payloads)
            if places:
                known = self.known([tasks[place] for place in places])
                deltas_ND[places] = self.rule.decompress(list(payloads.values()), known)
            for place in places:
                if rejection(_norm_bound(deltas_ND[place])) is not None:
                    reasons[place] = rejection(math.sqrt(_squares(deltas_ND[place])))
        return reasons

    def _units(self, num_updates: int) -> list[slice]:
        return [
            slice(start, min(num_updates, start + self.block_rows)) for start in range(0, num_updates, self.block_rows)
        ]

    def _checked(self, base_digest: str, task: ClientTask, frame: bytes) -> Payload:
        """What this client sent, before it is decompressed. Raises `UpdateRejected`."""
        update = decode_update(frame, max_update_bytes(self.num_parameters))
        if update.client_id != task.client_id:
            # What a client wrote is shown escaped and cut: the reason is kept, logged and printed.
            named = f"{update.client_id[:100]!a}"
            detail = f"{task.client_id} sent an update in the name of {named}"
            raise UpdateRejected(Rejection(RejectionCode.WRONG_CLIENT, detail))
        if not base_digest.startswith(update.base_digest):  # the first 16 digits of its base, all that travels
            detail = f"starts from {update.base_digest!r}, not from {base_digest[:16]!r}"
            raise UpdateRejected(Rejection(RejectionCode.STALE_BASE, detail))
        self.rule.check(update.parts, self.known([task]))
        return update.parts


@dataclass(frozen=True, slots=True, eq=False)
class EncodedBroadcast:
    """The server's parameters as they travel: the frame, what it decodes to (float32 [D]: every client's base, bit for
    bit the same) with its digest, and what clients hold after it."""

    frame: bytes
    params_D: Float32
    digest: str
    held: Tensors


def send(rule: Broadcast, params_D: Float32, held: Tensors, known: CodecContext) -> EncodedBroadcast:
    """`params_D` by this rule, to clients that hold `held`."""
    base_D = rule.base(held.get("params"))
    payload = rule.compress(params_D, base_D, known)
    digest = params_digest(rule.decompress(payload, base_D, known))
    against = params_digest(base_D) if base_D is not None else None
    frame = encode_params(Download(digest, against, payload))
    decoded_D = receive(rule, frame, base_D, known)
    return EncodedBroadcast(frame, decoded_D, digest, {"params": decoded_D} if rule.against == "previous" else {})


def receive(rule: Broadcast, frame: bytes, held_D: Float32 | None, known: CodecContext) -> Float32:
    """What a client that holds `held_D` makes of the server's frame, float32 [D].

    Raises:
      WireError: it is no frame of parameters, is a difference from others than the client holds, or does not come to
        the parameters that it names: then the client fetches them whole.
      UpdateRejected: its parts stand for no parameters.
    """
    download = decode_params(frame, known.num_parameters)
    if download.against is None:
        held_D = None
    elif held_D is None or not params_digest(held_D).startswith(download.against):
        raise WireError(f"the parameters are a difference from {download.against}, which is not held")
    params_D = rule.decompress(download.parts, held_D, known)
    if not params_digest(params_D).startswith(download.digest):
        raise WireError(f"the parameters should come to {download.digest}, and come to {params_digest(params_D)[:16]}")
    return params_D


def expected_bytes(federation: Federation) -> dict[str, int]:
    """What a run would send: the lengths of frames that hold normal numbers, as large in each layer as the model's
    initial parameters are, for its expected cohorts and its rounds. Real updates may be coded shorter or longer."""
    config, initial_D = federation.config, federation.initial_params_D
    known = CodecContext([0], 0, federation.shapes)
    sizes = [math.prod(shape) for shape in federation.shapes]
    layers = np.split(initial_D, np.cumsum(sizes)[:-1])
    deviation_D = np.concatenate([np.full(len(layer), layer.std() or initial_D.std() or 1.0) for layer in layers])
    numbers_D = (deviation_D * np.random.default_rng(0).standard_normal(len(initial_D))).astype(np.float32)
    (payload,) = config.compression.compress(numbers_D[None], known)
    update = encode_update(Update(federation.data.client_ids[0], "0" * 64, payload))
    whole, later = (
        len(send(config.broadcast, numbers_D, held, known).frame) for held in ({}, {"params": 0 * numbers_D})
    )
    cohort = federation.sampling.cohort_size
    return {
        "upload_bytes": round(len(update) * cohort * config.rounds),
        "download_bytes": round((whole + later * (config.rounds - 1)) * cohort),
    }


def _squares(values: Float32) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _norm_bound(delta_D: Float32) -> float:
    """What the L2 norm is not above, in an eighth of the time; infinite or NaN where the update or its squares are."""
    with np.errstate(all="ignore"):
        squares = float(delta_D @ delta_D)
    # Rounding takes less than D 2^-24 of a sum of D positive numbers away (Higham 2002, section 3.1), and a square
    # that is too small for a float32 is smaller than this.
    underflow = len(delta_D) * float(np.finfo(np.float32).smallest_normal)
    shortfall = len(delta_D) * 2.0**-24
    return math.sqrt((squares + underflow) / (1 - shortfall)) if shortfall < 0.5 else math.inf
