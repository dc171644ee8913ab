"""What a picture costs: seconds and memory of each setting of the sampler, with the quality that it buys."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from bestiary.errors import BestiaryError
from bestiary.settings import SAMPLERS
from bestiary.subjects import caption, subject_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.evaluation.judge import Judge
    from bestiary.evaluation.scoring import Words
    from bestiary.params import Benchmark, Evaluate

MIB = 2**20
# Within 0.5 of 255 of its end at 100 steps on the embedded base; the factor is of the most steps measured.
CONVERGED_SCHEDULER, LEAST_STEPS, CONVERGED_FACTOR, MOST_STEPS = "dpmsolver++", 100, 2.5, 1000
PARTS = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Setting:
    """One way to draw.

    fused: the adapter's weights are added into the base's, which costs nothing afterwards. guidance: at every step
    (always), at the noise levels of an interval only (arXiv 2404.07724), or never. vae: full, or tiny (a distilled
    decoder).
    """

    scheduler: str
    steps: int
    batch: int
    fused: bool
    guidance: str = "always"
    dtype: str = "float32"
    compiled: bool = False
    vae: str = "full"


def grid(
    schedulers: Sequence[str],
    steps: Sequence[int],
    batch_sizes: Sequence[int],
    default: Setting,
    **variants: Sequence[Any],
) -> list[Setting]:
    """The default setting; the same fused, or not if it is; the default with one of its fields as in `variants`; then
    all combinations of scheduler, steps and batch size."""
    varied = [replace(default, **{field: value}) for field, values in variants.items() for value in values]
    combinations = [
        replace(default, scheduler=name, steps=count, batch=batch)
        for name, count, batch in product(schedulers, steps, batch_sizes)
    ]
    return list(dict.fromkeys([default, replace(default, fused=not default.fused), *varied, *combinations]))


def plan(settings: Benchmark, default: Evaluate, dtype: str) -> list[Setting]:
    """The grid that the parameters ask for, around the setting that `bestiary generate` draws with."""
    usual = Setting(
        default.scheduler,
        default.steps,
        batch=1,
        fused=False,
        guidance="interval" if default.guidance_interval else "always",
        dtype=dtype,
    )
    return grid(
        settings.schedulers,
        settings.steps,
        settings.batch_sizes,
        usual,
        guidance=settings.guidance,
        dtype=settings.dtypes,
        compiled=settings.compile,
        vae=["tiny"] if settings.tiny_vae else [],
    )


def reason_to_skip(setting: Setting, pipeline: StableDiffusionPipeline) -> str | None:
    """Why this base or this machine cannot draw so, in words; None when it can."""
    from bestiary.diffusion.sampling import is_lcm, most_lcm_steps

    if setting.scheduler == "lcm" and not is_lcm(pipeline):
        return "the base is no latent consistency model"
    if setting.scheduler == "lcm" and setting.steps > (most := most_lcm_steps(pipeline)):
        return f"a latent consistency model takes at most {most} steps"
    if setting.guidance == "interval" and is_lcm(pipeline):
        return "a latent consistency model cannot be guided at some steps only"
    return _dtype_reason(setting.dtype, pipeline.device.type) or (
        _compile_reason(pipeline.device.type) if setting.compiled else None
    )


@dataclass(frozen=True)
class Trial:
    """What every setting draws: prompts, the class index and the seed of each, and how the judge reads the classes."""

    prompts: Sequence[str]
    labels: Sequence[int]
    seeds: Sequence[int]
    words: Words
    judge: Judge

    @classmethod
    def of(cls, judge: Judge, classes: Sequence[str], template: str, count: int, seed: int) -> Trial:
        """`count` pictures, spread over the classes by name, with the seeds from `seed` on."""
        from bestiary.evaluation.pictures import read_words

        labels = [index * len(classes) // count for index in range(count)]
        prompts = [caption(subject_of(classes[label]), template) for label in labels]
        return cls(prompts, labels, range(seed, seed + count), read_words(judge, classes, template), judge)

    def take(self, indices: Sequence[int]) -> tuple[list[str], list[int]]:
        """The prompts and the seeds of some of its pictures."""
        return [self.prompts[index] for index in indices], [self.seeds[index] for index in indices]


def run(
    load: Callable[[str], StableDiffusionPipeline],
    adapter: Path,
    trial: Trial,
    settings: Sequence[Setting],
    *,
    guidance_scale: float,
    guidance_interval: Sequence[float],
    repeats: int,
    quality_batch: int,
    resolution: int | None = None,
    tiny_vae: Callable[[StableDiffusionPipeline], Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a setting, of `repeats` calls each: its cost as `measure` has it, and its quality; then what was skipped.

    `load` gives the base in a dtype; pictures have `resolution` pixels a side (None: the base's own). quality is the
    CLIP score (100 x cosine) of the trial's pictures and top1 the percent that the judge recognises;
    distance_to_converged is their root mean square difference (0 to 255) from the pictures that many more steps make of
    the same noise with the same guidance; None where the sampler adds other noise.
    """
    import torch

    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.sampling import generate, is_lcm

    guidance: dict[str, dict[str, Any]] = {
        "always": {"guidance_scale": guidance_scale},
        "interval": {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval},
        "never": {"guidance_scale": 1.0},
    }
    pipeline = load(settings[0].dtype)
    reasons = {setting: reason_to_skip(setting, pipeline) for setting in settings}
    skipped = [asdict(setting) | {"reason": reason} for setting, reason in reasons.items() if reason]
    possible = [setting for setting, reason in reasons.items() if reason is None]
    measured = max(setting.steps for setting in possible)
    many = min(MOST_STEPS, max(LEAST_STEPS, int(CONVERGED_FACTOR * measured)))
    converged: dict[str, list[Image]] = {}
    if not is_lcm(pipeline):  # whose path no solver of an equation follows
        apply_adapter(pipeline, adapter)
        converge = partial(generate, pipeline, trial.prompts, trial.seeds, scheduler=CONVERGED_SCHEDULER, steps=many)
        for kind in dict.fromkeys(item.guidance for item in possible if not SAMPLERS[item.scheduler].noisy):
            converged[kind] = converge(batch_size=quality_batch, resolution=resolution, **guidance[kind])
    del pipeline
    rows: dict[Setting, dict[str, Any]] = {}
    bar = tqdm(total=len(possible), desc="settings", unit="setting")

    def run_alike(dtype: str, fused: bool) -> None:
        """Fill the rows of all settings that one pipeline serves; it is gone when this returns."""
        pipeline = load(dtype)
        apply_adapter(pipeline, adapter)
        if fused:
            fuse(pipeline)
        full, unet = pipeline.vae, pipeline.unet
        for setting in (setting for setting in possible if (setting.dtype, setting.fused) == (dtype, fused)):
            pipeline.vae = tiny_vae(pipeline) if tiny_vae and setting.vae == "tiny" else full
            pipeline.unet = torch.compile(unet) if setting.compiled else unet
            draw: Callable[..., list[Image]] = partial(
                generate, pipeline, resolution=resolution, **guidance[setting.guidance]
            )
            # Two steps allocate what many do; a compiled UNet is made for each shape that it meets.
            first = setting if setting.compiled else replace(setting, steps=min(2, setting.steps))
            warm_up, _ = measure(draw, pipeline, first, trial, repeats=1)
            row, images = measure(draw, pipeline, setting, trial, repeats)
            if setting.compiled:
                row["compile_s"] = warm_up["p50_s"] - row["p50_s"]
            rest = [index for index in range(len(trial.prompts)) if index not in images]
            if rest:
                how = {"scheduler": setting.scheduler, "steps": setting.steps, "batch_size": quality_batch}
                images |= dict(zip(rest, draw(*trial.take(rest), **how), strict=True))
            end = None if SAMPLERS[setting.scheduler].noisy else converged.get(setting.guidance)
            rows[setting] = row | quality(images, trial, end)
            bar.update()

    for dtype, fused in dict.fromkeys((setting.dtype, setting.fused) for setting in possible):
        gc.collect()  # or the memory of the pipeline before would count as this one's
        run_alike(dtype, fused)
    bar.close()
    return [rows[setting] for setting in possible], skipped


def quality(images: Mapping[int, Image], trial: Trial, converged: Sequence[Image] | None) -> dict[str, float | None]:
    """What the judge says of a trial's pictures, and how far they are from the converged ones."""
    from bestiary.evaluation import scoring

    indices = sorted(images)
    features = trial.judge.image_features([images[index] for index in indices]).double().numpy()
    labels = np.asarray(trial.labels)[indices]
    scores = scoring.score(scoring.Pictures(scoring.unit(features), labels), trial.words)
    distances = [_distance(images[index], converged[index]) for index in indices] if converged else None
    return {
        "quality": float(scores["clip_score"].mean()),
        "top1": float(scores["top1"].mean()),
        "distance_to_converged": float(np.mean(distances)) if distances else None,
    }


def measure(
    draw: Callable[..., list[Image]],
    pipeline: StableDiffusionPipeline,
    setting: Setting,
    trial: Trial,
    repeats: int,
) -> tuple[dict[str, Any], dict[int, Image]]:
    """A row: seconds a call (p50, p95, median of each part), images a second, peak memory; and the pictures.

    `draw(prompts, seeds, scheduler=, steps=, batch_size=)` is called `repeats` times on the next `setting.batch`
    pictures of the trial, and on the first again after the last.
    """
    images: dict[int, Image] = {}
    seconds: list[dict[str, float]] = []
    _reset_peak_memory()
    for repeat in range(repeats):
        batch = [(repeat * setting.batch + index) % len(trial.prompts) for index in range(setting.batch)]
        how = {"scheduler": setting.scheduler, "steps": setting.steps, "batch_size": setting.batch}
        with stopwatch(pipeline) as lap:
            drawn = draw(*trial.take(batch), **how)
        images |= dict(zip(batch, drawn, strict=True))
        seconds.append(lap)
    total = [lap["total"] for lap in seconds]
    p50, p95 = np.quantile(total, [0.5, 0.95])
    row = asdict(setting) | {"p50_s": float(p50), "p95_s": float(p95), "images_per_second": float(setting.batch / p50)}
    row |= {f"{part}_s": float(np.median([lap[part] for lap in seconds])) for part in PARTS}
    return row | _peak_memory(), images


def load_tiny_vae(model: str, revision: str | None, pipeline: StableDiffusionPipeline) -> Any:
    """A distilled decoder (AutoencoderTiny) in the pipeline's dtype and on its device.

    Raises BestiaryError when it does not load or is for other latents.
    """
    from diffusers import AutoencoderTiny

    try:
        vae = AutoencoderTiny.from_pretrained(model, revision=revision, torch_dtype=pipeline.unet.dtype)
    except Exception as error:  # diffusers, hub and safetensors each raise their own kinds
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise BestiaryError(f"The tiny VAE {model!r} cannot be loaded: {reason}.") from error
    channels = pipeline.unet.config.in_channels
    if vae.config.latent_channels != channels:
        raise BestiaryError(
            f"The tiny VAE {model!r} decodes {vae.config.latent_channels} channels and the base has {channels}."
        )
    return vae.to(pipeline.device).eval()


def fuse(pipeline: StableDiffusionPipeline) -> None:
    """Add the applied adapter into the base's weights and take it away, for good: no step pays for it any more."""
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()


def cold_start(model: str, revision: str | None, adapter: Path, prompt: str, **settings: Any) -> dict[str, float]:
    """Seconds from nothing to the first picture, in a fresh process: in all, and for import, load and draw.

    Raises BestiaryError with that process's last line when it fails.
    """
    arguments = {"model": model, "revision": revision, "adapter": str(adapter), "prompt": prompt, "settings": settings}
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "bestiary.evaluation.benchmarking", json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    total = time.perf_counter() - start
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise BestiaryError(f"The first picture cannot be drawn in a process of its own: {reason[0]}")
    parts: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return {"total_s": total} | parts


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    from bestiary.diffusion.base import device_and_dtype

    device, dtype = device_and_dtype()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],  # a busy machine's numbers are nobody's
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


def fastest_good(rows: Sequence[Mapping[str, Any]], tolerance: float = 0.01) -> Mapping[str, Any]:
    """The fastest row whose quality is within `tolerance` of the best row's."""
    best = max(row["quality"] for row in rows)
    enough = best - tolerance * abs(best)
    return max((row for row in rows if row["quality"] >= enough), key=lambda row: float(row["images_per_second"]))


@contextmanager
def stopwatch(pipeline: StableDiffusionPipeline) -> Iterator[dict[str, float]]:
    """Fill a table of seconds: in total and in each of PARTS, with the device's work done at each reading."""
    began: dict[str, float] = {}
    lap = dict.fromkeys(PARTS, 0.0)

    def now() -> float:
        _synchronise(pipeline)
        return time.perf_counter()

    def enter(part: str, *_: Any) -> None:
        began.setdefault(part, now())  # the first of many steps begins the part

    def leave(part: str, *_: Any) -> None:
        lap[part] = now() - began[part]

    vae = pipeline.vae
    modules = {"text": (pipeline.text_encoder,) * 2, "denoise": (pipeline.unet,) * 2}
    modules["decode"] = (getattr(vae, "post_quant_conv", None) or vae.decoder, vae.decoder)
    hooks = []
    for part, (first, last) in modules.items():
        hooks.append(first.register_forward_pre_hook(partial(enter, part)))
        hooks.append(last.register_forward_hook(partial(leave, part)))
    try:
        start = now()
        yield lap
        lap["total"] = now() - start
    finally:
        for hook in hooks:
            hook.remove()


def _distance(image: Image, other: Image) -> float:
    difference = np.asarray(image, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(np.sqrt((difference**2).mean()))


def _synchronise(pipeline: StableDiffusionPipeline) -> None:
    import torch

    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


def _reset_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the process's peak so far; Linux only


def _peak_memory() -> dict[str, float]:
    import resource

    import torch

    status = Path("/proc/self/status")
    if status.is_file():
        kib = next(float(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        # macOS counts bytes, and from the process's start.
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = {"peak_memory_mib": kib / 1024}
    if torch.cuda.is_available():
        peak["peak_device_memory_mib"] = torch.cuda.max_memory_allocated() / MIB
    return peak


def _dtype_reason(dtype: str, device: str) -> str | None:
    import torch

    if dtype == "float16" and device == "cpu":
        return "a CPU does not compute in float16"
    if dtype == "bfloat16" and device == "cpu" and not {"avx512_bf16", "amx_bf16"} & set(_cpu("flags").split()):
        return "this CPU has no instructions for bfloat16"
    if dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU has no bfloat16"
    return None


def _compile_reason(device: str) -> str | None:
    if device == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "torch.compile needs a C++ compiler"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton"
    return None


def _cpu_name() -> str:
    return _cpu("model name") or platform.processor() or platform.machine()


def _cpu(field: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""


def _first_picture(model: str, revision: str | None, adapter: str, prompt: str, settings: dict[str, Any]) -> None:
    """The body of the fresh process: print the seconds of each part as one line of JSON."""
    laps = [time.perf_counter()]
    import diffusers  # noqa: F401  what the next lines would import on the way
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.base import load_pipeline
    from bestiary.diffusion.sampling import generate

    laps.append(time.perf_counter())
    pipeline = load_pipeline(model, revision)
    apply_adapter(pipeline, Path(adapter))
    laps.append(time.perf_counter())
    generate(pipeline, [prompt], [0], batch_size=1, **settings)
    _synchronise(pipeline)
    laps.append(time.perf_counter())
    print(json.dumps(dict(zip(("import_s", "load_s", "first_picture_s"), np.diff(laps).tolist(), strict=True))))


if __name__ == "__main__":
    try:
        _first_picture(**json.loads(sys.argv[1]))
    except BestiaryError as error:
        raise SystemExit(str(error)) from None
