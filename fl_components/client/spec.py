"""RoundSpec: everything that a client must know of a round."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, ValidationError

from fedrounds.fl_components.canonical import canonical_json
from fedrounds.fl_components.compression import Broadcast, CodecContext, Compression
from fedrounds.fl_components.errors import WireError
from fedrounds.fl_components.layout import DELTA, PARAMS, Layout, Shape
from fedrounds.fl_components.models import ModelSpec
from fedrounds.fl_components.privacy import Privacy
from fedrounds.fl_components.rules import Rule
from fedrounds.fl_components.task import Task
from fedrounds.fl_components.training import Training

FORMAT_VERSION: Final = 1

MAX_SPEC_BYTES: Final = 1 << 20


def _hexadecimal(length: int) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(rf"[0-9a-f]{{{length}}}", text):
            raise ValueError(f"it must be {length} hexadecimal digits")
        return text

    return AfterValidator(check)


Seed = Annotated[str, _hexadecimal(32)]
"""A seed of 128 bits, in hexadecimal: JSON's numbers are shorter."""

Digest = Annotated[str, _hexadecimal(64)]


class RoundSpec(Rule):
    """The specification of one client's part of a round.

    It is canonical JSON on its way, and holds no code and no secret.

    Args:
      format_version: of this value.
      run_id, round, collection: what the update is for; `collection` is the number of the round's reservation.
      client_id: whom the specification is for.
      base_digest: of the broadcast that the update must start from.
      model: how the client builds the model.
      task: what the model learns.
      training: the local training of this round; its schedule and its noise are resolved.
      compression, broadcast: how the update and the parameters travel.
      privacy: the claim that the server makes about clients.
      seed: of the client's public draws in this round.
      round_seed, broadcast_seed: of the draws that all clients share.
      work: the epochs (or steps) after which the client stops; null for all of them.
      deadline_s: when the update must have arrived, in seconds since the epoch; null for no deadline.
      state_round: the round in which the client last took part, whose state it must hold; null for the first time.
    """

    format_version: Literal[1] = FORMAT_VERSION
    run_id: str
    round: int = Field(ge=1)
    collection: int = Field(ge=0)
    client_id: str
    base_digest: Digest
    model: ModelSpec
    task: Task
    training: Training
    compression: Compression
    broadcast: Broadcast
    privacy: Privacy
    seed: Seed
    round_seed: Seed
    broadcast_seed: Seed
    work: int | None = Field(default=None, ge=1)
    deadline_s: float | None = None
    state_round: int | None = Field(default=None, ge=1)

    def to_json(self) -> str:
        """Return the specification as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes) -> RoundSpec:
        """Return the specification in a JSON text.

        Raises:
          WireError: it is none, of another format version, or longer than `MAX_SPEC_BYTES`.
        """
        if len(text) > MAX_SPEC_BYTES:
            raise WireError(f"the round's specification has {len(text)} bytes, at most {MAX_SPEC_BYTES} are allowed")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"])) or "the text"
            raise WireError(f"this is no specification of a round: {field}: {first['msg']}") from None

    def update_layout(self, parameter_shapes: tuple[Shape, ...]) -> Layout:
        """Return how the update is laid out."""
        return Layout((DELTA, *self.training.objective.channels), parameter_shapes)

    def broadcast_layout(self, parameter_shapes: tuple[Shape, ...]) -> Layout:
        """Return how the broadcast is laid out."""
        return Layout((PARAMS, *self.training.objective.channels), parameter_shapes)

    def update_context(self, layout: Layout) -> CodecContext:
        """Return what both ends know of the update."""
        return CodecContext([int(self.seed, 16)], int(self.round_seed, 16), layout.shapes)

    def broadcast_context(self, layout: Layout) -> CodecContext:
        """Return what both ends know of the broadcast."""
        seed = int(self.broadcast_seed, 16)
        return CodecContext([seed], seed, layout.shapes)


def seed_text(seed: int) -> str:
    """Return a seed of 128 bits in hexadecimal.

    >>> seed_text(255)
    '000000000000000000000000000000ff'
    """
    return f"{seed:032x}"
