"""Measure calls of a pipeline: seconds of each part, peak memory, and the machine that they ran on."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bestiary.memory import peak_memory, reset_peak_memory

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


@dataclass
class CallSeconds:
    """Seconds of one call of a pipeline: the text encoder, the denoising steps, the decoder, and the whole call."""

    text: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What calls of a pipeline cost: quantiles of the whole call, the median of each part, and peak memory."""

    p50_s: float
    p95_s: float
    images_per_second: float
    text_s: float
    denoise_s: float
    decode_s: float
    peak_memory_mib: float
    peak_device_memory_mib: float | None  # None without a GPU


@dataclass(frozen=True)
class Machine:
    """What decides which settings a machine can run. device_type is torch's: "cpu", "cuda" or "mps"."""

    device_type: str
    has_bfloat16: bool  # in hardware
    can_compile: bool  # torch.compile finds the compiler that it needs


@dataclass(frozen=True)
class Environment:
    """The machine and the library versions that numbers were measured with.

    load_average shows whether other programs kept the machine busy, which makes times useless.
    """

    device: str
    device_type: str
    dtype: str
    threads: int
    cpus: int | None
    load_average: float
    system: str
    python: str
    torch: str
    diffusers: str
    peft: str
    transformers: str


def environment() -> Environment:
    """Describe this machine and its libraries."""
    import torch

    from bestiary.diffusion.base import device_and_dtype

    device, dtype = device_and_dtype()
    return Environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        device_type=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        cpus=os.cpu_count(),
        load_average=os.getloadavg()[0],
        system=platform.platform(terse=True),
        python=platform.python_version(),
        torch=version("torch"),
        diffusers=version("diffusers"),
        peft=version("peft"),
        transformers=version("transformers"),
    )


def this_machine(device_type: str) -> Machine:
    """What this machine can run on a device of this type."""
    import torch

    if device_type == "cpu":
        has_bfloat16 = bool(BFLOAT16_INSTRUCTIONS & set(_cpu("flags").split()))
        can_compile = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    elif device_type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        can_compile = importlib.util.find_spec("triton") is not None
    else:
        has_bfloat16 = can_compile = True
    return Machine(device_type, has_bfloat16, can_compile)


def measure(
    pipeline: StableDiffusionPipeline, calls: Sequence[Callable[[], list[Image]]]
) -> tuple[Cost, list[list[Image]]]:
    """Run each call of the pipeline once and return what they cost, and their pictures.

    Every call must draw the same number of pictures.
    """
    images: list[list[Image]] = []
    seconds: list[CallSeconds] = []
    reset_peak_memory()
    for call in calls:
        with stopwatch(pipeline) as spent:
            images.append(call())
        seconds.append(spent)
    p50, p95 = np.quantile([spent.total for spent in seconds], [0.5, 0.95])
    peak = peak_memory()
    cost = Cost(
        p50_s=float(p50),
        p95_s=float(p95),
        images_per_second=float(len(images[0]) / p50),
        text_s=float(np.median([spent.text for spent in seconds])),
        denoise_s=float(np.median([spent.denoise for spent in seconds])),
        decode_s=float(np.median([spent.decode for spent in seconds])),
        peak_memory_mib=peak.process_mib,
        peak_device_memory_mib=peak.device_mib,
    )
    return cost, images


@contextmanager
def stopwatch(pipeline: StableDiffusionPipeline) -> Iterator[CallSeconds]:
    """Time one call of the pipeline inside the `with` block. The seconds are complete when the block ends.

    Waits for the device at each reading, so that its queue is empty.
    """
    seconds = CallSeconds()
    started: dict[str, float] = {}

    def now() -> float:
        synchronize(pipeline)
        return time.perf_counter()

    def enter(part: str, *_: object) -> None:
        started.setdefault(part, now())  # a part starts with the first of its many calls

    def leave(part: str, *_: object) -> None:
        setattr(seconds, part, now() - started[part])

    vae = pipeline.vae
    modules = {
        "text": (pipeline.text_encoder, pipeline.text_encoder),
        "denoise": (pipeline.unet, pipeline.unet),
        "decode": (getattr(vae, "post_quant_conv", None) or vae.decoder, vae.decoder),
    }
    hooks = []
    for part, (first, last) in modules.items():
        hooks.append(first.register_forward_pre_hook(partial(enter, part)))
        hooks.append(last.register_forward_hook(partial(leave, part)))
    try:
        start = now()
        yield seconds
        seconds.total = now() - start
    finally:
        for hook in hooks:
            hook.remove()


def synchronize(pipeline: StableDiffusionPipeline) -> None:
    """Wait until the pipeline's device has done all its work."""
    import torch

    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)


def _cpu_name() -> str:
    return _cpu("model name") or platform.processor() or platform.machine()


def _cpu(field: str) -> str:
    """A field of the first core in Linux's /proc/cpuinfo; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""
