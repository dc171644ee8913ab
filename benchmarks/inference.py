"""Our default way of drawing beside the original system's: DDPM, 100 steps, guidance at every step. The adapter stands
beside the weights in both, as `bestiary generate` and the page have it. On the embedded base with what the judge says
of both, and at Stable Diffusion 1.5's exact size with random weights, where a few steps are timed and scaled. Prints a
table of each; the last line is JSON.

python benchmarks/inference.py [--quick] [--steps N ...]     --steps: our default with other numbers of steps, too
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from training import TARGETS, TEXT, UNET, VAE, by_itself, random_weights, table, tell
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bestiary.diffusion.adapter import apply_adapter, inject, save_adapter
from bestiary.diffusion.base import device_and_dtype, load_pipeline, load_unet
from bestiary.diffusion.sampling import generate
from bestiary.evaluation import pictures, scoring
from bestiary.evaluation.benchmarking import Setting, Trial, environment, measure, stopwatch
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.scoring import bootstrap_mean, resample_counts
from bestiary.memory import keep_freed_memory
from bestiary.params import load_params
from bestiary.subjects import caption, subject_of

ROOT = Path(__file__).parents[1]
ORIGINAL = Setting("ddpm", 100, batch=1, fused=False)
PICTURES_A_CLASS = 3
REPEATS = 5  # of a timed picture
RESOLUTION, TIMED_STEPS = 512, 3  # of the large pipeline


def main() -> None:
    """Measure, print both tables, and one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="as few pictures and steps as show that it runs")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="our default with these steps, too")
    arguments = parser.parse_args()
    measured_on = environment()
    tell("environment", **measured_on)
    result = {"benchmark": "inference", "quick": arguments.quick, "environment": measured_on}
    with TemporaryDirectory() as folder:
        result["embedded"] = embedded(Path(folder), arguments.steps, arguments.quick)
    result["sd15_size"] = sd15_size(arguments.quick)
    print(json.dumps(result))


def embedded(folder: Path, other_steps: list[int], quick: bool) -> dict[str, Any]:
    """Seconds a picture, and what the judge says of the same prompts and noise.

    Both samplers add noise on their way, so no picture of one should be one of the other's. Whether they draw alike is
    asked of all pictures together, from noise of their own: CMMD between them, 0 for pictures of one kind.
    """
    evaluate = load_params(ROOT / "params.yaml").evaluate
    default = Setting(evaluate.scheduler, evaluate.steps, batch=1, fused=False)
    ours = {"default": default, **{f"default_{n}_steps": replace(default, steps=n) for n in other_steps}}
    original = Setting("ddpm", 4, 1, False) if quick else ORIGINAL
    adapter = trained_or_fresh_adapter(folder)
    judge = Judge.load(str(ROOT / "models" / "judge"), device=device_and_dtype()[0].type)
    classes = sorted(path.name for path in (ROOT / "samples").iterdir() if path.is_dir())[: 2 if quick else None]
    labels = [label for _ in range(PICTURES_A_CLASS) for label in range(len(classes))]
    prompts = [caption(subject_of(classes[label]), evaluate.template) for label in labels]
    words = pictures.read_words(judge, classes, evaluate.template)
    trial = Trial(prompts, labels, list(range(len(labels))), words, judge)
    pipeline = load_pipeline(ROOT / "models" / "base")
    apply_adapter(pipeline, adapter)
    draw = partial(generate, pipeline, guidance_scale=evaluate.guidance_scale)
    rows = {"original": embedded_row(draw, pipeline, original, trial)}
    draw = partial(draw, guidance_interval=evaluate.guidance_interval)
    rows |= {name: embedded_row(draw, pipeline, setting, trial) for name, setting in ours.items()}

    counts, other_counts = (resample_counts(len(labels), evaluate.bootstrap_resamples, seed) for seed in (0, 1))
    drawn = {name: row.pop("images") for name, row in rows.items()}
    seen = {name: pictures.view(judge, images, labels) for name, images in drawn.items()}
    scores = {name: scoring.score(views, words) for name, views in seen.items()}
    for name, row in rows.items():
        row["cmmd_to_original"] = None
        if name != "original":
            how = {"scheduler": row["scheduler"], "steps": row["steps"], "batch_size": 16}
            others = draw(prompts, [seed + len(labels) for seed in trial.seeds], **how)
            sides = pictures.view(judge, others, labels).features, seen["original"].features
            row["cmmd_to_original"] = scoring.bootstrap_cmmd(*sides, counts, other_counts).report()
        for key in ("clip_score", "top1"):
            mine, theirs = (bootstrap_mean(scores[which][key], counts) for which in (name, "original"))
            row |= {key: mine.mean, f"{key}_minus_original": (mine - theirs).report()}
        row["times_faster"] = rows["original"]["p50_s"] / row["p50_s"]
    told(rows)
    return {"adapter": "trained" if adapter.parent == ROOT / "models" else "fresh", "pictures": len(labels), **rows}


def embedded_row(draw: Any, pipeline: Any, setting: Setting, trial: Trial) -> dict[str, Any]:
    """What one picture costs, and all pictures of the trial, drawn in batches and not timed."""
    draw(*trial.take([0]), scheduler=setting.scheduler, steps=2, batch_size=1)  # to warm up
    row, _ = measure(draw, pipeline, setting, trial, REPEATS)
    images = draw(trial.prompts, trial.seeds, scheduler=setting.scheduler, steps=setting.steps, batch_size=16)
    return {key: row[key] for key in ("scheduler", "steps", "p50_s", "p95_s", "peak_memory_mib")} | {"images": images}


def sd15_size(quick: bool) -> dict[str, Any]:
    """Seconds a picture of both ways, from a few steps: text + steps x the median step + decoding."""
    side = 64 if quick else RESOLUTION
    ours = yaml.safe_load((ROOT / "params.yaml").read_text())["profiles"]["sciencedb"]["evaluate"]
    setting = Setting(ours["scheduler"], ours["steps"], batch=1, fused=False)
    original = by_itself(sd15_row, ORIGINAL, ours["guidance_scale"], side)
    keep_freed_memory()  # as load_pipeline does
    default = sd15_row(setting, ours["guidance_scale"], side)
    rows = {"original": original, "default": default}
    for row in rows.values():
        row["times_faster"] = original["scaled_s"] / row["scaled_s"]
    told(rows)
    return {"resolution": side, "timed_steps": TIMED_STEPS, **rows}


def sd15_row(setting: Setting, guidance_scale: float, side: int) -> dict[str, Any]:
    pipeline = random_pipeline()
    inject(pipeline.unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    ends: list[float] = []
    with stopwatch(pipeline) as lap:
        generate(
            pipeline,
            ["a photo of a tiger"],
            [0],
            scheduler=setting.scheduler,
            steps=TIMED_STEPS,
            guidance_scale=guidance_scale,
            batch_size=1,
            resolution=side,
            progress=lambda _done, _total: ends.append(time.perf_counter()),
        )
    step = float(np.median(np.diff(ends)))  # without the first, which warms up
    row = {"scheduler": setting.scheduler, "steps": setting.steps}
    row |= {"text_s": lap["text"], "step_s": step, "decode_s": lap["decode"]}
    return row | {"scaled_s": lap["text"] + setting.steps * step + lap["decode"]}


def random_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's parts with random weights."""
    device, dtype = device_and_dtype()
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "base" / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(**TEXT | {"vocab_size": 49408})  # as many tokens as the tokenizer may know
    pipeline = StableDiffusionPipeline(
        vae=random_weights(lambda: AutoencoderKL(**VAE)),
        text_encoder=CLIPTextModel(text).to(dtype).eval(),
        tokenizer=tokenizer,
        unet=random_weights(lambda: UNet2DConditionModel(**UNET)).eval(),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def trained_or_fresh_adapter(folder: Path) -> Path:
    """The pipeline's own adapter where it has run, else one that has learned nothing and costs the same."""
    trained = ROOT / "models" / "adapter"
    if (trained / "pytorch_lora_weights.safetensors").is_file():
        return trained
    unet = load_unet(ROOT / "models" / "base")
    inject(unet, rank=4, alpha=8, dropout=0.0, targets=TARGETS, seed=0)
    save_adapter(unet, folder, {})
    return folder


def told(rows: dict[str, dict[str, Any]]) -> None:
    """Print the rows as a table; a difference with its interval."""

    def plain(value: Any) -> Any:
        return "{mean:+.3g} ({ci95[0]:+.3g} to {ci95[1]:+.3g})".format(**value) if isinstance(value, dict) else value

    shown = [{"": name} | {key: plain(value) for key, value in row.items()} for name, row in rows.items()]
    print("", table(shown), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
