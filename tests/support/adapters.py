"""Adapters as if they were trained. `python -m support.adapters BASE OUT` writes one."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from bestiary.diffusion.adapter import inject, save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_unet

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ALL_LAYERS = [*TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]
PROVENANCE = Provenance(base="models/base", base_sha256="of the base", params={"rank": 2})


def make_adapter(
    unet: UNet2DConditionModel,
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    targets: Sequence[str] = TARGETS,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> Path:
    """Write an adapter with alpha 16 and random weights, none of them zero, to `folder`, and leave it in `unet`."""
    parameters = inject(
        unet,
        rank=rank,
        alpha=16,
        dropout=0.0,
        targets=targets,
        seed=seed,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return save_adapter(unet, folder, PROVENANCE)


if __name__ == "__main__":
    make_adapter(load_unet(sys.argv[1]), Path(sys.argv[2]))
