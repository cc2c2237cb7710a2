"""OpenFL's pipelines (https://openfl.readthedocs.io): each layer by EDEN at 1 bit, and by sparse ternary compression.

Bytes are those of the protobuf messages in which OpenFL sends the layers.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.codec import Shapes, Way, flat, layers, main

Sent = list[tuple[bytes, list[dict[str, Any]]]]


def ways(shapes: Shapes, threads: int) -> list[Way]:
    import torch
    from openfl.pipelines import EdenPipeline, STCPipeline
    from openfl.protocols.utils import construct_named_tensor
    from openfl.utilities import TensorKey

    torch.set_num_threads(1)  # several updates at a time are faster than several threads for one

    def num_bytes(sent: Sent) -> int:
        key = TensorKey("0.weight", "client", 1, False, ("trained", "delta", "lossy_compressed"))
        return sum(construct_named_tensor(key, data, metadata, False).ByteSize() for data, metadata in sent)

    def way(title: str, pipeline: Any) -> Way:
        return Way(
            title,
            prepare=lambda delta_D: layers(delta_D, shapes),
            encode=lambda parts: [pipeline.forward(part) for part in parts],
            decode=lambda sent: [pipeline.backward(data, list(metadata)) for data, metadata in sent],
            restored=flat,
            num_bytes=num_bytes,
        )

    return [
        way("EDEN, 1 bit", EdenPipeline(n_bits=1)),
        way("sparse ternary, 1 %", STCPipeline(p_sparsity=0.01)),
    ]


if __name__ == "__main__":
    main({"openfl": ways})
