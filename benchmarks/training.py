"""Training at Stable Diffusion 1.5's exact size, with random weights, against a loop that does what the original does:
encode image and caption at each step, gradient checkpointing, batch 1, accumulation 4. The last line is JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import device_and_dtype, load_scheduler, load_unet
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.training import TrainingSettings, train

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BASE = Path(__file__).parents[1] / "models" / "base"


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    device, dtype = device_and_dtype()
    shapes = [(256, 4)] if device.type == "cpu" else [(256, 16), (256, 64), (512, 16), (512, 32)]
    rate = matmul_gflops_per_second(device, dtype)
    result: dict[str, Any] = {
        "benchmark": "training",
        "environment": {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        | {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()},
        "matmul_gflops_per_second": rate,
        "rows": [],
    }
    for resolution, batch_size in shapes:
        gflop = gflop_per_image(resolution // 8)
        ours = our_seconds_per_image(resolution, batch_size, steps=4)
        bare = bare_seconds_per_image(device, dtype, resolution, batch_size)
        original = original_seconds_per_image(device, dtype, resolution)
        row = {"resolution": resolution, "batch_size": batch_size, "gflop_per_image": gflop}
        row |= {"seconds_per_image": ours["seconds_per_image"], "original_seconds_per_image": original}
        row |= {"speedup": original / ours["seconds_per_image"], "peak_memory_mib": ours["peak_memory_mib"]}
        row["share_of_matmul_rate"] = gflop / ours["seconds_per_image"] / rate
        row["overhead_share"] = 1 - bare / ours["seconds_per_image"]
        result["rows"].append(row)
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    result["embedded_overhead_share"] = embedded_overhead_share()
    print(f"overhead around a step on the embedded base: {result['embedded_overhead_share']:.1%}")
    print(json.dumps(result))


def matmul_gflops_per_second(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """The best of five square matrix products."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2e-9 * side**3 / min(seconds(lambda: left @ right, device) for _ in range(5))


def gflop_per_image(latent_side: int) -> float:
    """What one image costs the UNet forward and backward with an adapter of rank 2, counted on no device at all."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
        latents, text = torch.randn(1, 4, latent_side, latent_side), torch.randn(1, 77, 768)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(1), text).sample.sum().backward()
    return float(counter.get_total_flops()) / 1e9


def our_seconds_per_image(resolution: int, batch_size: int, steps: int) -> dict[str, float]:
    """This project's training with its cache, logging and average; the first half of the steps warms up."""
    _, dtype = device_and_dtype()
    settings = training_settings(steps, batch_size)
    cache = random_cache(32, 4, resolution // 8, 77, 768)
    result = train(
        random_unet(dtype), DDPMScheduler(beta_schedule="scaled_linear"), cache, cache_of_one(cache), settings
    )
    return {
        "seconds_per_image": second_half_seconds_per_image(result.history),
        "peak_memory_mib": result.peak_memory_mib,
    }


def bare_seconds_per_image(device: torch.device, dtype: torch.dtype, resolution: int, batch_size: int) -> float:
    """The UNet's forward, backward and the optimiser's step, with nothing around them."""
    unet = random_unet(dtype).to(device)
    return bare_loop(unet, device, dtype, batch_size, resolution // 8, (77, 768), steps=2)


def bare_loop(
    unet: Any, device: torch.device, dtype: torch.dtype, batch: int, side: int, text: tuple[int, int], steps: int
) -> float:
    """Seconds an image of a loop that does nothing but train on one fixed batch."""
    parameters = inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    unet.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(parameters, fused=True)
    latents = torch.randn(batch, unet.config.in_channels, side, side, device=device)
    features = torch.randn(batch, *text, device=device, dtype=dtype)
    timesteps = torch.full((batch,), 500, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(latents, timesteps, features).sample
        F.mse_loss(prediction.float(), latents).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return seconds(lambda: [step() for _ in range(steps)], device) / steps / batch


def original_seconds_per_image(device: torch.device, dtype: torch.dtype, resolution: int) -> float:
    """One optimiser step of four images as the original takes it, after one image to warm up."""
    unet = random_unet(dtype).to(device)
    vae = random_weights(lambda: AutoencoderKL(**VAE), dtype).to(device)
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **TEXT)).to(device, dtype)
    parameters = inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(parameters)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    pixels = torch.rand(1, 3, resolution, resolution, device=device, dtype=dtype)
    tokens = torch.ones(1, 77, dtype=torch.long, device=device)

    def accumulate() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * 0.18215
            features = text_encoder(tokens).last_hidden_state
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, features).sample
        F.mse_loss(prediction.float(), noise.float()).backward()

    def step() -> None:
        for _ in range(4):
            accumulate()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()

    accumulate()
    return seconds(step, device) / 4


def embedded_overhead_share() -> float:
    """The share of a training step on the embedded base that is not the UNet's own."""
    device, dtype = device_and_dtype()
    unet = load_unet(BASE, dtype=dtype)
    channels, side, width = unet.config.in_channels, unet.config.sample_size, unet.config.cross_attention_dim
    cache = random_cache(64, channels, side, 16, width)
    result = train(unet, load_scheduler(BASE), cache, cache_of_one(cache), training_settings(40, 16))
    bare = bare_loop(load_unet(BASE, dtype=dtype).to(device), device, dtype, 16, side, (16, width), steps=20)
    return 1 - bare / second_half_seconds_per_image(result.history)


def second_half_seconds_per_image(history: list[dict[str, float]]) -> float:
    """From the curve's counts and rates, which are those since the start."""
    middle, end = history[len(history) // 2], history[-1]
    assert middle["step"] * 2 == end["step"]
    return 2 / end["images_per_second"] - 1 / middle["images_per_second"]


def training_settings(steps: int, batch_size: int) -> TrainingSettings:
    """The original's adapter, validated halfway and at the end."""
    return TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-4,
        warmup_steps=0,
        validate_every=steps // 2,
        seed=0,
        rank=2,
        alpha=16,
        targets=TARGETS,
        caption_dropout=0.1,
        min_snr_gamma=5.0,
        ema_decay=0.99,
    )


def random_cache(images: int, channels: int, side: int, tokens: int, width: int) -> LatentCache:
    """Latents and captions as `encode` would have left them."""
    shape = (images, 2, channels, side, side)
    return LatentCache(
        images=pd.DataFrame({"path": "", "class": ["zebra"] * images, "sha256": ""}),
        captions=pd.DataFrame({"class": ["", "zebra"], "caption": ["", "a zebra"]}),
        features=torch.randn(2, tokens, width),
        scaling_factor=0.18215,
        base_sha256="",
        data_sha256="",
        shards=[{"mean": torch.randn(shape), "std": torch.ones(shape)}],
    )


def cache_of_one(cache: LatentCache) -> LatentCache:
    """A cache to validate on in no time."""
    return LatentCache(**vars(cache) | {"images": cache.images[:1]})


def random_unet(dtype: torch.dtype) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet, frozen."""
    return random_weights(lambda: UNet2DConditionModel(**UNET), dtype)


def random_weights(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A frozen model with small random weights, built without its own slow initialisation."""
    with torch.device("meta"):
        model = build().to(dtype)
    model = model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, the device's queue included."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
