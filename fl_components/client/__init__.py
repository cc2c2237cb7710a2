"""What runs at a client, wherever it is: `run_round`, and the specification that it follows."""

from fedrounds.fl_components.client.broadcast import decode_broadcast
from fedrounds.fl_components.client.encoding import encode_updates, squared_norm
from fedrounds.fl_components.client.round import HELD, RESIDUAL, Answer, ClientExamples, run_round
from fedrounds.fl_components.client.spec import RoundSpec, seed_text

__all__ = [
    "HELD",
    "RESIDUAL",
    "Answer",
    "ClientExamples",
    "RoundSpec",
    "decode_broadcast",
    "encode_updates",
    "run_round",
    "seed_text",
    "squared_norm",
]
