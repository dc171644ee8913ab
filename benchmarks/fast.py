"""The fast variant compared with our default and the original's way of drawing: DDPM, 100 steps, guided at every step.

It measures the bundled base with the export that `make fast` wrote, if there is one, and a base of exactly Stable
Diffusion 1.5's size with random weights, 512 pixels and a decoder of TAESD's size. At that size the original's way and
our default are extrapolated: a few guided steps are timed, and their median is multiplied by the number of steps. The
fast variant is timed in full: warm, in a process that has drawn before, and cold, as `bestiary generate` starts.

    python benchmarks/fast.py                # about 8 minutes on two cores; the export needs 12 GB of memory
    python benchmarks/fast.py --quick        # a small test of the benchmark itself; its numbers mean nothing

Prints a table for each size. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from inference import ORIGINAL, find_adapter, print_table, random_pipeline, real_sampling, time_steps
from training import SMALL, STABLE_DIFFUSION, TARGETS, Models, in_another_process, random_weights, show

from bestiary.diffusion.adapter import apply_adapter, inject, save_adapter
from bestiary.diffusion.adapter_format import Provenance
from bestiary.diffusion.base import load_pipeline, load_unet
from bestiary.diffusion.engines import Processor, open_export
from bestiary.diffusion.export import Calibration, Format, Fused, TinyDecoder, export
from bestiary.diffusion.export_format import Precision, is_export, read_manifest
from bestiary.diffusion.sampling import generate
from bestiary.evaluation.benchmark import default_setting
from bestiary.evaluation.profiling import CallSeconds, environment, stopwatch
from bestiary.memory import peak_memory
from bestiary.params import load_params
from bestiary.samplers import DrawingDefaults, Sampling

ROOT = Path(__file__).parents[1]
FAST = ROOT / "models" / "fast"
PROMPT = "a photo of a tiger"
TIMED_CALLS, RESOLUTION = 5, 512
FEW_STEPS = Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 699), decoder="tiny")


@dataclass(frozen=True)
class Way:
    """Seconds of one picture at batch 1, and the peak memory of the process that drew it.

    passes counts UNet calls for one picture: a guided step is two. extrapolated: only a few steps were timed.
    """

    sampler: str
    steps: int
    passes: int
    text_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    extrapolated: bool
    peak_memory_mib: float
    times_faster: float = 1.0


@dataclass(frozen=True)
class Cold:
    """`bestiary generate` from start to exit: when OpenVINO compiles the networks, and with cached networks."""

    first_s: float
    seconds: float
    first_peak_memory_mib: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Exporting:
    """The cost and the error of one export of Stable Diffusion's size."""

    precision: str
    seconds: float
    size_mib: float
    unet_error: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and small models")
    parser.add_argument("--precision", choices=["int8", "bf16", "fp32"], default=Processor.here().best())
    parser.add_argument("--part", choices=["both", "bundled", "sd15"], default="both", help="what to measure")
    arguments = parser.parse_args()
    machine = asdict(environment())
    show("environment", machine)
    result: dict[str, object] = {"benchmark": "fast", "quick": arguments.quick, "environment": machine}
    if find_spec("openvino") is None or find_spec("nncf") is None:
        print("OpenVINO is not installed, so there is no fast variant to measure.")
        print(json.dumps(result))
        return
    if arguments.part in ("both", "bundled"):
        bundled = measure_bundled(arguments.quick)
        print_table({name: asdict(way) for name, way in bundled.items()})
        if "fast" not in bundled:
            print(f"There is no fast variant in {FAST.relative_to(ROOT)}. Run `make fast` to measure it, too.")
        result["bundled"] = {name: asdict(way) for name, way in bundled.items()}
    if arguments.part in ("both", "sd15"):
        result |= report_large(arguments.precision, arguments.quick)
    print(json.dumps(result))


def report_large(precision: Precision, quick: bool) -> dict[str, object]:
    """Measure and print everything at Stable Diffusion's size."""
    side, models = (64, SMALL) if quick else (RESOLUTION, STABLE_DIFFUSION)
    with TemporaryDirectory() as folder:
        exported = Path(folder, "export")
        exporting = in_another_process(export_random, models, precision, exported)
        show("export", asdict(exporting))
        cold = start_cold(exported, side, Path(folder, "cache"))
        show("cold `bestiary generate` with the fast variant", asdict(cold))
        large = measure_large(models, side, exported)
    print_table({name: asdict(way) for name, way in large.items()})
    ways = {name: asdict(way) for name, way in large.items()}
    return {"sd15_size": {"resolution": side, **ways}, "cold": asdict(cold), "export": asdict(exporting)}


# ---- the bundled base ----


def measure_bundled(quick: bool) -> dict[str, Way]:
    """Each way on the bundled base, with all steps timed."""
    evaluate = load_params(ROOT / "params.yaml").evaluate
    original = replace(ORIGINAL, steps=4) if quick else ORIGINAL
    default = default_setting(evaluate)
    with TemporaryDirectory() as folder:
        adapter = find_adapter(Path(folder))
        ways = {
            "original": in_another_process(time_torch, adapter, original.sampling(evaluate.sampling())),
            "default": in_another_process(time_torch, adapter, default.sampling(evaluate.sampling())),
        }
    if is_export(FAST):
        ways["fast"] = in_another_process(time_export, FAST, read_manifest(FAST).defaults.sampling)
    return compared(ways)


def time_torch(adapter: Path, sampling: Sampling) -> Way:
    """Draw with torch and the adapter not fused."""
    pipeline = load_pipeline(ROOT / "models" / "base")
    apply_adapter(pipeline, adapter)
    return timed(pipeline, sampling)


def time_export(folder: Path, sampling: Sampling) -> Way:
    """Draw with an export."""
    return timed(open_export(folder), sampling)


def timed(pipeline: StableDiffusionPipeline, sampling: Sampling) -> Way:
    """The median seconds of several pictures, after an untimed one."""
    calls: list[CallSeconds] = []
    passes = 0

    def count(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        nonlocal passes
        passes += len(inputs[0])

    hook = pipeline.unet.register_forward_hook(count)
    for seed in range(TIMED_CALLS + 1):
        passes = 0
        with stopwatch(pipeline) as spent:
            generate(pipeline, [PROMPT], [seed], sampling, batch_size=1)
        calls.append(spent)
    hook.remove()
    text, denoise, decode, total = (
        float(np.median([getattr(call, part) for call in calls[1:]])) for part in ("text", "denoise", "decode", "total")
    )
    memory = peak_memory().process_mib
    return Way(sampling.sampler, sampling.steps, passes, text, denoise, decode, total, False, memory)


# ---- at the size of Stable Diffusion 1.5 ----


def export_random(models: Models, precision: Precision, out: Path) -> Exporting:
    """Export a base with random weights, a fresh adapter and a decoder of TAESD's size."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline = random_pipeline(models)
        pipeline.to(dtype=torch.float16).save_pretrained(folder / "base")
        del pipeline
        random_weights(AutoencoderTiny).to(torch.float32).save_pretrained(folder / "tiny")
        unet = load_unet(folder / "base")
        inject(unet, rank=2, alpha=16, dropout=0.0, targets=TARGETS, seed=0)
        adapter = save_adapter(unet, folder / "adapter", Provenance())
        del unet
        started = time.perf_counter()
        done = export(
            Fused(
                str(folder / "base"), None, "random", adapter, "random", 1.0, DrawingDefaults(sampling=FEW_STEPS), True
            ),
            Format(precision, TinyDecoder(str(folder / "tiny"))),
            Calibration([PROMPT]),
            out,
        )
        return Exporting(precision, time.perf_counter() - started, done.mib, done.unet_error)


def measure_large(models: Models, side: int, exported: Path) -> dict[str, Way]:
    """Each way at Stable Diffusion's size, each in its own process."""
    sampling = real_sampling(side)
    return compared(
        {
            "original": in_another_process(time_few_steps, models, ORIGINAL.sampling(sampling)),
            "default": in_another_process(time_few_steps, models, sampling),
            "fast": in_another_process(time_export, exported, replace(FEW_STEPS, width=side, height=side)),
        }
    )


def time_few_steps(models: Models, sampling: Sampling) -> Way:
    """Time a few guided steps with torch and extrapolate to all of them."""
    scaled = time_steps(models, sampling)
    denoise = scaled.steps * scaled.step_s
    passes, memory = 2 * scaled.steps, peak_memory().process_mib
    return Way(
        scaled.scheduler, scaled.steps, passes, scaled.text_s, denoise, scaled.decode_s, scaled.scaled_s, True, memory
    )


def compared(ways: Mapping[str, Way]) -> dict[str, Way]:
    """The ways, with the speedup of each over the original's."""
    original = ways["original"].total_s
    return {name: replace(way, times_faster=original / way.total_s) for name, way in ways.items()}


def start_cold(exported: Path, side: int, cache: Path) -> Cold:
    """Run the command twice: with an empty cache of compiled networks, then with the cache of the first run."""
    first, first_memory = run_command(exported, side, cache)
    second, memory = run_command(exported, side, cache)
    return Cold(first, second, first_memory, memory)


def run_command(exported: Path, side: int, cache: Path) -> tuple[float, float]:
    """Draw one picture with `bestiary generate`; return its seconds and its peak memory in MiB."""
    code = "from bestiary.cli import main; main()"
    arguments = ["generate", "--prompt", PROMPT, "--adapter", str(exported), "--resolution", str(side)]
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--out", str(cache / "pictures")],
        env=os.environ | {"BESTIARY_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("`bestiary generate` failed.")
    kib = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss / 1024
    return time.perf_counter() - started, kib / 1024


if __name__ == "__main__":
    main()
