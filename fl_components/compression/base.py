"""What every compression rule does, and what both ends know before anything travels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedrounds.fl_components.arrays import Float32, Indices, Payload, Symbols
from fedrounds.fl_components.errors import UpdateRejected
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rejections import Rejection, RejectionCode
from fedrounds.fl_components.rules import Rule


@dataclass(frozen=True, slots=True)
class CodecContext:
    """What both ends know of N updates, so that it need not travel.

    Args:
      seeds: of each client's own draws in this round, [N].
      round_seed: of the draws that all clients of the round share.
      shapes: of the parameters, which make up D numbers in this order.
    """

    seeds: Sequence[int]
    round_seed: int
    shapes: Sequence[Sequence[int]]

    @property
    def num_parameters(self) -> int:
        """D."""
        return sum(math.prod(shape) for shape in self.shapes)

    def of(self, rows: Iterable[int]) -> CodecContext:
        """The same for some of the updates."""
        return replace(self, seeds=[self.seeds[row] for row in rows])

    def inside(self, num_values: int) -> CodecContext:
        """The same for what is left of these updates, vectors of `num_values` numbers."""
        return replace(self, shapes=((num_values,),))

    def draws(self, purpose: str) -> list[np.random.Generator]:
        """Each client's own generator for this purpose, [N]. What it draws protects nobody: speed counts."""
        return [
            np.random.Generator(np.random.SFC64(derive_key(seed, 0, f"compression {purpose}"))) for seed in self.seeds
        ]

    def uniforms(self, purpose: str, size: int) -> Float32:
        """Each client's own numbers from 0 to less than 1, float32 [N, size], of 23 random bits each."""
        found_ND = np.empty((len(self.seeds), size), np.float32)
        for row_D, draw in zip(found_ND, self.draws(purpose), strict=True):
            # Two of each draw of 64 bits, as bits of numbers from 1 to less than 2: twice as fast as Generator.random.
            words = draw.integers(0, 2**64 - 1, -(-size // 2), np.uint64, endpoint=True).view(np.uint32)[:size]
            np.subtract((words >> np.uint32(9) | np.uint32(0x3F800000)).view(np.float32), 1, out=row_D)
        return found_ND

    def common_draw(self, purpose: str) -> np.random.Generator:
        """A generator that draws the same for all clients of the round."""
        return np.random.Generator(np.random.SFC64(derive_key(self.round_seed, 0, f"compression {purpose}")))


class CompressionRule(Rule):
    """N updates of D parameters to what travels, and back.

    A rule works on as many updates at once as it is given. What it makes of one does not depend on the others.
    """

    kind: str
    error_feedback: bool = Field(
        default=False,
        description="whether a client adds to its next update what compression left out of this one",
    )
    is_identity: ClassVar[bool] = False
    """Whether what is decoded is what was encoded, bit for bit, and as long for every update of D parameters: then one
    update that is encoded and decoded tells what all of them cost."""

    @model_validator(mode="after")
    def _feedback_makes_sense(self) -> CompressionRule:
        if self.error_feedback and self.unbiased:
            raise ValueError(
                f"compression.kind {self.kind} loses nothing on average, so error_feedback would add up its noise; "
                "leave error_feedback out, or use a rule that does (dead_zone, top_k, sign, low_rank)"
            )
        if self.error_feedback:
            check_contraction(self, "compression", "compression.error_feedback is true")
        return self

    @property
    @abstractmethod
    def unbiased(self) -> bool:
        """Whether what is decoded is, on average over the draws, what was encoded."""

    def error_bound(self, num_values: int) -> float:
        """The bound of the mean squared error in squared norms, over all vectors of `num_values` numbers; infinite
        where there is none. A quantiser's does not fall as `num_values` grows.

        Below 1 the rule is a contraction, E|C(x) - x|^2 <= (1 - alpha) |x|^2, with which error feedback converges
        (Stich et al. 2018, https://arxiv.org/abs/1809.07599; Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847;
        Beznosikov et al. 2020, https://arxiv.org/abs/2002.12410). A rule that does not declare a bound is none.
        """
        _ = num_values
        return math.inf

    def largest_error_bound(self, num_values: int) -> float:
        """The bound of the largest error of a number, in the largest absolute value, over all vectors and all draws;
        infinite where there is none. Below 1 the rule is a contraction in the maximum norm."""
        _ = num_values
        return math.inf

    def is_contraction(self, num_values: int) -> bool:
        """Whether what error feedback keeps of vectors of `num_values` numbers stays bounded, in one of the norms."""
        return self.error_bound(num_values) < 1 or self.largest_error_bound(num_values) < 1

    def check_size(self, num_parameters: int, field: str = "compression") -> None:
        """Raises ValueError when updates of this many parameters cannot be encoded, or when error feedback around the
        rule would diverge; `field` of the configuration holds the rule."""
        if self.error_feedback:
            check_contraction(self, field, f"{field}.error_feedback is true", num_parameters)

    @abstractmethod
    def compress(self, deltas_ND: Float32, context: CodecContext) -> list[Payload]:
        """What stands for each of the updates (float32 [N, D], left as they are)."""

    @abstractmethod
    def check(self, payload: Payload, context: CodecContext) -> None:
        """Raises `UpdateRejected` when `payload` is nothing that `compress` could have made of an update."""

    @abstractmethod
    def decompress(self, payloads: Sequence[Payload], context: CodecContext) -> Float32:
        """The updates, float32 [N, D], that these stand for; each has passed `check`."""


class Quantiser(CompressionRule):
    """A rule that keeps something of every number; it can be what a sparsifier does with the numbers that it keeps."""


R = TypeVar("R", bound=CompressionRule)


def without_memory(rule: R) -> R:
    """Refuses error feedback in a rule that stands inside another. Raises ValueError."""
    if rule.error_feedback:
        raise ValueError("error_feedback belongs to the outermost rule of compression; leave it out here")
    return rule


def check_contraction(rule: CompressionRule, field: str, feedback: str, num_parameters: int | None = None) -> None:
    """Refuses a rule that is no contraction inside a feedback loop. Raises ValueError.

    Args:
      field: of the configuration, which holds the rule.
      feedback: the field and the value that ask for feedback, in words.
      num_parameters: of the model; None where it is not known yet. Then only a rule that is a contraction at no size
        above 1 is refused.
    """
    sizes = SIZES if num_parameters is None else (num_parameters,)
    if any(rule.is_contraction(size) for size in sizes):
        return
    values = getattr(rule, "values", None)
    of_values = (
        f" with {field}.values.kind {values.kind}"
        if isinstance(values, CompressionRule) and not values.is_identity
        else ""
    )
    bound = min(rule.error_bound(size) for size in sizes)
    of_numbers = "" if num_parameters is None else f" of {num_parameters} numbers"
    loses = (
        "it declares no bound of its error"
        if bound == math.inf
        else f"its mean squared error can be {bound:.3g} squared norms{of_numbers}"
    )
    raise ValueError(
        f"{feedback} but {field}.kind {rule.kind}{of_values} is not a contraction: {loses}, where less than 1 is "
        "needed, so what one round leaves out would grow from round to round; use more bits, a smaller bucket or step, "
        f"or a rule that is one (dead_zone, top_k, sign, low_rank), or leave {feedback.partition(' ')[0]} out"
    )


SIZES: Final = (2, 3, 4, 8, 16, 32, 64, 128, 256, 1024, 10_000, 1_000_000)
"""Numbers of parameters at which a rule is looked at as long as the model's is not context."""


def unexpected(payload: Payload, expected: dict[str, str]) -> UpdateRejected:
    """Return the error for a payload that is not what was expected, which is given in words by name."""
    asked = ", ".join(f"{name}: {what}" for name, what in expected.items())
    found = ", ".join(f"{name[:40]!a}: {_in_words(part)}" for name, part in sorted(payload.items())[:6])
    alike = payload.keys() == expected.keys()
    code = RejectionCode.WRONG_SHAPE if alike else RejectionCode.WRONG_TENSORS
    return UpdateRejected(Rejection(code, f"expected {asked}; got {found or 'nothing'}"[:220]))


def expect(payload: Payload, **expected: tuple[str, int | None, int | None]) -> None:
    """Raises `UpdateRejected` unless `payload` has these parts and no others.

    Each is given as its type ("symbols", "indices" or a dtype's name), its length and the bits of a symbol or the bound
    of an index; None where it may be any.

    >>> expect({"norms": np.ones(3, np.float32)}, norms=("float32", 3, None))
    >>> expect({"norms": np.ones(3, np.float32)}, norms=("float32", 2, None))
    Traceback (most recent call last):
    fedrounds.fl_components.errors.UpdateRejected: wrong_shape: expected norms: float32 [2]; got 'norms': float32 [3]
    """
    fits = payload.keys() == expected.keys()
    for name, (kind, length, limit) in expected.items() if fits else ():
        found_kind, shape, found_limit = _facts(payload[name])
        fits &= found_kind == kind and len(shape) == 1 and length in (None, shape[0]) and limit in (None, found_limit)
    if not fits:
        words = {
            name: f"{kind}{f' of {limit}' if limit else ''} [{_any(length)}]"
            for name, (kind, length, limit) in expected.items()
        }
        raise unexpected(payload, words)


def symbols(payloads: Sequence[Payload], name: str) -> NDArray[np.unsignedinteger]:
    """A part of each payload that `expect` found to be symbols, [N, n]."""
    return np.stack([symbols_of(payload, name) for payload in payloads])


def symbols_of(payload: Payload, name: str) -> NDArray[np.unsignedinteger]:
    """A part that `expect` found to be symbols, [n]."""
    part = payload[name]
    assert isinstance(part, Symbols)
    return part.values


def numbers(payloads: Sequence[Payload], name: str) -> Float32:
    """A part of each payload that `expect` found to be float32, [N, n]."""
    return np.stack([part for payload in payloads if isinstance(part := payload[name], np.ndarray)])


def _facts(part: Any) -> tuple[str, tuple[int, ...], int | None]:
    if isinstance(part, Symbols):
        return "symbols", part.values.shape, part.bits
    if isinstance(part, Indices):
        return "indices", part.positions.shape, part.bound
    return part.dtype.name, part.shape, None


def _in_words(part: Any) -> str:
    kind, shape, limit = _facts(part)
    return f"{kind}{f' of {limit}' if limit else ''} {list(shape)}"


def _any(length: int | None) -> str:
    return "any" if length is None else str(length)


def in_buckets(values_ND: Float32, bucket: int, *, fill: Literal["zeros", "last"] = "zeros") -> Float32:
    """Rows cut into buckets of `bucket` numbers, [N, buckets, bucket].

    Zeros, or the row's last number again and again, fill up the last of each row.

    >>> in_buckets(np.array([[1, 2, 3]], np.float32), 2)
    array([[[1., 2.],
            [3., 0.]]], dtype=float32)
    """
    num_rows, size = values_ND.shape
    missing = -size % bucket
    if missing:
        last_N1 = values_ND[:, -1:] if fill == "last" else np.zeros((num_rows, 1), np.float32)
        values_ND = np.concatenate([values_ND, last_N1.repeat(missing, axis=1)], axis=1)
    return values_ND.reshape(num_rows, -1, bucket)


def num_buckets(num_values: int, bucket: int) -> int:
    """How many buckets so many numbers fill."""
    return -(-num_values // bucket)


BUCKET = Field(default=512, ge=8, description="so many numbers have a scale in common")
