from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from bestiary.diffusion.adapter import inject, save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_pipeline, load_unet
from bestiary.evaluation.judge import Judge

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def judge(judge_folder: Path) -> Judge:
    return Judge.load(str(judge_folder))


@pytest.fixture
def pipeline(base_folder: Path) -> StableDiffusionPipeline:
    return load_pipeline(base_folder, device="cpu")


@pytest.fixture(scope="session")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights for the bundled base. It changes every picture."""
    unet = load_unet(base_folder)
    random = torch.Generator().manual_seed(1)
    for parameter in inject(unet, rank=2, alpha=4, dropout=0.0, targets=["to_q", "to_v"], seed=0):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(unet, folder, Provenance())
    return folder
