"""Our default way of drawing beside the original system's: DDPM, 100 steps, guidance at every step.

In both, the adapter is applied beside the weights, as by `bestiary generate` and on the page. On the bundled base with
scores by the judge, and at the exact size of Stable Diffusion 1.5 with random weights, where a few steps are timed and
scaled.

    python benchmarks/inference.py                # about 3 minutes on two cores
    python benchmarks/inference.py --steps 8 20   # our default with these numbers of steps, too
    python benchmarks/inference.py --quick        # a small trial of the benchmark itself: its numbers mean nothing

Prints a table of each; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from training import (
    SMALL,
    STABLE_DIFFUSION,
    TARGETS,
    Models,
    in_another_process,
    random_weights,
    rounded,
    show,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bestiary.diffusion.adapter import apply_adapter, inject, save_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.base import device_and_dtype, load_pipeline, load_unet
from bestiary.diffusion.sampling import generate
from bestiary.evaluation.benchmark import Setting, default_setting, draw_timed
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import Jobs, make_jobs, read_class_texts, view
from bestiary.evaluation.profiling import Cost, environment, stopwatch
from bestiary.evaluation.report import Estimate
from bestiary.evaluation.scoring import (
    Array,
    ClassTexts,
    JudgedImages,
    bootstrap_cmmd,
    bootstrap_mean,
    resample,
    resample_counts_by_class,
    score,
)
from bestiary.memory import keep_freed_memory
from bestiary.params import Evaluate, load_params
from bestiary.samplers import Sampling

ROOT = Path(__file__).parents[1]
ORIGINAL = Setting("ddpm", 100, batch=1, fused=False)
PICTURES_PER_CLASS = 3
TIMED_CALLS = 5
WARM_UP_STEPS = 2
BATCH_SIZE = 16  # of pictures that are judged and not timed
RESOLUTION, TIMED_STEPS = 512, 3  # of the large pipeline


@dataclass(frozen=True)
class Bundled:
    """A way of drawing on the bundled base.

    cmmd_to_original compares all pictures with the original's, drawn from other noise: 0 for pictures of one kind.
    """

    scheduler: str
    steps: int
    p50_s: float
    p95_s: float
    peak_memory_mib: float
    cmmd_to_original: Estimate | None
    clip_score: float
    clip_score_minus_original: Estimate
    top1: float | None  # None with one class
    top1_minus_original: Estimate | None
    times_faster: float


@dataclass(frozen=True)
class Scaled:
    """A way of drawing at the size of Stable Diffusion 1.5: text + steps x the median step + decoding."""

    scheduler: str
    steps: int
    text_s: float
    step_s: float
    decode_s: float
    scaled_s: float
    times_faster: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """The cost and the judged pictures of one way of drawing."""

    sampling: Sampling
    cost: Cost
    judged: JudgedImages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two classes and few steps, and small models")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="also measure our default with these steps")
    arguments = parser.parse_args()
    machine = asdict(environment())
    show("environment", machine)
    with TemporaryDirectory() as folder:
        adapter = find_adapter(Path(folder))
        bundled = measure_bundled(adapter, arguments.steps, arguments.quick)
    print_table({name: asdict(row) for name, row in bundled.items()})
    side, models = (64, SMALL) if arguments.quick else (RESOLUTION, STABLE_DIFFUSION)
    scaled = measure_large(models, side)
    print_table({name: asdict(row) for name, row in scaled.items()})
    result = {
        "benchmark": "inference",
        "quick": arguments.quick,
        "environment": machine,
        "bundled": {
            "adapter": "trained" if adapter.parent == ROOT / "models" else "fresh",
            "pictures": PICTURES_PER_CLASS * len(class_names(arguments.quick)),
            **{name: asdict(row) for name, row in bundled.items()},
        },
        "sd15_size": {
            "resolution": side,
            "timed_steps": TIMED_STEPS,
            **{name: asdict(row) for name, row in scaled.items()},
        },
    }
    print(json.dumps(result, default=Estimate.model_dump))


# ---- the bundled base ----


def measure_bundled(adapter: Path, other_steps: Sequence[int], quick: bool) -> dict[str, Bundled]:
    """Draw the same prompts and noise in each way, and compare the ways by seconds and by the judge's scores.

    The samplers are stochastic, so a picture of one way is not expected to equal the picture of another. Only all
    pictures together can be compared, by CMMD, and from other noise.
    """
    evaluate = load_params(ROOT / "params.yaml").evaluate
    judge = Judge.load(str(ROOT / "models" / "judge"), device=device_and_dtype()[0].type)
    classes = class_names(quick)
    jobs = make_jobs(classes, list(range(len(classes))) * PICTURES_PER_CLASS, evaluate.template, first_seed=0)
    other_jobs = replace(jobs, seeds=[seed + len(jobs.seeds) for seed in jobs.seeds])
    texts = read_class_texts(judge, classes, evaluate.template)
    pipeline = load_pipeline(ROOT / "models" / "base")
    apply_adapter(pipeline, adapter)
    samplings = {name: setting.sampling(evaluate.sampling()) for name, setting in ways(evaluate, other_steps, quick)}
    drawn = {name: draw(pipeline, jobs, sampling, judge) for name, sampling in samplings.items()}
    original = resample(drawn["original"].judged, evaluate.bootstrap_resamples, seed=1)
    counts = resample_counts_by_class(np.asarray(jobs.labels), evaluate.bootstrap_resamples, seed=0)
    rows = {}
    for name, one in drawn.items():
        distance = None
        if name != "original":
            images = generate(pipeline, other_jobs.prompts, other_jobs.seeds, one.sampling, batch_size=BATCH_SIZE)
            judged = view(judge, images, jobs.labels)
            distance = bootstrap_cmmd(resample(judged, evaluate.bootstrap_resamples, seed=0), original).estimate()
        rows[name] = compare(one, drawn["original"], texts, counts, distance)
    return rows


def ways(evaluate: Evaluate, other_steps: Sequence[int], quick: bool) -> list[tuple[str, Setting]]:
    """The original's way of drawing, our default, and our default with other numbers of steps."""
    default = default_setting(evaluate)
    others = [(f"default_{steps}_steps", replace(default, steps=steps)) for steps in other_steps]
    return [("original", replace(ORIGINAL, steps=4) if quick else ORIGINAL), ("default", default), *others]


def draw(pipeline: StableDiffusionPipeline, jobs: Jobs, sampling: Sampling, judge: Judge) -> Drawn:
    """Time single pictures, then draw and judge all pictures."""
    draw_timed(pipeline, jobs, replace(sampling, steps=WARM_UP_STEPS), batch=1, repeats=1)
    cost, _ = draw_timed(pipeline, jobs, sampling, batch=1, repeats=TIMED_CALLS)
    images = generate(pipeline, jobs.prompts, jobs.seeds, sampling, batch_size=BATCH_SIZE)
    return Drawn(sampling, cost, view(judge, images, jobs.labels))


def compare(one: Drawn, original: Drawn, texts: ClassTexts, counts: Array, distance: Estimate | None) -> Bundled:
    """A way of drawing beside the original's."""
    scores, original_scores = score(one.judged, texts), score(original.judged, texts)
    clip_score, of_original = (bootstrap_mean(each["clip_score"], counts) for each in (scores, original_scores))
    top1 = bootstrap_mean(scores["top1"], counts) if "top1" in scores else None
    return Bundled(
        scheduler=one.sampling.sampler,
        steps=one.sampling.steps,
        p50_s=one.cost.p50_s,
        p95_s=one.cost.p95_s,
        peak_memory_mib=one.cost.peak_memory_mib,
        cmmd_to_original=distance,
        clip_score=clip_score.mean,
        clip_score_minus_original=(clip_score - of_original).estimate(),
        top1=top1.mean if top1 else None,
        top1_minus_original=(
            (top1 - bootstrap_mean(original_scores["top1"], counts)).estimate() if top1 is not None else None
        ),
        times_faster=original.cost.p50_s / one.cost.p50_s,
    )


def class_names(quick: bool) -> list[str]:
    """The classes of the sample; the first two for a quick trial."""
    classes = sorted(path.name for path in (ROOT / "samples").iterdir() if path.is_dir())
    return classes[:2] if quick else classes


def find_adapter(folder: Path) -> Path:
    """The adapter that the pipeline trained; before a training, an untrained one in `folder` that costs the same."""
    trained = ROOT / "models" / "adapter"
    if (trained / FILE_NAME).is_file():
        return trained
    unet = load_unet(ROOT / "models" / "base")
    inject(unet, rank=4, alpha=8, dropout=0.0, targets=TARGETS, seed=0)
    save_adapter(unet, folder, Provenance())
    return folder


# ---- at the size of Stable Diffusion 1.5 ----


def measure_large(models: Models, side: int) -> dict[str, Scaled]:
    """Time a few steps of the original's way and of our default, and scale them to all steps."""
    original = in_another_process(time_steps, models, ORIGINAL.sampling(real_sampling(side)))
    keep_freed_memory()  # as load_pipeline does
    default = time_steps(models, real_sampling(side))
    return {
        "original": original,
        "default": replace(default, times_faster=original.scaled_s / default.scaled_s),
    }


def real_sampling(side: int) -> Sampling:
    """How the profile `sciencedb` evaluates, at `side` pixels a side."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_text(yaml.safe_dump(content | {"profile": "sciencedb"}), encoding="utf-8")
        return load_params(path).evaluate.sampling(side)


def time_steps(models: Models, sampling: Sampling) -> Scaled:
    """Draw one picture in a few steps with random weights, and scale its seconds to all steps."""
    pipeline = random_pipeline(models)
    inject(pipeline.unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
    ends: list[float] = []

    def progress(_done: int, _total: int) -> None:
        ends.append(time.perf_counter())

    few_steps = replace(sampling, steps=TIMED_STEPS)
    with stopwatch(pipeline) as seconds:
        generate(pipeline, ["a photo of a tiger"], [0], few_steps, batch_size=1, progress=progress)
    step_s = float(np.median(np.diff(ends)))  # without the first step, which warms up
    return Scaled(
        scheduler=sampling.sampler,
        steps=sampling.steps,
        text_s=seconds.text,
        step_s=step_s,
        decode_s=seconds.decode,
        scaled_s=seconds.text + sampling.steps * step_s + seconds.decode,
    )


def random_pipeline(models: Models) -> StableDiffusionPipeline:
    """A pipeline of these models with random weights."""
    device, dtype = device_and_dtype()
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "base" / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(**{**models.text, "vocab_size": 49408})  # the tokenizer gives ids up to this
    pipeline = StableDiffusionPipeline(
        vae=random_weights(lambda: AutoencoderKL(**models.vae)),
        text_encoder=CLIPTextModel(text).to(dtype).eval(),
        tokenizer=tokenizer,
        unet=random_weights(lambda: UNet2DConditionModel(**models.unet)).eval(),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


# ---- tables ----


def print_table(columns: Mapping[str, Mapping[str, object]]) -> None:
    """Print a Markdown table with a column for each way of drawing and a line for each number."""
    names = list(next(iter(columns.values())))
    lines = [["", *columns], ["---", *("---" for _ in columns)]]
    lines += [[name, *(as_text(column[name]) for column in columns.values())] for name in names]
    print("", *(f"| {' | '.join(line)} |" for line in lines), "", sep="\n", flush=True)


def as_text(value: object) -> str:
    """A number, or an estimate with its interval."""
    if not isinstance(value, Estimate):
        return rounded(value)
    low, high = value.ci95
    return f"{value.mean:+.3g} ({low:+.3g} to {high:+.3g})"


if __name__ == "__main__":
    main()
