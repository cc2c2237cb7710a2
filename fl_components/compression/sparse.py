"""Some of the numbers, and where they stand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from pydantic import Field, field_validator

from fedrounds.fl_components.arrays import Float32, Indices, Int64, Payload
from fedrounds.fl_components.compression.base import CodecContext, CompressionRule, Quantiser, expect, without_memory
from fedrounds.fl_components.compression.dead_zone import DeadZone
from fedrounds.fl_components.compression.dithered import Dithered
from fedrounds.fl_components.compression.eden import Eden
from fedrounds.fl_components.compression.levels import Qsgd, Ternary, UniformQuantiser
from fedrounds.fl_components.compression.none import NoCompression
from fedrounds.fl_components.compression.sign import Sign
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.rules import union

if TYPE_CHECKING:
    Values = Quantiser
else:
    Values = union("quantisers", NoCompression, Qsgd, UniformQuantiser, Sign, Ternary, Eden, Dithered, DeadZone)

SAMPLED: Final = 64  # one of so many

FRACTION = Field(default=0.01, gt=0, le=1, description="of the numbers of an update, how many are kept")


class Sparsifier(CompressionRule):
    """Keeps the numbers at some places; `values` is the rule that says what becomes of these."""

    values: Values = Field(default=NoCompression(), description="how the numbers that are kept are written")

    @field_validator("values")
    @classmethod
    def _keeps_nothing(cls, values: Quantiser) -> Quantiser:
        return without_memory(values)

    @property
    def unbiased(self) -> bool:
        return False

    def _bound_of_kept(self, num_kept: int, num_values: int) -> float:
        """The bound of the error for the number of values that are kept, with their share of the squared norm."""
        lost = self.values.error_bound(num_kept)
        return lost if lost >= 1 else 1 - (1 - lost) * num_kept / num_values

    @abstractmethod
    def kept(self, deltas_ND: Float32, context: CodecContext) -> list[Int64]:
        """The places that are kept of each update, ascending; at least one."""

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        payloads: list[Payload] = [{} for _ in deltas_ND]
        places = self.kept(deltas_ND, context)
        for rows, some in _alike(list(map(len, places)), context):
            places_NK = np.stack([places[row] for row in rows])
            written = self.values.compress(deltas_ND[rows[:, None], places_NK], some)
            for row, places_K, values in zip(rows, places_NK, written, strict=True):
                payloads[row] = {"indices": Indices(places_K, context.num_parameters), **values}
        return payloads

    def check(self, payload: Payload, context: CodecContext) -> None:
        expect(
            {"indices": payload["indices"]} if "indices" in payload else {},
            indices=("indices", None, context.num_parameters),
        )
        num_kept = len(_places(payload))
        if not 1 <= num_kept <= context.num_parameters:
            detail = f"{num_kept} places of {context.num_parameters}"
            raise UpdateRejected(Rejection(RejectionCode.WRONG_SHAPE, detail))
        self.values.check(_values(payload), context.inside(num_kept))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        deltas_ND = np.zeros((len(payloads), context.num_parameters), np.float32)
        for rows, some in _alike([len(_places(payload)) for payload in payloads], context):
            places_NK = np.stack([_places(payloads[row]) for row in rows])
            values_NK = self.values.decompress([_values(payloads[row]) for row in rows], some)
            deltas_ND[rows[:, None], places_NK] = values_NK
        return deltas_ND


class TopK(Sparsifier):
    """The largest numbers, whatever their sign: Stich et al. 2018, "Sparsified SGD with memory"
    (https://arxiv.org/abs/1809.07599). Biased; the squared error is at most 1 - fraction of the squared norm.

    >>> rule, context = TopK(fraction=0.5), CodecContext(seeds=[0], round_seed=0, shapes=[(4,)])
    >>> rule.decompress(rule.compress(np.array([[1.0, -3.0, 0.5, 2.0]], np.float32), context), context)
    array([[ 0., -3.,  0.,  2.]], dtype=float32)
    """

    kind: Literal["top_k"] = "top_k"
    fraction: float = FRACTION

    def error_bound(self, num_values: int) -> float:
        """Stich et al. 2018, lemma A.1, and the error of `values` on the numbers that are kept."""
        return self._bound_of_kept(num_kept(self.fraction, num_values), num_values)

    def kept(self, deltas_ND: Float32, context: CodecContext) -> list[Int64]:
        count = num_kept(self.fraction, context.num_parameters)
        return [_largest(np.abs(delta_D), count) for delta_D in deltas_ND]


class Threshold(Sparsifier):
    """The numbers that are at least so large, and the largest if there is none: Sahu et al. 2021, "Rethinking gradient
    sparsification as total error minimization" (https://arxiv.org/abs/2108.00951). Biased; the squared error is at most
    D threshold^2.

    >>> rule, context = Threshold(threshold=1.0), CodecContext(seeds=[0], round_seed=0, shapes=[(4,)])
    >>> rule.decompress(rule.compress(np.array([[1.0, -3.0, 0.5, 2.0]], np.float32), context), context)
    array([[ 1., -3.,  0.,  2.]], dtype=float32)
    """

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(gt=0)

    def error_bound(self, num_values: int) -> float:
        """One number at least is kept, the largest; all may be, and `values` loses most of these."""
        lost = self.values.error_bound(num_values)
        return lost if lost >= 1 else 1 - (1 - lost) / num_values

    def kept(self, deltas_ND: Float32, context: CodecContext) -> list[Int64]:
        sizes_ND = np.abs(deltas_ND)
        large = [np.flatnonzero(~(sizes_D < self.threshold)) for sizes_D in sizes_ND]
        return [
            places_K if len(places_K) else sizes_D.argmax(keepdims=True)
            for places_K, sizes_D in zip(large, sizes_ND, strict=True)
        ]


class RandomK(Sparsifier):
    """Numbers at places that both ends draw from a seed, so that no place travels.

    Konecny et al. 2016, "Federated learning: strategies for improving communication efficiency"
    (https://arxiv.org/abs/1610.05492).

    They are multiplied by 1 / fraction, which makes it unbiased where `values` is; the mean squared error is then
    1 / fraction - 1 times the squared norm. With error feedback they stay as they are: the mean squared error is
    1 - fraction times the squared norm.
    """

    kind: Literal["random_k"] = "random_k"
    fraction: float = FRACTION
    mask: Literal["own", "shared"] = Field(
        default="own", description="whether each client draws its own places, or all of a round have the same"
    )

    @property
    def unbiased(self) -> bool:
        return not self.error_feedback and self.values.unbiased

    def error_bound(self, num_values: int) -> float:
        """Stich et al. 2018, lemma A.1.

        Multiplied by 1 / fraction, Beznosikov et al. 2020, lemma 8 and what a biased rule for `values` adds.
        """
        kept = num_kept(self.fraction, num_values)
        if self.error_feedback:
            return self._bound_of_kept(kept, num_values)
        lost, scale = self.values.error_bound(kept), num_values / kept
        if self.values.unbiased:
            return scale * (1 + lost) - 1
        return float(((scale - 1) ** 0.5 + (scale * lost) ** 0.5) ** 2)

    def kept(self, deltas_ND: Float32, context: CodecContext) -> list[Int64]:
        size = context.num_parameters
        draws = context.draws(self.kind) if self.mask == "own" else [context.common_draw(self.kind)]
        places = [
            np.sort(draw.choice(size, num_kept(self.fraction, size), replace=False, shuffle=False)) for draw in draws
        ]
        return places * (len(context.seeds) // len(places))

    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        places_NK = np.stack(self.kept(deltas_ND, context))
        values_NK = np.take_along_axis(deltas_ND, places_NK, axis=1)
        if not self.error_feedback:
            with np.errstate(over="ignore"):
                values_NK *= np.float32(context.num_parameters / places_NK.shape[1])
        return self.values.compress(values_NK, context.inside(places_NK.shape[1]))

    def check(self, payload: Payload, context: CodecContext) -> None:
        self.values.check(payload, context.inside(num_kept(self.fraction, context.num_parameters)))

    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        deltas_ND = np.zeros((len(payloads), context.num_parameters), np.float32)
        places_NK = np.stack(self.kept(deltas_ND, context))
        np.put_along_axis(deltas_ND, places_NK, self.values.decompress(payloads, context.inside(places_NK.shape[1])), 1)
        return deltas_ND


def _largest(sizes_D: Float32, count: int) -> Int64:
    """The places of so many of the largest numbers, ascending. What is NaN is large.

    A sample says what is probably not among them, so that few have to be put in order.
    """
    sample = sizes_D[::SAMPLED]
    rank = 5 * count // (4 * SAMPLED) + 8  # of a number that is a little too small
    if rank < len(sample):
        candidates = np.flatnonzero(~(sizes_D < np.partition(sample, -rank)[-rank]))
        if len(candidates) >= count:
            return np.sort(candidates[np.argpartition(sizes_D[candidates], -count)[-count:]])
    return np.sort(np.argpartition(sizes_D, -count)[-count:])


def num_kept(fraction: float, num_parameters: int) -> int:
    """How many numbers of so many a fraction is; at least one.

    >>> num_kept(0.01, 199_210), num_kept(0.01, 10)
    (1992, 1)
    """
    return max(1, round(fraction * num_parameters))


def _alike(lengths: Sequence[int], context: CodecContext) -> Iterator[tuple[Int64, CodecContext]]:
    """The rows that keep equally many numbers, and what is known of these numbers."""
    lengths_N = np.array(lengths)
    for length in np.unique(lengths_N).tolist():
        rows = np.flatnonzero(lengths_N == length)
        yield rows, context.of(rows).inside(length)


def _places(payload: Payload) -> Int64:
    part = payload["indices"]
    assert isinstance(part, Indices)
    return part.positions


def _values(payload: Payload) -> Payload:
    """What stands for the numbers, at whatever places."""
    return {name: part for name, part in payload.items() if name != "indices"}
