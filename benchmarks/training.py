"""Training and encoding at the exact size of Stable Diffusion 1.5, with random weights, beside the original's loop.

That loop encodes image and caption at every step, with gradient checkpointing, batch 1 and accumulation 4.

    python benchmarks/training.py            # 4 minutes and 8 GiB on two cores; on a GPU in its best dtype
    python benchmarks/training.py --quick    # a small trial of the benchmark itself: its numbers mean nothing

Prints each number while it runs, then tables; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from bestiary import params
from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import device_and_dtype, load_scheduler, load_unet, load_vae
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import LatentCache, Latents
from bestiary.diffusion.progress import LOG_EVERY
from bestiary.diffusion.training import train
from bestiary.evaluation.profiling import environment
from bestiary.memory import reset_peak_memory

ROOT = Path(__file__).parents[1]
BASE = ROOT / "models" / "base"
PARAMS = params.load_params(ROOT / "params.yaml")
TARGETS = PARAMS.train.targets
DEVICE, DTYPE = device_and_dtype()
GPU = DEVICE.type == "cuda"
HALF = DTYPE is not torch.float32
INTERVALS = 3  # measured, after another one to warm up

Result = TypeVar("Result")


@dataclass(frozen=True)
class Models:
    """Configs of the three networks, as diffusers' and transformers' classes take them."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]


STABLE_DIFFUSION = Models(  # 1.5, as its config.json files say
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    text={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
)
SMALL = Models(
    unet={**STABLE_DIFFUSION.unet, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    vae={**STABLE_DIFFUSION.vae, "block_out_channels": (32, 32, 32, 32)},
    text={**STABLE_DIFFUSION.text, "num_hidden_layers": 1, "vocab_size": 1000},
)


@dataclass(frozen=True)
class Training:
    """Training beside the original's loop, the machine's rate of matrix products and the bare step."""

    resolution: int
    batch_size: int
    compiled: bool
    gflop_per_image: float
    seconds_per_image: float
    images_per_second: float
    original_seconds_per_image: float
    share_of_original: float
    share_of_matmul_rate: float
    overhead_share: float | None  # of our step, which the bare step does not need; None when compiled
    overhead_share_least: float | None
    overhead_share_most: float | None
    peak_memory_mib: float


@dataclass(frozen=True)
class Encoding:
    """The encode stage beside the VAE's own forward pass."""

    resolution: int
    batch_size: int
    seconds_per_image: float
    vae_seconds_per_image: float
    ratio_to_vae: float


@dataclass(frozen=True)
class Timing:
    """One measurement of training."""

    seconds_per_image: float
    overheads: list[float]  # the share of each interval that bare steps, run right after it, do not need
    peak_memory_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    quick = parser.parse_args().quick
    models = SMALL if quick else STABLE_DIFFUSION
    # A GPU's queue must be empty when the time is taken, and training empties it at each row of its history.
    stride = LOG_EVERY if GPU and not quick else 1
    batch_sizes = {256: [16, 32, 64, 128, 256], 512: [4, 8, 16, 32, 64]} if GPU else {256: [4]}
    machine = asdict(environment())
    show("environment", machine)
    rate = matmul_gflops_per_second(side=512 if quick else 4096)
    show("matmul", {"gflops_per_second": rate})
    training = [
        row
        for resolution in batch_sizes
        for row in measure_training(models, resolution, batch_sizes[resolution], rate, stride)
    ]
    encoding = [measure_encoding(models, resolution) for resolution in batch_sizes]
    bundled = spread("bundled_overhead_share", bundled_overheads(2 if quick else 5, stride))
    show("bundled base", bundled)
    result = {
        "benchmark": "training",
        "quick": quick,
        "environment": machine,
        "matmul_gflops_per_second": rate,
        "training": [asdict(row) for row in training],
        "encoding": [asdict(row) for row in encoding],
        **bundled,
    }
    print("", table(training), "", table(encoding), "", sep="\n")
    print(json.dumps(result))


# ---- training ----


def measure_training(
    models: Models, resolution: int, batch_sizes: Sequence[int], rate: float, stride: int
) -> list[Training]:
    """Measure each batch size that fits, and on a GPU the fastest one compiled, beside the original's loop."""
    gflop = gflop_per_image(models, resolution // 8)
    original = in_another_process(original_seconds_per_image, models, resolution)
    rows: list[Training] = []

    def measure(batch_size: int, *, compiled: bool) -> bool:
        """Returns False when the batch does not fit into the memory."""
        unet = random_weights(lambda: UNet2DConditionModel(**models.unet))
        cache = random_cache(2 * batch_size, 4, resolution // 8, 77, 768)
        try:
            timing = time_training(
                unet, DDPMScheduler(beta_schedule="scaled_linear"), cache, batch_size, stride, compiled=compiled
            )
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            del unet
            free_memory()
        ours = timing.seconds_per_image
        rows.append(
            Training(
                resolution=resolution,
                batch_size=batch_size,
                compiled=compiled,
                gflop_per_image=gflop,
                seconds_per_image=ours,
                images_per_second=1 / ours,
                original_seconds_per_image=original,
                share_of_original=ours / original,
                share_of_matmul_rate=gflop / ours / rate,
                **spread("overhead_share", timing.overheads),
                peak_memory_mib=timing.peak_memory_mib,
            )
        )
        show("training", asdict(rows[-1]))
        return True

    for batch_size in batch_sizes:
        if not measure(batch_size, compiled=False):
            break
    if GPU:
        measure(max(rows, key=lambda row: row.images_per_second).batch_size, compiled=True)
    return rows


def time_training(
    unet: Any, scheduler: Any, cache: LatentCache, batch_size: int, stride: int, *, compiled: bool = False
) -> Timing:
    """Time training by its own clock, from validation to validation, and bare steps of the same UNet between them.

    A validation every `stride` steps keeps the bare steps, which run inside its callback, out of that clock.
    """
    ours: list[float] = []
    bare: list[float] = []
    bare_steps: Callable[[], None] | None = None

    def on_log(step: int, row: Mapping[str, float]) -> None:
        nonlocal bare_steps
        if not step:
            return
        ours.append(step * batch_size / row["images_per_second"] - sum(ours))
        if not compiled:
            bare_steps = bare_steps or bare_loop(unet, cache, batch_size, stride)
            bare.append(seconds(bare_steps))

    settings = PARAMS.train.model_copy(
        update={
            "steps": stride * (INTERVALS + 1),
            "validate_every": stride,
            "batch_size": batch_size,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "rank": 2,
            "alpha": 16.0,
            "min_snr_gamma": 5.0,
            "compile": "always" if compiled else "never",
        }
    )
    one_image = replace(cache, images=cache.images[:1])  # to validate in little time
    reset_peak_memory()
    result = train(unet, scheduler, Latents(cache, one_image), settings, seed=0, on_log=on_log)
    overheads = [1 - alone / whole for alone, whole in zip(bare, ours, strict=False)]
    return Timing(median(ours[1:]) / stride / batch_size, overheads[1:], result.peak_memory_mib)


def bare_loop(unet: Any, cache: LatentCache, batch_size: int, stride: int) -> Callable[[], None]:
    """A stride of bare steps on one fixed batch: only the UNet's forward and backward pass and the optimizer."""
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    latents = torch.randn(batch_size, *cache.posterior(0, 0)[0].shape, device=DEVICE)
    features = torch.randn(batch_size, *cache.features.shape[1:], device=DEVICE, dtype=DTYPE)
    timesteps = torch.full((batch_size,), 500, device=DEVICE)

    def steps() -> None:
        for _ in range(stride):
            with torch.autocast(DEVICE.type, DTYPE, enabled=HALF):
                prediction = unet(latents, timesteps, features).sample
            F.mse_loss(prediction.float(), latents).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def original_seconds_per_image(models: Models, resolution: int) -> float:
    """The median of three of the original's optimizer steps of four images, after one image to warm up."""
    unet = random_weights(lambda: UNet2DConditionModel(**models.unet))
    vae = random_weights(lambda: AutoencoderKL(**models.vae))
    text_encoder = CLIPTextModel(CLIPTextConfig(**models.text)).to(DEVICE, DTYPE)
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


def bundled_overheads(runs: int, stride: int) -> list[float]:
    """The share of a training step on the bundled base that its bare step does not need, several times."""
    shares = []
    for _ in range(runs):
        unet = load_unet(BASE, dtype=DTYPE)
        config = unet.config
        cache = random_cache(64, config.in_channels, config.sample_size, 16, config.cross_attention_dim)
        shares += time_training(unet, load_scheduler(BASE), cache, 16, stride).overheads
    return shares


def matmul_gflops_per_second(side: int) -> float:
    """The best of ten square matrix products."""
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2e-9 * side**3 / min(seconds(lambda: left @ right) for _ in range(10))


def gflop_per_image(models: Models, latent_side: int) -> float:
    """The UNet's forward and backward pass on one image with an adapter of rank 2, counted without computing it."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**models.unet)
        inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
        latents, text = torch.randn(1, 4, latent_side, latent_side), torch.randn(1, 77, 768)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(1), text).sample.sum().backward()
    return float(counter.get_total_flops()) / 1e9


# ---- encoding ----


def measure_encoding(models: Models, resolution: int) -> Encoding:
    """Measure the encode stage and the VAE's forward pass per additional image, so that loading does not count."""
    batch_size = 32 if GPU else 4
    few, many = (4 * batch_size, 20 * batch_size) if GPU else (batch_size, 3 * batch_size)
    settings = PARAMS.encode.model_copy(update={"resolution": resolution, "flip": False, "batch_size": batch_size})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(BASE, folder / "base", ignore=shutil.ignore_patterns("vae"))
        vae = random_weights(lambda: AutoencoderKL(**models.vae)).to("cpu", torch.float32)
        vae.save_pretrained(folder / "base" / "vae")
        paths = [write_photo(folder, number, resolution) for number in range(many + 1)]
        images = pd.DataFrame({"path": paths, "class": "zebra", "sha256": paths, "width": 500, "height": 375})

        def encode(count: int) -> float:
            manifests = {"train": folder / f"train-{count}.csv", "val": folder / "val.csv"}
            images[:count].to_csv(manifests["train"], index=False)
            images[-1:].to_csv(manifests["val"], index=False)
            out = folder / f"latents-{count}"
            return seconds(partial(encode_images, folder / "base", folder, manifests, out, settings))

        encode(1)
        ours = (encode(many) - encode(few)) / (many - few)
        vae = load_vae(folder / "base", dtype=DTYPE).to(DEVICE, memory_format=torch.channels_last)
    pixels = torch.rand(batch_size, 3, resolution, resolution, device=DEVICE, dtype=DTYPE)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        vae.encode(pixels)
        repeats = (many - few) // batch_size
        alone = seconds(lambda: [vae.encode(pixels) for _ in range(repeats)]) / repeats / batch_size
    row = Encoding(resolution, batch_size, ours, alone, ours / alone)
    show("encoding", asdict(row))
    free_memory()
    return row


def write_photo(folder: Path, number: int, resolution: int) -> str:
    """Write a JPEG with about as much detail as a photograph, somewhat larger than needed; returns its name."""
    random = np.random.default_rng(number)
    colours = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    photo = colours.resize((resolution * 5 // 4, resolution), Image.Resampling.BICUBIC)
    photo.save(folder / f"{number}.jpg", quality=85)
    return f"{number}.jpg"


# ---- tools ----


def random_cache(images: int, channels: int, side: int, tokens: int, width: int) -> LatentCache:
    """Latents and captions like those that the encode stage writes."""
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


def in_another_process(measure: Callable[..., Result], *arguments: object) -> Result:
    """Measure in a fresh process, where our settings of the C library's memory do not apply."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, *arguments).result()


def seconds(work: Callable[[], object]) -> float:
    """The seconds that `work` takes, until the device has finished it."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Wait for the device."""
    if GPU:
        torch.cuda.synchronize()


def free_memory() -> None:
    """Free the memory of the last training, and let the next one choose anew whether to compile."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate has no public way to do this


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The median, the minimum and the maximum of several measurements, under `name`, `name`_least and `name`_most."""
    if not values:
        return dict.fromkeys((name, f"{name}_least", f"{name}_most"))
    return {name: median(values), f"{name}_least": min(values), f"{name}_most": max(values)}


def show(title: str, numbers: Mapping[str, object]) -> None:
    """Print numbers on one line."""
    print(f"{title}: {', '.join(f'{name} {rounded(value)}' for name, value in numbers.items())}", flush=True)


def table(rows: Sequence[Training] | Sequence[Encoding]) -> str:
    """The rows as a Markdown table with a line for each number."""
    columns = [asdict(row) for row in rows]
    lines = [[name, *(rounded(column[name]) for column in columns)] for name in columns[0]]
    lines.insert(1, ["---", *("---" for _ in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(value: object) -> str:
    """A value as text, numbers with four digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
