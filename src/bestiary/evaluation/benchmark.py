"""Measure what a picture costs with each setting, in seconds and memory, and the quality that it buys."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from bestiary.errors import BestiaryError
from bestiary.evaluation.pictures import Jobs, make_jobs, read_class_texts
from bestiary.evaluation.profiling import Cost, Machine, environment, measure, this_machine
from bestiary.evaluation.scoring import ClassTexts, JudgedImages, score, unit
from bestiary.evaluation.timing import TooLongError, time_limit
from bestiary.samplers import SAMPLERS, Sampling
from bestiary.subjects import Subjects

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.diffusion.full_memory import Halving
    from bestiary.evaluation.cold_start import ColdStart
    from bestiary.evaluation.judge import Judge
    from bestiary.params import Benchmark, Evaluate

Guidance = Literal["always", "interval", "never"]
Value = str | int | float | bool | None  # of a table's cell
OPTIONAL = ("peak_device_memory_mib", "compile_s", "with_loading_s")  # missing in rows where they were not measured
# Converged pictures are drawn with this sampler in CONVERGED_FACTOR times the most steps measured, within these bounds.
# After 100 steps, pictures of the bundled base are within 0.5 (of 255) of their limit.
CONVERGED_SAMPLER, MIN_CONVERGED_STEPS, MAX_CONVERGED_STEPS = "dpmsolver++", 100, 1000
CONVERGED_FACTOR = 2.5
WARM_UP_STEPS = 2  # allocate as much memory as more steps would
COMPILE_SECONDS = 60.0  # expected, for the progress bar
COMPILE_LIMIT_SECONDS = 600.0  # after which a compiled setting is skipped


@dataclass(frozen=True)
class Setting:
    """One way to draw.

    fused: the adapter's weights are added to the base's, so that they cost nothing at each step. guidance: at every
    step ("always"), only at the noise levels of an interval (arXiv:2404.07724), or "never". vae: "full", or "tiny" for
    a distilled decoder.
    """

    scheduler: str
    steps: int
    batch: int
    fused: bool
    guidance: Guidance = "always"
    dtype: str = "float32"
    compiled: bool = False
    vae: str = "full"

    def sampling(self, default: Sampling) -> Sampling:
        """`default` with this setting's sampler, steps and guidance.

        The guidance scale and the guidance interval are those of `default`.

        >>> default = Sampling(guidance_scale=5.0, guidance_interval=(0.5, 6.0))
        >>> guided = Setting("ddim", 10, batch=1, fused=False, guidance="interval").sampling(default)
        >>> guided.steps, guided.guidance_scale, guided.guidance_interval
        (10, 5.0, (0.5, 6.0))
        """
        return replace(
            default,
            sampler=self.scheduler,
            steps=self.steps,
            guidance_scale=1.0 if self.guidance == "never" else default.guidance_scale,
            guidance_interval=default.guidance_interval if self.guidance == "interval" else None,
        )


@dataclass(frozen=True)
class Skipped:
    """A setting that this base or this machine cannot run, and why."""

    setting: Setting
    reason: str

    def to_dict(self) -> dict[str, Value]:
        """This as reports/benchmark.json holds it: flat."""
        return {**asdict(self.setting), "reason": self.reason}


class CannotCompileError(Exception):
    """torch.compile or one of its backends failed."""


@dataclass(frozen=True)
class Quality:
    """How good a setting's pictures are.

    quality is their CLIP score (100 x cosine), top1 the percentage that the judge recognises among the classes (None
    with one class). distance_to_converged is
    their root mean square difference (0 to 255) from what many more steps make of the same noise with the same
    guidance; None for stochastic samplers, which do not converge.
    """

    quality: float
    top1: float | None
    distance_to_converged: float | None


@dataclass(frozen=True)
class Row:
    """The result of one setting.

    compile_s is what torch.compile adds to the first call. with_loading_s is the time of a picture together with the
    imports and the loading before it.
    """

    setting: Setting
    cost: Cost
    quality: Quality
    compile_s: float | None = None
    with_loading_s: float | None = None

    def to_dict(self) -> dict[str, Value]:
        """This as reports/benchmark.json holds it: flat, and without what was not measured."""
        row = {
            **asdict(self.setting),
            **asdict(self.cost),
            "compile_s": self.compile_s,
            **asdict(self.quality),
            "with_loading_s": self.with_loading_s,
        }
        return {key: value for key, value in row.items() if value is not None or key not in OPTIONAL}


@dataclass(frozen=True)
class BenchmarkReport:
    """What the benchmark measured at `resolution` pixels a side."""

    resolution: int
    adapter_sha256: str
    start: ColdStart
    rows: Sequence[Row]
    skipped: Sequence[Skipped]

    def results(self) -> dict[str, object]:
        """What the same inputs give again: the quality of each setting's pictures, ready for JSON."""
        return {
            "resolution": self.resolution,
            "adapter_sha256": self.adapter_sha256,
            "quality": [{**asdict(row.setting), **asdict(row.quality)} for row in self.rows],
        }

    def costs(self) -> dict[str, object]:
        """What depends on the machine: its description, seconds and memory, and what it cannot run, ready for JSON."""
        return {
            "environment": asdict(environment()),
            "cold_start_s": self.start.total_s,
            "cold_start": asdict(self.start.parts),
            "rows": [row.to_dict() for row in self.rows],
            "skipped": [setting.to_dict() for setting in self.skipped],
            "fastest_good": fastest_good(self.rows).to_dict(),
        }


@dataclass(frozen=True)
class Trial:
    """The pictures that every setting draws, and the judge that scores them against the classes' texts."""

    jobs: Jobs
    texts: ClassTexts
    judge: Judge

    @classmethod
    def of(
        cls,
        judge: Judge,
        classes: Sequence[str],
        template: str,
        count: int,
        seed: int,
        subjects: Subjects | None = None,
    ) -> Trial:
        """`count` pictures, spread evenly over the classes, with the seeds from `seed` on."""
        labels = [index * len(classes) // count for index in range(count)]
        return cls(
            make_jobs(classes, labels, template, seed, subjects),
            read_class_texts(judge, classes, template, subjects),
            judge,
        )


def _untimed_fitting() -> Halving:
    from bestiary.diffusion.full_memory import Halving

    return Halving("Drawing", "evaluate.batch_size")


@dataclass(frozen=True)
class Bench:
    """What all settings of a benchmark have in common.

    load gives the base in a dtype. sampling holds the size, the guidance scale and the guidance interval. repeats is
    the number of timed calls. untimed_batch is the batch size of pictures that are only judged. load_tiny_decoder loads
    a tiny decoder for a pipeline.
    """

    load: Callable[[str], StableDiffusionPipeline]
    adapter: Path
    trial: Trial
    sampling: Sampling
    repeats: int
    untimed_batch: int
    load_tiny_decoder: Callable[[StableDiffusionPipeline], AutoencoderTiny] | None = None
    fitting: Halving = field(default_factory=_untimed_fitting)  # for pictures that are only judged


def default_setting(evaluate: Evaluate, dtype: str = "float32") -> Setting:
    """How `bestiary generate` draws a single picture."""
    guidance: Guidance = "interval" if evaluate.guidance_interval else "always"
    return Setting(evaluate.scheduler, evaluate.steps, batch=1, fused=False, guidance=guidance, dtype=dtype)


def plan(settings: Benchmark, default: Setting, *, tiny_decoder: bool = False) -> list[Setting]:
    """The settings to measure, each once. With `tiny_decoder`, they include the default with a tiny decoder.

    First the default, then the default with one thing changed, then every combination of sampler, steps and batch size.
    """
    variants = [
        replace(default, fused=True),
        *(replace(default, guidance=guidance) for guidance in settings.guidance),
        *(replace(default, dtype=other) for other in settings.dtypes),
        *(replace(default, compiled=compiled) for compiled in settings.compile),
        *([replace(default, vae="tiny")] if tiny_decoder else []),
    ]
    combinations = [
        replace(default, scheduler=name, steps=count, batch=batch)
        for name, count, batch in product(settings.schedulers, settings.steps, settings.batch_sizes)
    ]
    return list(dict.fromkeys([default, *variants, *combinations]))


def reason_to_skip(setting: Setting, pipeline: StableDiffusionPipeline, machine: Machine) -> str | None:
    """Why this base or this machine cannot run the setting; None when it can."""
    from bestiary.diffusion.sampling import is_lcm, max_lcm_steps

    device = machine.device_type
    if setting.scheduler == "lcm" and not is_lcm(pipeline):
        return "the base is not a latent consistency model"
    if setting.scheduler == "lcm" and setting.steps > (most := max_lcm_steps(pipeline)):
        return f"a latent consistency model draws in at most {most} steps"
    if setting.guidance == "interval" and is_lcm(pipeline):
        return "a latent consistency model cannot be guided at only some steps"
    if setting.dtype == "float16" and device == "cpu":
        return "a CPU does not compute in float16"
    if setting.dtype == "bfloat16" and not machine.has_bfloat16:
        return f"this {'CPU' if device == 'cpu' else 'GPU'} has no instructions for bfloat16"
    if setting.compiled and not machine.can_compile:
        return f"torch.compile needs {'a C++ compiler' if device == 'cpu' else 'triton'}"
    return None


def run(bench: Bench, settings: Sequence[Setting]) -> tuple[list[Row], list[Skipped]]:
    """Measure each setting that this base and this machine can run; return a row for each, and the skipped settings.

    Raises BestiaryError when none of the settings can run.
    """
    pipeline = bench.load(settings[0].dtype)
    machine = this_machine(pipeline.device.type)
    reasons = {setting: reason_to_skip(setting, pipeline, machine) for setting in settings}
    skipped = [Skipped(setting, reason) for setting, reason in reasons.items() if reason]
    possible = [setting for setting, reason in reasons.items() if reason is None]
    if not possible:
        raise BestiaryError(
            f"No setting of the benchmark can run here: {skipped[0].reason}. Change `benchmark` in params.yaml."
        )
    converged = _draw_converged(bench, pipeline, possible)
    del pipeline
    rows: dict[Setting, Row] = {}
    with tqdm(total=len(possible), desc="measure settings", unit="setting") as bar:
        for dtype, fused in dict.fromkeys((setting.dtype, setting.fused) for setting in possible):
            gc.collect()  # otherwise the previous pipeline's memory would count as the next one's
            group = [setting for setting in possible if (setting.dtype, setting.fused) == (dtype, fused)]
            for found in _measure_group(bench, group, converged):
                if isinstance(found, Skipped):
                    skipped.append(found)
                else:
                    rows[found.setting] = found
                bar.update()
    if not rows:
        raise BestiaryError(f"{skipped[-1].reason.capitalize()} for every setting. Lower benchmark.batch_sizes.")
    return [rows[setting] for setting in possible if setting in rows], skipped


def draw_timed(
    pipeline: StableDiffusionPipeline, jobs: Jobs, sampling: Sampling, batch: int, repeats: int
) -> tuple[Cost, dict[int, Image]]:
    """Draw `repeats` batches, starting over after the last job; return their cost, and the pictures by job index."""
    batches = [[(repeat * batch + index) % len(jobs.seeds) for index in range(batch)] for repeat in range(repeats)]
    cost, drawn = measure(
        pipeline, [partial(_draw, pipeline, jobs.take(chosen), sampling, batch) for chosen in batches]
    )
    images: dict[int, Image] = {}
    for chosen, pictures in zip(batches, drawn, strict=True):
        images |= dict(zip(chosen, pictures, strict=True))
    return cost, images


def judge_quality(images: Mapping[int, Image], trial: Trial, converged: Sequence[Image] | None) -> Quality:
    """The judge's scores of a trial's pictures (by job index), and their distance to the converged pictures."""
    indices = sorted(images)
    features = trial.judge.image_features([images[index] for index in indices]).double().numpy()
    scores = score(JudgedImages(unit(features), np.asarray(trial.jobs.labels)[indices]), trial.texts)
    distances = [rms_difference(images[index], converged[index]) for index in indices] if converged else None
    return Quality(
        quality=float(scores["clip_score"].mean()),
        top1=float(scores["top1"].mean()) if "top1" in scores else None,
        distance_to_converged=float(np.mean(distances)) if distances else None,
    )


def fastest_good(rows: Sequence[Row], tolerance: float = 0.01) -> Row:
    """The fastest row whose quality is at most the share `tolerance` below the best row's.

    >>> cost = Cost(1.0, 1.1, 1.0, 0.1, 0.8, 0.1, peak_memory_mib=900.0, peak_device_memory_mib=None)
    >>> slow = Row(Setting("ddim", 50, batch=1, fused=False), cost, Quality(30.0, 90.0, None))
    >>> fast = Row(Setting("ddim", 20, batch=1, fused=False), replace(cost, images_per_second=2.5), slow.quality)
    >>> fastest_good([slow, fast]).setting.steps
    20
    """
    best = max(row.quality.quality for row in rows)
    enough = best - tolerance * abs(best)
    return max((row for row in rows if row.quality.quality >= enough), key=lambda row: row.cost.images_per_second)


def rms_difference(image: Image, other: Image) -> float:
    """The root mean square difference of two pictures' channels, from 0 to 255.

    >>> from PIL import Image
    >>> rms_difference(Image.new("RGB", (8, 8), (0, 0, 0)), Image.new("RGB", (8, 8), (10, 10, 10)))
    10.0
    """
    difference = np.asarray(image, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(np.sqrt((difference**2).mean()))


def fuse(pipeline: StableDiffusionPipeline) -> None:
    """Add the applied adapter to the base's weights, for good, so that it costs nothing at each step."""
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()


def _draw_converged(
    bench: Bench, pipeline: StableDiffusionPipeline, settings: Sequence[Setting]
) -> dict[str, list[Image]]:
    """The trial's converged pictures, for each guidance that is measured with a sampler that is not stochastic.

    Empty for a latent consistency model, because its sampler does not solve a differential equation.
    """
    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.sampling import is_lcm

    if is_lcm(pipeline):
        return {}
    steps = int(CONVERGED_FACTOR * max(setting.steps for setting in settings))
    steps = min(MAX_CONVERGED_STEPS, max(MIN_CONVERGED_STEPS, steps))
    by_guidance = {setting.guidance: setting for setting in settings if not SAMPLERS[setting.scheduler].stochastic}
    apply_adapter(pipeline, bench.adapter, bench.sampling.adapter_weight)
    return {
        guidance: _draw_untimed(
            bench,
            pipeline,
            bench.trial.jobs,
            replace(setting.sampling(bench.sampling), sampler=CONVERGED_SAMPLER, steps=steps),
        )
        for guidance, setting in by_guidance.items()
    }


def _measure_group(
    bench: Bench, settings: Sequence[Setting], converged: Mapping[str, Sequence[Image]]
) -> Iterator[Row | Skipped]:
    """Measure settings of the same dtype and fusing with one pipeline, which is freed afterwards.

    A setting that does not fit into a GPU's memory or does not compile is skipped.
    """
    import torch

    from bestiary.diffusion.adapter import apply_adapter

    pipeline = bench.load(settings[0].dtype)
    apply_adapter(pipeline, bench.adapter, bench.sampling.adapter_weight)
    if settings[0].fused:
        fuse(pipeline)
    full_vae, unet = pipeline.vae, pipeline.unet
    for setting in settings:
        tiny = bench.load_tiny_decoder if setting.vae == "tiny" else None
        pipeline.vae = tiny(pipeline) if tiny else full_vae
        pipeline.unet = torch.compile(unet) if setting.compiled else unet
        limit = None if SAMPLERS[setting.scheduler].stochastic else converged.get(setting.guidance)
        try:
            found: Row | Skipped = _measure_setting(bench, pipeline, setting, limit)
        except torch.OutOfMemoryError:
            found = Skipped(setting, "the GPU's memory is too small")
        except TooLongError:
            found = Skipped(setting, f"compiling takes more than {COMPILE_LIMIT_SECONDS:.0f} s")
        except CannotCompileError as error:
            found = Skipped(setting, f"torch.compile does not work on this machine ({type(error.__cause__).__name__})")
        yield found


def _measure_setting(
    bench: Bench, pipeline: StableDiffusionPipeline, setting: Setting, converged: Sequence[Image] | None
) -> Row:
    jobs, sampling = bench.trial.jobs, setting.sampling(bench.sampling)
    # torch.compile compiles once for each input shape, so the warm-up of a compiled UNet is the call that is timed.
    short = sampling if setting.compiled else replace(sampling, steps=min(WARM_UP_STEPS, sampling.steps))
    with _compiling() if setting.compiled else nullcontext():
        warm_up, _ = draw_timed(pipeline, jobs, short, setting.batch, repeats=1)
    cost, images = draw_timed(pipeline, jobs, sampling, setting.batch, bench.repeats)
    rest = [index for index in range(len(jobs.seeds)) if index not in images]
    if rest and setting.compiled:  # a batch of another size would be compiled again
        calls = math.ceil(len(rest) / setting.batch)
        _, others = draw_timed(pipeline, jobs.take(rest), sampling, setting.batch, calls)
        images |= {rest[index]: image for index, image in others.items()}
    elif rest:
        drawn = _draw_untimed(bench, pipeline, jobs.take(rest), sampling)
        images |= dict(zip(rest, drawn, strict=True))
    compile_s = warm_up.p50_s - cost.p50_s if setting.compiled else None
    return Row(setting, cost, judge_quality(images, bench.trial, converged), compile_s)


@contextmanager
def _compiling() -> Iterator[None]:
    """Show a moving bar while the model compiles.

    Raises TooLongError after COMPILE_LIMIT_SECONDS, and CannotCompileError when the compiler fails.
    """
    import torch

    from bestiary.diffusion.waiting import waiting_bar

    try:
        with waiting_bar(COMPILE_SECONDS), time_limit(COMPILE_LIMIT_SECONDS):
            yield
    except (BestiaryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a compiler and its backends raise
        raise CannotCompileError from error


def _draw_untimed(bench: Bench, pipeline: StableDiffusionPipeline, jobs: Jobs, sampling: Sampling) -> list[Image]:
    """Pictures that are only judged: a batch that does not fit into a GPU's memory is halved."""
    pictures: list[Image] = []
    numbers = range(len(jobs.seeds))
    for first in numbers[:: bench.untimed_batch]:
        batch = numbers[first : first + bench.untimed_batch]
        for part in bench.fitting.parts(lambda part: _draw(pipeline, jobs.take(part), sampling, len(part)), batch):
            pictures.extend(part)
    return pictures


def _draw(pipeline: StableDiffusionPipeline, jobs: Jobs, sampling: Sampling, batch_size: int) -> list[Image]:
    from bestiary.diffusion.sampling import generate

    return generate(pipeline, jobs.prompts, jobs.seeds, sampling, batch_size=batch_size)
