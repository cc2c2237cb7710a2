"""Updates to frames and back, many at a time: what the stages `compress` and `admit` do with a wave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch

from fl_components.compression import Broadcast, CompressionRule, Known
from fl_components.errors import UpdateRejected, WireError
from fl_components.parameters import params_digest
from fl_components.server.federation import Federation
from fl_components.shared_memory import keep_freed_memory
from fl_components.values import ClientTask, Float32, Payload, RoundPlan, Tensors, Weighted
from fl_components.wire import (
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Codec:
    """A compression rule with what both ends know of a round.

    Args:
      round_seed: of the draws that all clients share.
      shapes: of the model's parameters.
      threads: how many updates are worked on at a time; results do not depend on it.
    """

    rule: CompressionRule
    round_seed: int
    shapes: Sequence[Sequence[int]]
    threads: int

    def known(self, tasks: Sequence[ClientTask]) -> Known:
        """What both ends know of these clients' updates."""
        return Known([task.seed for task in tasks], self.round_seed, self.shapes)

    @property
    def num_parameters(self) -> int:
        return self.known([]).num_parameters

    def encode(
        self, plan: RoundPlan, tasks: Sequence[ClientTask], deltas_ND: Float32, memory_ND: Float32 | None = None
    ) -> tuple[tuple[bytes, ...], Weighted, Float32 | None]:
        """The frames [N] of updates, what compression lost of all or some of them, and what is lost of each where
        `memory_ND`, what was lost before, is added to them first (error feedback)."""
        if memory_ND is not None:
            deltas_ND = deltas_ND + memory_ND
        lost_ND = None if memory_ND is None else np.empty_like(deltas_ND)
        first = () if self.rule.transparent else plan.cohort[:MEASURED]

        def encode(rows: slice) -> tuple[list[bytes], Weighted]:
            own_ND, known = deltas_ND[rows], self.known(tasks[rows])
            payloads = self.rule.compress(own_ND, known)
            measured = payloads if lost_ND is not None else payloads[: sum(map(first.__contains__, tasks[rows]))]
            error = Weighted()
            if measured:
                numbers = range(len(measured))
                loss_ND = own_ND[: len(measured)] - self.rule.decompress(measured, known.of(numbers))
                error = Weighted(_squares(loss_ND), _squares(own_ND[: len(measured)]))
                if lost_ND is not None:
                    lost_ND[rows] = loss_ND
            frames = [
                encode_update(Update(task.client_id, plan.base_digest, payload))
                for task, payload in zip(tasks[rows], payloads, strict=True)
            ]
            return frames, error

        frames: list[bytes] = []
        error = Weighted()
        for some, lost in self._in_pieces(encode, len(tasks)):
            frames += some
            error += lost
        return tuple(frames), error, lost_ND

    def decode(
        self,
        plan: RoundPlan,
        tasks: Sequence[ClientTask],
        frames: Sequence[bytes],
        refusal: Callable[[float], str | None],
    ) -> tuple[Float32, dict[int, str]]:
        """The updates [N, D] in frames that these clients sent, and why those at some places do not count.

        `refusal` says so of an update's L2 norm (not_finite, norm_too_large). Other reasons begin with too_large,
        undecodable, wrong_client, stale_base, wrong_tensors or wrong_shape; such an update is zeros.
        """
        deltas_ND = np.zeros((len(frames), self.num_parameters), np.float32)

        def decode(rows: slice) -> dict[int, str]:
            payloads, reasons = {}, {}
            for place in range(rows.start, rows.stop):
                try:
                    payloads[place] = self._checked(plan, tasks[place], frames[place])
                except UpdateRejected as rejected:
                    reasons[place] = rejected.message
            places = list(payloads)
            if places:
                known = self.known([tasks[place] for place in places])
                deltas_ND[places] = self.rule.decompress(list(payloads.values()), known)
            for place in places:
                if refusal(_norm_bound(deltas_ND[place])) is not None:
                    reason = refusal(math.sqrt(_squares(deltas_ND[place])))
                    if reason is not None:
                        reasons[place] = reason
            return reasons

        refused: dict[int, str] = {}
        for reasons in self._in_pieces(decode, len(frames)):
            refused |= reasons
        return deltas_ND, refused

    def _checked(self, plan: RoundPlan, task: ClientTask, frame: bytes) -> Payload:
        """What this client sent, before it is decompressed. Raises `UpdateRejected`."""
        update = decode_update(frame, max_update_bytes(self.num_parameters))
        if update.client_id != task.client_id:
            # What a client wrote is shown escaped and cut: the reason is kept, logged and printed.
            named = f"{update.client_id[:100]!a}"
            raise UpdateRejected(f"wrong_client: {task.client_id} sent an update in the name of {named}")
        if not plan.base_digest.startswith(update.base_digest):  # the first 16 digits of its base, all that travels
            raise UpdateRejected(f"stale_base: starts from {update.base_digest!r}, not from {plan.base_digest[:16]!r}")
        self.rule.check(update.parts, self.known([task]))
        return update.parts

    def _in_pieces(self, work: Callable[[slice], T], num_updates: int) -> Iterator[T]:
        """`work` on slices of so many updates, several at a time; what it returns, in order."""
        keep_freed_memory()
        at_once = max(1, FLOATS_AT_ONCE // self.num_parameters)
        pieces = [slice(start, min(num_updates, start + at_once)) for start in range(0, num_updates, at_once)]
        threads = self.threads if self.num_parameters >= self.rule.threads_from else 1
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, pieces)


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """The server's parameters as they travel: the frame, what it decodes to (float32 [D]: every client's base, bit for
    bit the same) with its digest, and what clients hold after it."""

    frame: bytes
    params_D: Float32
    digest: str
    held: Tensors


def send(rule: Broadcast, params_D: Float32, held: Tensors, known: Known) -> Sent:
    """`params_D` by this rule, to clients that hold `held`."""
    base_D = rule.base(held.get("params"))
    payload = rule.compress(params_D, base_D, known)
    digest = params_digest(rule.decompress(payload, base_D, known))
    against = params_digest(base_D) if base_D is not None else None
    frame = encode_params(Download(digest, against, payload))
    decoded_D = receive(rule, frame, base_D, known)
    return Sent(frame, decoded_D, digest, {"params": decoded_D} if rule.against == "previous" else {})


def receive(rule: Broadcast, frame: bytes, held_D: Float32 | None, known: Known) -> Float32:
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
    known = Known([0], 0, federation.shapes)
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
