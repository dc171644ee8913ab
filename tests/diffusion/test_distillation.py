from pathlib import Path

import pytest
import torch
from support.settings import distill_settings
from support.training import adapter_weights, all_equal

from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.distillation import distill
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.progress import TrainingResult


def run_distillation(
    base: Path, latents: Latents, checkpoints: Path | None = None, **changes: object
) -> tuple[TrainingResult, list[torch.Tensor]]:
    """Distil with `distill_settings(**changes)`; returns the result and the LoRA's weights."""
    unet = load_unet(base)
    settings = distill_settings(**changes)
    result = distill(unet, load_scheduler(base), latents, settings, seed=0, checkpoints=checkpoints)
    return result, adapter_weights(unet)


@pytest.fixture(scope="module")
def plain(base: Path, latents_folder: Path) -> tuple[TrainingResult, list[torch.Tensor]]:
    return run_distillation(base, Latents.open(latents_folder))


def test_distilling_twice_gives_the_same_bytes(
    plain: tuple[TrainingResult, list[torch.Tensor]], base: Path, latents: Latents
) -> None:
    result, weights = run_distillation(base, latents)
    assert all_equal(weights, plain[1])
    assert result.results() == plain[0].results()
