"""What a picture costs: seconds and memory of each setting of the sampler, with the quality that it buys."""

from __future__ import annotations

import json
import os
import platform
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

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.evaluation.judge import Judge

MIB = 2**20
CONVERGED_SCHEDULER, CONVERGED_FACTOR = "dpmsolver++", 2.5  # against the most steps that are measured
PARTS = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Setting:
    """One way to draw. fused: the adapter's weights are added into the base's, which costs nothing afterwards."""

    scheduler: str
    steps: int
    batch: int
    fused: bool


def grid(
    schedulers: Sequence[str], steps: Sequence[int], batch_sizes: Sequence[int], default: Setting
) -> list[Setting]:
    """The default setting, its adapter not fused and fused, then all combinations with the adapter fused."""
    combinations = [Setting(*combination, fused=True) for combination in product(schedulers, steps, batch_sizes)]
    return list(dict.fromkeys([replace(default, fused=False), replace(default, fused=True), *combinations]))


def run(
    pipeline: StableDiffusionPipeline,
    adapter: Path,
    judge: Judge,
    settings: Sequence[Setting],
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    repeats: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row a setting, of `repeats` calls each: its cost as `measure` has it, and its quality.

    quality is the CLIP score (100 x cosine) of its pictures, distance_to_converged their root mean square difference
    (0 to 255) from the pictures that many more steps make of the same noise; None where the sampler adds other noise.
    """
    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.sampling import generate

    seeds = [seed + index for index in range(len(prompts))]
    texts = judge.text_features(prompts)
    draw = partial(generate, pipeline, guidance_scale=guidance_scale)
    apply_adapter(pipeline, adapter)
    many = int(CONVERGED_FACTOR * max(setting.steps for setting in settings))
    converged = draw(prompts, seeds, scheduler=CONVERGED_SCHEDULER, steps=many, batch_size=len(prompts))
    rows = []
    is_fused = False
    warm: set[int] = set()
    for setting in tqdm(sorted(settings, key=lambda setting: setting.fused), desc="settings", unit="setting"):
        if setting.fused and not is_fused:
            fuse(pipeline)
            is_fused = True
            warm.clear()
        if setting.batch not in warm:
            measure(draw, pipeline, setting, prompts, seeds, repeats=1)
            warm.add(setting.batch)
        row, images = measure(draw, pipeline, setting, prompts, seeds, repeats)
        shown = [index % len(prompts) for index in range(len(images))]
        cosines = (judge.image_features(images) * texts[shown]).sum(dim=1)
        row["quality"] = 100 * float(cosines.mean())
        deterministic = setting.scheduler != "ddpm"
        distances = [_distance(image, converged[index]) for image, index in zip(images, shown, strict=True)]
        row["distance_to_converged"] = float(np.mean(distances)) if deterministic else None
        rows.append(row)
    return rows


def measure(
    draw: Callable[..., list[Image]],
    pipeline: StableDiffusionPipeline,
    setting: Setting,
    prompts: Sequence[str],
    seeds: Sequence[int],
    repeats: int,
) -> tuple[dict[str, Any], list[Image]]:
    """A row: seconds a call (p50, p95, median of each part), images a second, peak memory; and the pictures.

    `draw(prompts, seeds, scheduler=, steps=, batch_size=)` is called `repeats` times on the next `setting.batch`
    prompts, and on the first again after the last.
    """
    images: list[Image] = []
    seconds: list[dict[str, float]] = []
    _reset_peak_memory()
    for repeat in range(repeats):
        batch = [(repeat * setting.batch + index) % len(prompts) for index in range(setting.batch)]
        with stopwatch(pipeline) as lap:
            images += draw(
                [prompts[index] for index in batch],
                [seeds[index] for index in batch],
                scheduler=setting.scheduler,
                steps=setting.steps,
                batch_size=setting.batch,
            )
        seconds.append(lap)
    total = [lap["total"] for lap in seconds]
    p50, p95 = np.quantile(total, [0.5, 0.95])
    row = asdict(setting) | {"p50_s": float(p50), "p95_s": float(p95), "images_per_second": float(setting.batch / p50)}
    row |= {f"{part}_s": float(np.median([lap[part] for lap in seconds])) for part in PARTS}
    return row | _peak_memory(), images


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


def environment(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    device = pipeline.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
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
    modules["decode"] = (vae.post_quant_conv or vae.decoder, vae.decoder)
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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
