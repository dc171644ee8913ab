"""Training and encoding at Stable Diffusion 1.5's exact size, with random weights, beside a loop that does what the
original does: image and caption encoded at each step, gradient checkpointing, batch 1, accumulation 4.

    python benchmarks/training.py            # 4 minutes and 8 GiB on two cores; on a GPU in bfloat16 where it can
    python benchmarks/training.py --quick    # small models: a try of the benchmark itself, its numbers mean nothing

Prints each number as it comes and a table of all; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from bestiary.diffusion import progress
from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import device_and_dtype, load_scheduler, load_unet, load_vae
from bestiary.diffusion.latents import LatentCache, encode_images
from bestiary.diffusion.training import TrainingSettings, train
from bestiary.evaluation.profiling import environment

QUICK = "--quick" in sys.argv
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BASE = Path(__file__).parents[1] / "models" / "base"
DEVICE, DTYPE = device_and_dtype()
GPU = DEVICE.type == "cuda"
HALF = DTYPE is not torch.float32
# Stable Diffusion 1.5's, as its config.json files have them; diffusers' own defaults are the rest.
UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
if QUICK:
    UNET |= {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
    VAE |= {"block_out_channels": (32, 32, 32, 32)}
    TEXT |= {"num_hidden_layers": 1, "vocab_size": 1000}
# Time is taken where a row of the curve is logged: a GPU's queue is empty there. Real trainings log every 10 steps.
STRIDE = progress.LOG_EVERY = 10 if GPU and not QUICK else 1
INTERVALS = 3  # measured, after as many steps to warm up as a stride has
SHAPES = {256: [4]} if not GPU else {256: [16, 32, 64, 128, 256], 512: [4, 8, 16, 32, 64]}


def main() -> None:
    """Measure, print tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.parse_args()
    measured_on = environment()
    tell("environment", **measured_on)
    rate = matmul_gflops_per_second(side=512 if QUICK else 4096)
    tell("matmul", gflops_per_second=rate)
    training = [row for resolution in SHAPES for row in training_rows(resolution, rate)]
    encoding = [encoding_row(resolution) for resolution in SHAPES]
    embedded = spread("embedded_overhead_share", embedded_overhead())
    tell("embedded base", **embedded)
    result = {
        "benchmark": "training",
        "quick": QUICK,
        "environment": measured_on,
        "matmul_gflops_per_second": rate,
        "training": training,
        "encoding": encoding,
        **embedded,
    }
    print("", table(training), "", table(encoding), "", sep="\n")
    print(json.dumps(result))


def training_rows(resolution: int, rate: float) -> list[dict[str, Any]]:
    """A row for each batch size that fits, and on a GPU the best one compiled too; all beside the original's loop."""
    gflop = gflop_per_image(resolution // 8)
    original = by_itself(original_seconds_per_image, resolution)
    rows: list[dict[str, Any]] = []

    def measure(batch_size: int, *, compiled: bool) -> bool:
        try:
            ours, overheads, peak = our_times(resolution, batch_size, compiled=compiled)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            forget()
        row = {"resolution": resolution, "batch_size": batch_size, "compiled": compiled, "gflop_per_image": gflop}
        row |= {"seconds_per_image": ours, "images_per_second": 1 / ours, "original_seconds_per_image": original}
        row |= {"share_of_original": ours / original, "share_of_matmul_rate": gflop / ours / rate}
        row |= spread("overhead_share", overheads) | {"peak_memory_mib": peak}
        rows.append(row)
        tell("training", **row)
        return True

    for batch_size in SHAPES[resolution]:
        if not measure(batch_size, compiled=False):
            break
    if GPU:
        measure(max(rows, key=lambda row: row["images_per_second"])["batch_size"], compiled=True)
    return rows


def matmul_gflops_per_second(side: int) -> float:
    """The best of ten square matrix products."""
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2e-9 * side**3 / min(seconds(lambda: left @ right) for _ in range(10))


def gflop_per_image(latent_side: int) -> float:
    """What one image costs the UNet forward and backward with an adapter of rank 2, counted without computing it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
        inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
        latents, text = torch.randn(1, 4, latent_side, latent_side), torch.randn(1, 77, 768)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(1), text).sample.sum().backward()
    return float(counter.get_total_flops()) / 1e9


def our_times(resolution: int, batch_size: int, *, compiled: bool) -> tuple[float, list[float], float]:
    """`timed_training` of this project with its cache, logging and average, at Stable Diffusion's size."""
    cache = random_cache(2 * batch_size, 4, resolution // 8, 77, 768)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    return timed_training(random_weights(lambda: UNet2DConditionModel(**UNET)), scheduler, cache, batch_size, compiled)


def timed_training(
    unet: Any, scheduler: Any, cache: LatentCache, batch_size: int, compiled: bool = False
) -> tuple[float, list[float], float]:
    """Seconds an image from one row of the training's curve to the next; the share of each such interval that bare
    steps of the same UNet, taken right after it, do not need (none when compiled: those are not); peak memory in MiB.
    """
    ours: list[float] = []
    bare: list[float] = []
    bare_steps: Callable[[], Any] | None = None
    resumed = 0.0

    def note(_step: int, row: Mapping[str, float]) -> None:
        nonlocal bare_steps, resumed
        if "val_loss" not in row:
            synchronize()
            ours.append(time.perf_counter() - resumed)
            if not compiled:
                bare_steps = bare_steps or bare_loop(unet, cache, batch_size)
                bare.append(seconds(bare_steps))
        resumed = time.perf_counter()

    total = STRIDE * (INTERVALS + 1) + 1
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    settings = TrainingSettings(
        steps=total,
        batch_size=batch_size,
        learning_rate=1e-4,
        warmup_steps=0,
        validate_every=total,
        seed=0,
        rank=2,
        alpha=16,
        targets=TARGETS,
        caption_dropout=0.1,
        min_snr_gamma=5.0,
        ema_decay=0.99,
        compile=compiled,
    )
    one = replace(cache, images=cache.images[:1])  # to validate with in no time
    result = train(unet, scheduler, cache, one, settings, on_log=note)
    overheads = [1 - alone / whole for alone, whole in zip(bare, ours, strict=False)]
    # The first of each warms up.
    return median(ours[1:]) / STRIDE / batch_size, overheads[1:], result.peak_memory_mib


def bare_loop(unet: Any, cache: LatentCache, batch_size: int) -> Callable[[], None]:
    """A stride of the UNet's forward and backward and the optimiser's step on one fixed batch, with nothing around."""
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    latents = torch.randn(batch_size, *cache.posterior(0, 0)[0].shape, device=DEVICE)
    features = torch.randn(batch_size, *cache.features.shape[1:], device=DEVICE, dtype=DTYPE)
    timesteps = torch.full((batch_size,), 500, device=DEVICE)

    def steps() -> None:
        for _ in range(STRIDE):
            with torch.autocast(DEVICE.type, DTYPE, enabled=HALF):
                prediction = unet(latents, timesteps, features).sample
            F.mse_loss(prediction.float(), latents).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def original_seconds_per_image(resolution: int) -> float:
    """The median of three optimiser steps of four images as the original takes them, after one image to warm up."""
    unet = random_weights(lambda: UNet2DConditionModel(**UNET))
    vae = random_weights(lambda: AutoencoderKL(**VAE))
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT)).to(DEVICE, DTYPE)
    parameters = inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    unet.to(DEVICE).enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(parameters)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    pixels = torch.rand(1, 3, resolution, resolution, device=DEVICE, dtype=DTYPE)
    tokens = torch.ones(1, 77, dtype=torch.long, device=DEVICE)

    def accumulate() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * 0.18215
            features = text_encoder(tokens).last_hidden_state
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (1,), device=DEVICE)
        with torch.autocast(DEVICE.type, DTYPE, enabled=HALF):
            prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, features).sample
        F.mse_loss(prediction.float(), noise.float()).backward()

    def step() -> None:
        for _ in range(4):
            accumulate()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()

    accumulate()
    return median(seconds(step) for _ in range(3)) / 4


def encoding_row(resolution: int) -> dict[str, Any]:
    """The encode stage beside the VAE's own forward on as many images, each an image more: loading is no part of it."""
    batch_size = 32 if GPU else 4
    few, many = (batch_size, 3 * batch_size) if not GPU else (4 * batch_size, 20 * batch_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(BASE, folder / "base", ignore=shutil.ignore_patterns("vae"))
        random_weights(lambda: AutoencoderKL(**VAE)).to("cpu", torch.float32).save_pretrained(folder / "base" / "vae")
        paths = [write_photo(folder, number, resolution) for number in range(many + 1)]
        table = pd.DataFrame({"path": paths, "class": "zebra", "sha256": paths, "width": 500, "height": 375})

        def encode(count: int) -> float:
            tables = {"train": folder / f"train-{count}.csv", "val": folder / "val.csv"}
            table[:count].to_csv(tables["train"], index=False)
            table[-1:].to_csv(tables["val"], index=False)
            how = {"resolution": resolution, "flip": False, "batch_size": batch_size}
            out = folder / f"latents-{count}"
            return seconds(lambda: encode_images(folder / "base", folder, tables, out, **how))  # type: ignore[arg-type]

        encode(1)
        ours = (encode(many) - encode(few)) / (many - few)
        vae = load_vae(folder / "base", dtype=DTYPE).to(DEVICE, memory_format=torch.channels_last)
    pixels = torch.rand(batch_size, 3, resolution, resolution, device=DEVICE, dtype=DTYPE)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        vae.encode(pixels)
        repeats = (many - few) // batch_size
        alone = seconds(lambda: [vae.encode(pixels) for _ in range(repeats)]) / repeats / batch_size
    row = {"resolution": resolution, "batch_size": batch_size, "seconds_per_image": ours}
    row |= {"vae_seconds_per_image": alone, "ratio_to_vae": ours / alone}
    tell("encoding", **row)
    forget()
    return row


def write_photo(folder: Path, number: int, resolution: int) -> str:
    """A JPEG with about the detail of a photograph, somewhat larger than needed; its name."""
    random = np.random.default_rng(number)
    soft = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    soft.resize((resolution * 5 // 4, resolution), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=85)
    return f"{number}.jpg"


def embedded_overhead() -> list[float]:
    """The share of a training step on the embedded base that is not the UNet's own, several times."""
    unet = load_unet(BASE, dtype=DTYPE)
    channels, side, width = unet.config.in_channels, unet.config.sample_size, unet.config.cross_attention_dim
    cache = random_cache(64, channels, side, 16, width)
    shares = []
    for _ in range(2 if QUICK else 5):
        shares += timed_training(load_unet(BASE, dtype=DTYPE), load_scheduler(BASE), cache, 16)[1]
    return shares


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The median of what was measured several times under its name, with the least and the most beside it."""
    if not values:
        return dict.fromkeys((name, f"{name}_least", f"{name}_most"))
    return {name: median(values), f"{name}_least": min(values), f"{name}_most": max(values)}


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


def random_weights(build: Callable[[], Any]) -> Any:
    """A frozen model with small random weights on the device, built without its own slow initialisation."""
    with torch.device("meta"):
        model = build().to(DTYPE)
    model = model.to_empty(device=DEVICE).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    return model


def by_itself(measure: Callable[..., Any], *arguments: Any) -> Any:
    """What `measure` returns in a process of its own: the original has no part in how ours treats memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes, the device's queue included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the device."""
    if GPU:
        torch.cuda.synchronize()


def forget() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers whether the last training was compiled


def tell(what: str, **numbers: Any) -> None:
    """A line for people."""
    print(f"{what}: {', '.join(f'{name} {rounded(value)}' for name, value in numbers.items())}", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown, turned: a line for each number."""
    lines = [[name, *(rounded(row[name]) for row in rows)] for name in rows[0]]
    lines.insert(1, ["---", *("---" for _ in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(value: Any) -> str:
    """A number as people read it."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
