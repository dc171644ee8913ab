"""Train a tiny base in the tests' own process."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.settings import train_settings

from bestiary.diffusion.base import load_scheduler, load_unet
from bestiary.diffusion.latents import LatentCache, Latents
from bestiary.diffusion.progress import TrainingResult
from bestiary.diffusion.training import train


def run_training(
    base: Path, latents: Latents, *, seed: int = 0, **changes: object
) -> tuple[TrainingResult, UNet2DConditionModel]:
    """Train with `train_settings(**changes)`; returns the result and the UNet with the adapter in it."""
    unet = load_unet(base)
    return train(unet, load_scheduler(base), latents, train_settings(**changes), seed=seed), unet


def least_unet() -> UNet2DConditionModel:
    """A UNet with random weights, always the same, for the tiny base's latents. It compiles in half the base's time."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    ).requires_grad_(False)


def adapter_weights(unet: UNet2DConditionModel) -> list[torch.Tensor]:
    """Copies of the adapter's weights."""
    return [value.clone() for name, value in unet.state_dict().items() if "lora" in name]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def in_training_batch(unet: UNet2DConditionModel, number: int, act: Callable[[], object]) -> None:
    """Call `act` just before the UNet computes its training batch of this number, the first being 1."""
    seen = 0

    def count(module: torch.nn.Module, _inputs: object) -> None:
        nonlocal seen
        seen += module.training  # validations and sheets run in evaluation mode
        if module.training and seen == number:
            act()

    unet.register_forward_pre_hook(count)


def stable_diffusion_cache() -> LatentCache:
    """Latents of one image of 256 x 256 pixels and its captions, of the shapes of Stable Diffusion."""
    return LatentCache(
        images=pd.DataFrame({"path": ["zebra/0.jpg"], "class": ["zebra"], "sha256": ["0"]}),
        captions=pd.DataFrame({"class": ["", "zebra"], "caption": ["", "a zebra"]}),
        features=torch.randn(2, 77, 768),
        scaling_factor=0.18215,
        base_sha256="",
        data_sha256="",
        shards=[{"mean": torch.randn(1, 1, 4, 32, 32), "std": torch.ones(1, 1, 4, 32, 32)}],
    )


def one_stable_diffusion_step() -> TrainingResult:
    """Train a UNet of Stable Diffusion's size, with random weights, for one step."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).requires_grad_(False)
    cache = stable_diffusion_cache()
    settings = train_settings(steps=1, batch_size=1, alpha=16, gradient_checkpointing=True)
    return train(unet, DDPMScheduler(beta_schedule="scaled_linear"), Latents(cache, cache), settings, seed=0)


if __name__ == "__main__":
    print(one_stable_diffusion_step().peak_memory_mib)
