"""Coverage-guided fuzzing of the decoder: `python -m tests.fuzz.frames [RUNS]`, 1,000,000 if not said otherwise.

Each run decodes one mutated frame as it came, and once more with lengths and checksum put right, as a malicious sender
would. Whatever comes must be refused with a `WireError` or keep every promise (`decoded_or_refused`). What fails is
written to the working folder by libFuzzer.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

MAX_BYTES = 4096
SECONDS_PER_RUN = 5  # more is a hang


def main(runs: int) -> None:
    import atheris  # not on every platform

    with atheris.instrument_imports(include=["fedrounds.fl_components.wire", "json"]):
        from tests.fl_components.wire.samples import FRAMES, altered, cut, decoded_or_refused, seal

    def one_run(frame: bytes) -> None:
        decoded_or_refused(frame, MAX_BYTES)
        decoded_or_refused(seal(*cut(frame)), MAX_BYTES)

    def mutate(frame: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = altered(rng, frame) if rng.random() < 0.5 else atheris.Mutate(frame, max_size)
        return bytes(changed[:max_size])

    with tempfile.TemporaryDirectory() as corpus:
        for name, frame in FRAMES.items():
            (Path(corpus) / name).write_bytes(frame)
        options = [f"-runs={runs}", f"-max_len={MAX_BYTES}", f"-timeout={SECONDS_PER_RUN}", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *options, corpus], one_run, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
