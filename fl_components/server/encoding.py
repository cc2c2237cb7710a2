"""Updates to frames and back, many at a time: what the stages `compress` and `admit` do with a wave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final, Literal

import numpy as np

from fedrounds.fl_components.admission import RoundAdmission
from fedrounds.fl_components.arrays import Float32, Payload
from fedrounds.fl_components.client import encode_updates, squared_norm
from fedrounds.fl_components.compression import CodecContext, CompressionRule
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.executors import RowMapper, map_inline
from fedrounds.fl_components.layout import Layout
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.server.broadcast import encode_broadcast
from fedrounds.fl_components.server.federation import Federation
from fedrounds.fl_components.shared_memory import keep_freed_memory
from fedrounds.fl_components.values import ClientTask, RoundPlan, Weighted
from fedrounds.fl_components.wire import Update, decode_update, encode_update, max_update_bytes, raw_update_bytes

FLOATS_AT_ONCE: Final = 250_000
"""The numbers of updates that are compressed together: what stays in a processor's cache."""

MEASURED: Final = 8
"""Of a cohort, the updates of which it is measured what compression lost, where they need not all be decoded."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression rule with what both ends know of a round.

    Args:
      round_seed: of the draws that all clients share.
      layout: of the updates.

    A `RowMapper` says where the work is done; the results do not depend on it.
    """

    rule: CompressionRule
    round_seed: int
    layout: Layout

    def context(self, tasks: Sequence[ClientTask]) -> CodecContext:
        """Return what both ends know of these clients' updates."""
        return CodecContext([task.seed for task in tasks], self.round_seed, self.layout.shapes)

    @property
    def block_rows(self) -> int:
        """The number of updates that are worked on together."""
        return max(1, FLOATS_AT_ONCE // self.layout.size)

    def fixed_update_bytes(self, client_id: str) -> int:
        """Return the length of a client's frame, under a rule whose frames all have the same length."""
        if not self.rule.is_identity:
            raise ValueError(f"the frames of compression.kind {self.rule.kind} have different lengths")
        return raw_update_bytes(client_id, self.layout.channels, self.layout.size)

    def encode(
        self,
        plan: RoundPlan,
        tasks: Sequence[ClientTask],
        updates_NM: Float32,
        residuals_NM: Float32 | None = None,
        map_rows: RowMapper = map_inline,
    ) -> tuple[tuple[bytes, ...], Weighted, Float32 | None]:
        """Return the frames [N] of updates, what compression lost of all or some of them, and the new residuals.

        Args:
          residuals_NM: what was lost of each client's earlier updates, which is added to the update first (error
            feedback).
        """
        keeps = residuals_NM is not None
        if residuals_NM is not None:
            updates_NM = updates_NM + residuals_NM  # the residuals will take the place of the sum
        first = () if self.rule.is_identity else plan.cohort[:MEASURED]
        is_measured_N = [keeps or task in first for task in tasks]
        encode = partial(self._encode, plan.base_digest, keeps)
        frames: list[bytes] = []
        error = Weighted()
        map_rows = map_inline if self.rule.is_identity else map_rows  # whole updates: a copy here, two on the way
        access: Literal["r", "r+"] = "r+" if keeps else "r"
        for block_frames, lost in map_rows(
            encode, updates_NM, tasks, is_measured_N, block_rows=self.block_rows, access=access
        ):
            frames += block_frames
            error = sum(lost, error)
        return tuple(frames), error, updates_NM if keeps else None

    def _encode(
        self,
        base_digest: str,
        keeps: bool,
        updates_NM: Float32,
        tasks: Sequence[ClientTask],
        is_measured_N: Sequence[bool],
    ) -> tuple[list[bytes], list[Weighted]]:
        keep_freed_memory()
        frames: list[bytes] = []
        errors: list[Weighted] = []
        for rows in self._blocks(len(tasks)):
            block_tasks = tasks[rows]
            block_frames, lost = encode_updates(
                self.rule,
                [task.client_id for task in block_tasks],
                self.layout.channels,
                base_digest,
                updates_NM[rows],
                self.context(block_tasks),
                num_measured=sum(is_measured_N[rows]),
                keep_residuals=keeps,
            )
            frames += block_frames
            errors += lost
        return frames, errors

    def decode(
        self,
        plan: RoundPlan,
        tasks: Sequence[ClientTask],
        frames: Sequence[bytes],
        admission: RoundAdmission,
        map_rows: RowMapper = map_inline,
    ) -> tuple[Float32, dict[int, Rejection]]:
        """Return the updates [N, M] in frames that these clients sent, and by place why some do not count.

        A frame is rejected as too_large, undecodable, wrong_client, stale_base, wrong_tensors or wrong_shape, an update
        as `admission` says (not_finite, norm_too_large). A rejected update is zeros.
        """
        updates_NM = np.empty((len(frames), self.layout.size), np.float32)
        map_rows = map_inline if self.rule.is_identity else map_rows
        decode = partial(self._decode, plan.base_digest, admission)
        blocks = map_rows(decode, updates_NM, tasks, frames, block_rows=self.block_rows, access="w")
        return updates_NM, {place: reason for place, reason in enumerate(chain(*blocks)) if reason is not None}

    def _decode(
        self,
        base_digest: str,
        admission: RoundAdmission,
        updates_NM: Float32,
        tasks: Sequence[ClientTask],
        frames: Sequence[bytes],
    ) -> list[Rejection | None]:
        """Decode the updates into `updates_NM`, and return why each of them does not count, if so."""
        keep_freed_memory()
        reasons: list[Rejection | None] = [None] * len(frames)
        for rows in self._blocks(len(frames)):
            payloads: dict[int, Payload] = {}
            for place in range(rows.start, rows.stop):
                try:
                    payloads[place] = self._payload(base_digest, tasks[place], frames[place])
                except UpdateRejected as rejected:
                    reasons[place], updates_NM[place] = rejected.rejection, 0
            places = list(payloads)
            if places:
                context = self.context([tasks[place] for place in places])
                updates_NM[places] = self.rule.decompress(list(payloads.values()), context)
            for place in places:
                if admission.rejection(_norm_bound(updates_NM[place])) is not None:
                    reasons[place] = admission.rejection(math.sqrt(squared_norm(updates_NM[place])))
        return reasons

    def _blocks(self, num_updates: int) -> list[slice]:
        size = self.block_rows
        return [slice(start, min(num_updates, start + size)) for start in range(0, num_updates, size)]

    def _payload(self, base_digest: str, task: ClientTask, frame: bytes) -> Payload:
        """Return the compressed update in a frame of this client. Raises `UpdateRejected`."""
        update = decode_update(frame, max_update_bytes(self.layout.size))
        if update.client_id != task.client_id:
            # What a client wrote is shown escaped and cut: the reason is kept, logged and printed.
            detail = f"{task.client_id} sent an update in the name of {update.client_id[:100]!a}"
            raise UpdateRejected(Rejection(RejectionCode.WRONG_CLIENT, detail))
        if not base_digest.startswith(update.base_digest):  # the first 16 digits of its base, all that travels
            detail = f"starts from {update.base_digest!r}, not from {base_digest[:16]!r}"
            raise UpdateRejected(Rejection(RejectionCode.STALE_BASE, detail))
        if update.channels != self.layout.channels:
            detail = f"has the channels {', '.join(update.channels)}, not {', '.join(self.layout.channels)}"
            raise UpdateRejected(Rejection(RejectionCode.WRONG_TENSORS, detail))
        self.rule.check(update.parts, self.context([task]))
        return update.parts


def expected_bytes(federation: Federation) -> dict[str, int]:
    """What a run would send: the lengths of frames that hold normal numbers, as large in each layer as the model's
    initial parameters are, for its expected cohorts and its rounds. Real updates may be coded shorter or longer."""
    config, initial_D = federation.config, federation.initial_params_D
    sent, received = federation.update_layout, federation.broadcast_layout
    sizes = [math.prod(shape) for shape in sent.parameter_shapes]
    layers = np.split(initial_D, np.cumsum(sizes)[:-1])
    deviation_D = np.concatenate([np.full(len(layer), layer.std() or initial_D.std() or 1.0) for layer in layers])
    numbers_D = (deviation_D * np.random.default_rng(0).standard_normal(len(initial_D))).astype(np.float32)
    numbers_M = np.tile(numbers_D, len(sent.channels))
    (payload,) = config.compression.compress(numbers_M[None], CodecContext([0], 0, sent.shapes))
    update = encode_update(Update(federation.population.client_ids[0], "0" * 64, sent.channels, payload))
    whole, later = (
        len(
            encode_broadcast(
                config.broadcast, received.channels, numbers_M, held, CodecContext([0], 0, received.shapes)
            ).frame
        )
        for held in ({}, {"base": 0 * numbers_M})
    )
    cohort = federation.sampling.cohort_size
    return {
        "upload_bytes": round(len(update) * cohort * config.rounds),
        "download_bytes": round((whole + later * (config.rounds - 1)) * cohort),
    }


def _norm_bound(update_M: Float32) -> float:
    """What the L2 norm is not above, in an eighth of the time; infinite or NaN where the update or its squares are."""
    with np.errstate(all="ignore"):
        squares = float(update_M @ update_M)
    # Rounding takes less than M 2^-24 of a sum of M positive numbers away (Higham 2002, section 3.1), and a square
    # that is too small for a float32 is smaller than this.
    underflow = len(update_M) * float(np.finfo(np.float32).smallest_normal)
    shortfall = len(update_M) * 2.0**-24
    return math.sqrt((squares + underflow) / (1 - shortfall)) if shortfall < 0.5 else math.inf
