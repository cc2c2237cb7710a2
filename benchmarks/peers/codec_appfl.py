"""APPFL's compressors (https://appfl.ai; Wilkins et al. 2023, "FedSZ", https://arxiv.org/abs/2312.13461). With pip
comes ZFP alone: SZ2 and SZ3 are built from clones of their repositories by `appfl-install-compressor`, and SZx is had
from its authors. Where their libraries are not, the answer says so.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.codec import Float32, Shapes, Way, flat, main, named


def ways(shapes: Shapes, threads: int) -> list[Way]:
    import torch
    from appfl.compressor import SZ2Compressor, SZ3Compressor, SZxCompressor, ZFPCompressor
    from omegaconf import OmegaConf

    def way(title: str, compressor: Any, error_bound: float) -> Way:
        settings = {"error_bounding_mode": "REL", "error_bound": error_bound, "param_cutoff": 1024}
        codec = compressor(OmegaConf.create(settings | {"lossless_compressor": "blosc"}))  # what APPFL has by default
        return Way(
            f"{title}, error within {error_bound:g} of the range",
            prepare=state,
            encode=codec.compress_model,
            decode=lambda data: codec.decompress_model(data, model),
            restored=lambda found: flat(list(found.values())),
        )

    def state(delta_D: Float32) -> dict[str, torch.Tensor]:
        return {
            name.replace(".", "_"): torch.from_numpy(values.copy()) for name, values in named(delta_D, shapes).items()
        }

    model = torch.nn.Module()
    for name, values in state(flat([torch.zeros(*shape) for shape in shapes])).items():
        model.register_parameter(name, torch.nn.Parameter(values))
    kinds = {"SZ2": SZ2Compressor, "SZ3": SZ3Compressor, "SZx": SZxCompressor, "ZFP": ZFPCompressor}
    return [way(title, compressor, 1e-2) for title, compressor in kinds.items()] + [way("ZFP", ZFPCompressor, 1e-1)]


if __name__ == "__main__":
    main({"appfl": ways})
