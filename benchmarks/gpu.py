"""A GPU's speed at the exact size of Stable Diffusion 1.5, with random weights, beside other ways to do the same work.

The original's loop: batch 1, image and caption encoded at every step, gradient checkpointing, accumulation 4.
The official script: the work of diffusers' train_text_to_image_lora.py with --mixed_precision=bf16: image and caption
encoded at every step, autocast, the adapter in bfloat16, AdamW that is not fused, two waits for the GPU a step. Its
reading of files is left out.

    python benchmarks/gpu.py                 # 5 minutes, plus what torch.compile needs the first time
    python benchmarks/gpu.py --low-memory    # only the stages' peak memory, with settings for 8 and 6 GB GPUs
    python benchmarks/gpu.py --quick         # a small trial of the benchmark, on a CPU too: its numbers mean nothing

Prints a line of JSON for each measurement while it runs; the last line is JSON with all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from training import (
    DEVICE,
    DTYPE,
    GPU,
    HALF,
    PARAMS,
    SMALL,
    STABLE_DIFFUSION,
    Models,
    free_memory,
    gflop_per_image,
    original_seconds_per_image,
    random_cache,
    random_weights,
    seconds,
)
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.encoding import VaeEncoder
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import train
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.profiling import environment
from bestiary.evaluation.timing import TooLongError, time_limit
from bestiary.evaluation.watching import SheetPlan, TrainingWatch
from bestiary.samplers import Sampling
from bestiary.subjects import Subject

RANK = PARAMS.train.rank or 4
STEPS = 30  # of a measured training, the first ten to warm up
# Our batches by resolution, and the one at which the official script was fastest.
BATCHES = {256: (16, 64, 256), 512: (16, 64)}
OFFICIAL = {256: 64, 512: 32}
# Gigabytes of small GPUs. Everything runs one image at a time.
LOW_MEMORY = (8, 6)
ROW_SECONDS = 400.0  # at most for a measurement; a call of CUDA that hangs cannot be ended
OUTSIDE_GIB = 1.0  # of a card's memory, reserved for CUDA and its libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="only these, by the start of a name")
    parser.add_argument("--compile-official", action="store_true", help="compile the official script's UNet as well")
    parser.add_argument("--low-memory", action="store_true", help="only the stages, limited to 8 and 6 GB")
    arguments = parser.parse_args()
    machine = asdict(environment())
    result: dict[str, Any] = {"benchmark": "gpu", "quick": arguments.quick, "environment": machine, "gpu": None}
    if not GPU and not arguments.quick:
        print("This machine has no GPU that torch can use. Try the benchmark itself with --quick.")
        print(json.dumps(result))
        return
    sizes = SMALL if arguments.quick else STABLE_DIFFUSION
    rate = matmul_tflops(256 if arguments.quick else 4096)
    result |= {"gpu": torch.cuda.get_device_name() if GPU else "cpu", "matmul_tflops": rate, "rows": {}}
    jobs = {} if arguments.low_memory else measurements(sizes, rate, arguments.quick, arguments.compile_official)
    if arguments.low_memory or arguments.quick:
        jobs |= low_memory(sizes, arguments.quick)
    chosen = tuple(arguments.only or [""])
    try:
        for name, measure in jobs.items():
            if name.startswith(chosen):
                result["rows"][name] = row = measured(measure)
                print(json.dumps({name: row}), flush=True)
    finally:  # also after Ctrl-C
        print(json.dumps(result), flush=True)
    if any("error" in row for row in result["rows"].values()):
        sys.exit(1)


def measured(measure: Callable[[], dict[str, float]]) -> dict[str, float | str]:
    """A row: its numbers, how long it took and its peak memory; or the error, because other rows are worth having."""
    started = time.perf_counter()
    row: dict[str, float | str] = {}
    try:
        free_memory()  # here, because after an error of CUDA's this fails, too
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        with time_limit(ROW_SECONDS):
            row |= measure()
        if GPU:
            row["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    except (Exception, TooLongError) as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row["whole_s"] = time.perf_counter() - started
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def measurements(
    sizes: Models, rate: float, quick: bool, compile_official: bool
) -> dict[str, Callable[[], dict[str, float]]]:
    """What to measure, by name, in the order of what matters most."""
    small = 64 if quick else None  # pixels a side: half of the columns below mean nothing then
    gflop = {side: gflop_per_image(sizes, (small or side) // 8) for side in (256, 512)}

    def training(side: int, batch: int, **changes: object) -> Callable[[], dict[str, float]]:
        return lambda: ours(sizes, small or side, 2 if quick else batch, gflop[side], rate, changes)

    def official(side: int, compiled: bool = False) -> Callable[[], dict[str, float]]:
        return lambda: official_script(
            sizes, small or side, 2 if quick else OFFICIAL[side], gflop[side], rate, compiled
        )

    jobs: dict[str, Callable[[], dict[str, float]]] = {}
    for side, batches in BATCHES.items():
        for batch in batches:
            jobs[f"ours, {side} px, batch {batch}, eager"] = training(side, batch, compile="never")
        jobs[f"official script, {side} px, batch {OFFICIAL[side]}, eager"] = official(side)
    jobs["original's loop, 256 px, batch 1"] = lambda: _rate(original_seconds_per_image(sizes, small or 256))
    for compiled in (False, True)[: 1 if quick else 2]:
        name = f"VAE encoder, 512 px, batch 16, {'compiled' if compiled else 'eager'}"
        jobs[name] = partial(encoding, sizes, small or 512, compiled)
    for steps, scale in ((13, 7.0), (2, 1.0)):
        for batch in (1, 8):
            name = f"drawing, 512 px, {steps} steps, {'guided' if scale > 1 else 'unguided'}, batch {batch}"
            jobs[name] = partial(drawing, sizes, small or 512, steps, scale, 1 if quick else batch)
    jobs["memory, 512 px, batch 1"] = training(512, 1, compile="never")
    jobs["memory, 512 px, batch 1, checkpointing"] = training(512, 1, compile="never", gradient_checkpointing=True)
    for side, batch in ((256, 256), (512, 64), (256, 16)) if not quick else ():
        jobs[f"ours, {side} px, batch {batch}, compiled"] = training(side, batch, compile="always")
    if not quick:
        jobs["ours, 256 px, batch 256, compiled, plain layers"] = partial(
            with_plain_layers, training(256, 256, compile="always")
        )
    if compile_official and not quick:
        jobs["official script, 256 px, batch 64, compiled"] = official(256, compiled=True)
    return jobs


def matmul_tflops(side: int) -> float:
    """The median of square matrix products of random numbers."""
    left, right = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for _ in range(3):
        left @ right
    return 2e-12 * side**3 / (median(seconds(lambda: [left @ right for _ in range(10)]) for _ in range(5)) / 10)


def ours(
    sizes: Models, side: int, batch: int, gflop: float, rate: float, changes: Mapping[str, object]
) -> dict[str, float]:
    """Our training by its own clock: the median interval between two rows of its history, after the first."""
    unet = random_weights(lambda: UNet2DConditionModel(**sizes.unet))
    cache = random_cache(4 * batch, 4, side // 8, 77, 768)
    settings = PARAMS.train.model_copy(
        update={
            "steps": STEPS,
            "validate_every": STEPS,
            "batch_size": batch,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "rank": RANK,
            "alpha": float(RANK),
            **changes,
        }
    )
    ends: list[float] = []

    def on_log(step: int, row: Mapping[str, float]) -> None:
        if step:
            ends.append(step * batch / row["images_per_second"])

    latents = Latents(cache, random_cache(1, 4, side // 8, 77, 768))
    train(unet, DDPMScheduler(beta_schedule="scaled_linear"), latents, settings, seed=0, on_log=on_log)
    intervals = [later - earlier for earlier, later in pairwise(ends)]
    return _rate(median(intervals) / (STEPS / len(ends)) / batch, gflop, rate) | {"first_rows_s": ends[0]}


def with_plain_layers(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure compiled training without the forms and options of compiled_layers.py: what they are worth."""
    step = "bestiary.diffusion.fast_step"
    with patch(f"{step}.use_compiled_forms"), patch(f"{step}.INDUCTOR_OPTIONS", {}):
        return measure()


def official_script(
    sizes: Models, side: int, batch: int, gflop: float, rate: float, compiled: bool
) -> dict[str, float]:
    """The step of diffusers' script, as its documentation and options describe it."""
    unet = random_weights(lambda: UNet2DConditionModel(**sizes.unet))
    vae = random_weights(lambda: AutoencoderKL(**sizes.vae))
    text_encoder = CLIPTextModel(CLIPTextConfig(**sizes.text)).to(DEVICE, DTYPE)
    parameters = inject(unet, rank=RANK, alpha=RANK, dropout=0.0, targets=PARAMS.train.targets, seed=0)
    for parameter in parameters:
        parameter.data = parameter.data.to(DTYPE)
    unet.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    pixels = torch.rand(batch, 3, side, side, device=DEVICE) * 2 - 1
    tokens = torch.ones(batch, 77, dtype=torch.long, device=DEVICE)
    predict: Any = torch.compile(unet, dynamic=False) if compiled else unet

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels.to(DTYPE)).latent_dist.sample() * 0.18215
            features = text_encoder(tokens, return_dict=False)[0]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (batch,), device=DEVICE)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(DEVICE.type, DTYPE, enabled=HALF):
            prediction = predict(noisy, timesteps, features, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.repeat(batch).mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.detach().item()

    for _ in range(3):
        step()
    return _rate(median(seconds(step) for _ in range(8)) / batch, gflop, rate)


def encoding(sizes: Models, side: int, compiled: bool) -> dict[str, float]:
    """The encode stage's VAE encoder on pixels that are on the device already."""
    vae = random_weights(lambda: AutoencoderKL(**sizes.vae)).to(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (16, 3, side, side), device=DEVICE, dtype=torch.uint8)
    encoder = VaeEncoder(vae, compiled=compiled)
    with torch.inference_mode():
        for _ in range(3):
            encoder(pixels)
        return _rate(median(seconds(lambda: [encoder(pixels) for _ in range(5)]) for _ in range(5)) / 5 / len(pixels))


def drawing(sizes: Models, side: int, steps: int, scale: float, batch: int) -> dict[str, float]:
    """Pictures a second as `bestiary generate` draws them."""
    pipeline = _pipeline(sizes)
    sampling = Sampling("dpmsolver++", steps=steps, guidance_scale=scale, width=side, height=side)

    def draw() -> None:
        generate(pipeline, ["a zebra"] * batch, range(batch), sampling, batch_size=batch)

    draw()
    return _rate(median(seconds(draw) for _ in range(3)) / batch)


# ---- small GPUs ----


def low_memory(sizes: Models, quick: bool) -> dict[str, Callable[[], dict[str, float]]]:
    """The three stages that load networks, one image at a time, with a part of the card's memory."""
    jobs: dict[str, Callable[[], dict[str, float]]] = {}
    side = 64 if quick else 512
    for gigabytes in LOW_MEMORY[: 1 if quick else 2]:
        for stage, work in {"encode": _encode_alone, "train": _train_alone, "evaluate": _evaluate_alone}.items():
            jobs[f"low memory {gigabytes} GB, {stage}"] = partial(_capped, gigabytes, partial(work, sizes, side))
    return jobs


def _capped(gigabytes: int, work: Callable[[], float]) -> dict[str, float]:
    """Run `work`, which returns images per second, with limited GPU memory. On a CPU there is no limit.

    peak_gib, which `main` adds, is what torch's allocator held; outside_gib is what CUDA and its libraries take.
    """
    if not GPU:
        return {"images_per_second": work()}
    free, total = torch.cuda.mem_get_info()
    limit = (gigabytes - OUTSIDE_GIB) * 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        rate = work()
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        return {"images_per_second": rate, "limit_gib": limit / 2**30, "outside_gib": outside / 2**30}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _encode_alone(sizes: Models, side: int) -> float:
    """One image and its mirror image through the autoencoder's encoder."""
    vae = random_weights(lambda: AutoencoderKL(**sizes.vae)).to(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (2, 3, side, side), device=DEVICE, dtype=torch.uint8)
    encoder = VaeEncoder(vae, compiled=False)
    with torch.inference_mode():
        encoder(pixels)
        return 3 * len(pixels) / seconds(lambda: [encoder(pixels) for _ in range(3)])


def _train_alone(sizes: Models, side: int) -> float:
    """Training with `train.low_memory` and everything that the stage loads: pipeline and judge, and the sheet."""
    pipeline, judge = _pipeline(sizes), _judge(sizes, "cpu")  # where the stage keeps it then
    steps = 2 if sizes is SMALL else 8
    settings = PARAMS.train.model_copy(
        update={
            "low_memory": True,
            "batch_size": 4,
            "min_snr_gamma": 5.0,
            "sheet_animals": 1,
            "sheet_seeds": 2,
            "sheet_guidance_scale": 7.5,
            "steps": steps,
            "validate_every": steps // 2,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "rank": RANK,
            "alpha": float(RANK),
            "sheet_steps": 2,
        }
    )
    latents = Latents(random_cache(8, 4, side // 8, 77, 768), random_cache(1, 4, side // 8, 77, 768))
    rates: list[float] = []

    def on_log(step: int, row: Mapping[str, float]) -> None:
        if step:
            rates.append(row["images_per_second"])

    with tempfile.TemporaryDirectory() as folder:
        subjects = [Subject("zebra", "zebra", "斑马")]
        plan = SheetPlan(subjects, settings, settings.sheet_sampling(side), seed=0, at_once=1)
        watch = TrainingWatch(pipeline, judge, plan, folder=Path(folder))
        train(
            pipeline.unet,
            pipeline.scheduler,
            latents,
            settings,
            seed=0,
            on_log=on_log,
            on_validation=watch.draw,
        )
    return rates[-1]


def _evaluate_alone(sizes: Models, side: int) -> float:
    """Draw guided pictures one at a time and judge them, with pipeline and judge on the card."""
    pipeline, judge = _pipeline(sizes), _judge(sizes, DEVICE.type)
    sampling = Sampling("dpmsolver++", steps=4, guidance_scale=7.5, width=side, height=side)

    def evaluate() -> None:
        judge.image_features(generate(pipeline, ["a zebra"] * 2, range(2), sampling, batch_size=1))

    evaluate()
    return 2 / seconds(evaluate)


def _judge(sizes: Models, device: str) -> Judge:
    """A CLIP ViT-B/32 with random weights, with as many layers as the text encoder."""
    layers = {"num_hidden_layers": sizes.text["num_hidden_layers"]}
    config = CLIPConfig(text_config=layers, vision_config=layers)
    return Judge(CLIPModel(config), _tokenizer(), CLIPImageProcessorPil(), device)


# ---- tools ----


def _pipeline(sizes: Models) -> StableDiffusionPipeline:
    """A base with random weights."""
    pipeline = StableDiffusionPipeline(
        vae=random_weights(lambda: AutoencoderKL(**sizes.vae)),
        text_encoder=CLIPTextModel(CLIPTextConfig(**sizes.text)).to(DEVICE, DTYPE),
        tokenizer=_tokenizer(),
        unet=random_weights(lambda: UNet2DConditionModel(**sizes.unet)),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<|startoftext|>": 0, "<|endoftext|>": 1}, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )


def _rate(seconds_per_image: float, gflop: float | None = None, rate: float | None = None) -> dict[str, float]:
    numbers = {"images_per_second": 1 / seconds_per_image}
    if gflop and rate:
        numbers["share_of_matmul_rate"] = gflop / seconds_per_image / (1000 * rate)
    return numbers


if __name__ == "__main__":
    main()
