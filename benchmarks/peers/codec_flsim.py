"""Meta's FLSim (https://github.com/facebookresearch/FLSim): its channels, which only simulate. They copy the model,
quantise or mask the copy and load it back; bytes are what FLSim counts. The release on PyPI has no sketches.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.codec import Float32, Shapes, Way, flat, main, named


def ways(shapes: Shapes, threads: int) -> list[Way]:
    import torch
    from flsim.channels.message import Message
    from flsim.channels.scalar_quantization_channel import ScalarQuantizationChannel
    from flsim.channels.sparse_mask_channel import SparseMaskChannel

    class Model:
        """An update as what FLSim calls a model."""

        def __init__(self, delta_D: Float32) -> None:
            self.module = torch.nn.Module()
            for name, values in named(delta_D, shapes).items():
                parameter = torch.nn.Parameter(torch.from_numpy(values.copy()), requires_grad=False)
                self.module.register_parameter(name.replace(".", "_"), parameter)

        def fl_get_module(self) -> torch.nn.Module:
            return self.module

    def way(title: str, channel: Any) -> Way:
        return Way(
            title,
            prepare=lambda delta_D: Message(model=Model(delta_D)),
            encode=channel._on_client_before_transmission,
            decode=channel._on_server_after_reception,
            restored=lambda message: flat(list(message.model.module.parameters())),
            num_bytes=channel._calc_message_size_client_to_server,
            at_once=1,  # a channel keeps an observer of the values that it sees; PyTorch has all cores
        )

    torch.set_num_threads(threads)
    return [
        *(way(f"scalar quantisation, {bits} bits", ScalarQuantizationChannel(n_bits=bits)) for bits in (8, 4)),
        way("largest 1 %", SparseMaskChannel(proportion_of_zero_weights=0.99, sparsity_method="topk")),
    ]


if __name__ == "__main__":
    main({"flsim": ways})
