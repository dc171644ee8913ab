"""Measure what the pipeline's repeated work costs on this machine, in a fresh process: this module runs as a program.

python -m bestiary.evaluation.rates     a request as JSON on standard input; prints the rates as one line of JSON

Each kind of work is measured at growing sizes, until the next one would take too long or the real size is reached.
The last measurement is then scaled by the networks' floating-point operations, which are counted, not computed.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from bestiary.errors import BestiaryError
from bestiary.hub import HubModel, is_complete
from bestiary.memory import MIB, peak_memory, reset_peak_memory
from bestiary.params import Params, Train
from bestiary.worker_processes import cores

if TYPE_CHECKING:
    import torch

    from bestiary.diffusion.preservation import Preserved
    from bestiary.evaluation.judge import Judge

SMALLEST_SIDE = 64  # pixels
BUSY = 0.75  # of the cores in use by other programs make times too long
# On a busy machine, threads that wait in a loop take the cores from each other: single steps took 4 s instead of 0.2 s.
# On an idle one, sleeping threads would double the time.
PATIENT = {"OMP_WAIT_POLICY": "passive"}
JUDGED = 8  # pictures that the judge is measured with
RUNS = 5  # of which the fastest counts
SHARE_OF_FREE_MEMORY = 0.8  # that a measurement may take
CPU_OPTION = re.compile(r"--cpu(?:\s|$)")  # in BESTIARY_LAUNCH
KINDS = 5  # of work that are measured at growing sizes
# Stable Diffusion 1.5's networks, as its config.json files say: a base that is not on this machine is measured as them.
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
TOKENS = 77
# In the errors of CUDA and its libraries, when they start while other programs use the GPU.
FULL_OR_BUSY = re.compile("CUDA.*(?:out of memory|busy)|CU(?:BLAS|DNN)_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)")
TEXT_PARAMETERS = 123_060_480  # of its text encoder, which is not measured


class Request(BaseModel):
    """What to measure: the settings as JSON, some photos, and seconds for everything."""

    params: str
    photos: list[str]
    seconds: float


class Rate(BaseModel):
    """Seconds and memory of one unit of work at its real size, and how they were found."""

    seconds: float
    measured_at: str
    scaled_by: float  # 1: measured at the real size
    peak_mib: float  # of the process
    device_mib: dict[int, float] = {}  # by the pixels of the measured batches: peak memory of the GPU, if there is one

    def device_mib_at(self, pixels: int) -> float | None:
        """The GPU's peak memory with batches of so many pixels; None without a GPU."""
        return at(pixels, self.device_mib) if self.device_mib else None


@dataclass(frozen=True)
class StepPart:
    """The largest part of an optimizer step that a process computes with one backward pass."""

    images: int
    preserved: int  # samples
    times: float  # that a process's share of a step is as much work as this part

    @classmethod
    def of(cls, train: Train, processes: int) -> StepPart:
        """`train`: the settings that `low_memory` returns."""
        parts = processes * train.accumulation
        samples = 0 if train.preservation.kind == "none" else train.preservation.samples
        images, preserved = -(-train.batch_size // parts), -(-samples // parts)
        return cls(images, preserved, (train.batch_size + samples) / processes / (images + preserved))

    @property
    def rows(self) -> int:
        """Images and preserved samples."""
        return self.images + self.preserved


class Rates(BaseModel):
    """What was measured. A row is one prompt through the UNet once."""

    device: str
    gpus: int  # that share the images of `encode` and the pictures of `evaluate`; 1 on a CPU
    processes: int  # of one machine, in the stages that share their work; each has its own networks
    load_average: float  # before measuring
    base_is_stand_in: bool
    start_s: float  # imports and loading, at the start of each stage that uses the networks
    inspect_s: float  # a photo
    judge_s: float  # a picture
    judge_mib: float  # its weights
    judge_is_stand_in: bool
    encode: Rate  # an image
    row: Rate  # in a batch of evaluate.batch_size pictures
    single_row: Rate  # of one picture alone
    decode: Rate  # a picture
    step: Rate  # an optimizer step, measured with `part`
    part: StepPart
    rows_per_step: float  # of one picture: 2 where every denoising step is guided
    graph_mib: float = 0.0  # GPU memory that the CUDA graph of a training step keeps; 0: training uses no graph
    trainable_parameters: int
    base_bytes: int
    caption_bytes: int
    value_bytes: int
    latent_factor: int  # pixels a side of one latent
    device_free_mib: float | None = None  # of the GPU, before measuring


@dataclass(frozen=True)
class Size:
    """A batch of square pictures."""

    batch: int
    side: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.side} x {self.side} pixels"

    @property
    def pixels(self) -> int:
        return self.batch * self.side**2


def growing(real: Size, multiple: int) -> list[Size]:
    """Sizes up to the real one: one picture with growing sides, then more and more pictures.

    >>> [str(size) for size in growing(Size(4, 128), 8)]
    ['1 x 64 x 64 pixels', '1 x 128 x 128 pixels', '2 x 128 x 128 pixels', '4 x 128 x 128 pixels']
    """
    sides, batches = [real.side], [real.batch]
    while sides[0] >= 2 * SMALLEST_SIDE and sides[0] // 2 % multiple == 0:
        sides.insert(0, sides[0] // 2)
    while batches[0] > 1:
        batches.insert(0, batches[0] // 2)
    return [*(Size(1, side) for side in sides), *(Size(batch, real.side) for batch in batches if batch > 1)]


def measure_rates(params: Params, photos: Sequence[Path], seconds: float) -> Rates:
    """Measure in a fresh process, whose memory is free again afterwards.

    Raises BestiaryError when the measurement fails, with its own sentence.
    """
    names = [str(path.absolute()) for path in photos]
    request = Request(params=params.model_dump_json(by_alias=True), photos=names, seconds=seconds)
    process = subprocess.run(
        [sys.executable, "-m", "bestiary.evaluation.rates"],
        input=request.model_dump_json(),
        capture_output=True,
        text=True,
        env={
            **(PATIENT if load_average() > BUSY * cores() else {}),
            **os.environ,
            "ACCELERATE_USE_CPU": str(leaves_gpu_alone()),
            "HF_HUB_OFFLINE": "1",  # an incomplete model is not measured, and its download would show no progress
        },
        check=False,
    )
    if process.returncode < 0:
        raise BestiaryError(f"The measurement ended by signal {-process.returncode}: the memory may be too small.")
    if process.returncode:
        raise BestiaryError((process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1])
    return Rates.model_validate_json(process.stdout.splitlines()[-1])


def load_average() -> float:
    """The programs that ran at once, on average over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def launched_processes() -> int | None:
    """The number of processes that BESTIARY_LAUNCH starts; None where only the launcher knows it."""
    return 1 if launches_one() else asked_processes()


def asked_processes() -> int | None:
    """The number of processes that BESTIARY_LAUNCH names; 1 if it is empty, None if it names no number."""
    launch = os.environ.get("BESTIARY_LAUNCH", "")
    if found := re.search(r"--(?:num[_-]processes|nproc[_-]per[_-]node)[ =](\d+)", launch):
        return int(found[1])
    return None if launch else 1


def launches_one() -> bool:
    """Whether BESTIARY_LAUNCH is an `accelerate launch` that starts one process, whatever number it names.

    With --cpu, it starts more only through MPI. Otherwise it also does on a machine with several GPUs, or with
    --multi_gpu. The file of `accelerate config` is not read.
    """
    import torch

    launch, asked = os.environ.get("BESTIARY_LAUNCH", ""), asked_processes()
    if not re.search(r"\baccelerate[ -]launch\b", launch) or re.search("mpi(?:run|exec)", launch):
        return False
    if CPU_OPTION.search(launch):
        return True
    return asked == 1 or (asked is not None and torch.cuda.device_count() < 2 and "--multi" not in launch)


def processes_here() -> int:
    """The processes that BESTIARY_LAUNCH starts on each machine; 1 where only the launcher knows it."""
    machines = re.search(r"--num[_-]machines[ =](\d+)", os.environ.get("BESTIARY_LAUNCH", ""))
    return max(1, (launched_processes() or 1) // max(1, int(machines[1]) if machines else 1))


def leaves_gpu_alone() -> bool:
    """Whether encode, train and evaluate compute on the CPU even if there is a GPU.

    They do with `accelerate launch --cpu` or ACCELERATE_USE_CPU=true. An `accelerate launch` of one process overrides
    the variable. Raises BestiaryError when the variable is neither true nor false.
    """
    from bestiary.diffusion.base import is_cpu_forced

    if CPU_OPTION.search(os.environ.get("BESTIARY_LAUNCH", "")):
        return True
    return is_cpu_forced() and not launches_one()


class _Bench:
    """The base's networks, or networks of Stable Diffusion's size, on this machine's device."""

    def __init__(self, params: Params, seconds: float) -> None:
        from bestiary.diffusion.base import device_and_dtype, load_unet, load_vae, on_hub
        from bestiary.memory import keep_freed_memory

        keep_freed_memory()
        self.params, self.seconds = params, seconds / KINDS
        self.device, self.dtype = device_and_dtype()
        base = (params.base.model, params.base.revision)
        self.is_stand_in = not _is_here(on_hub(*base))
        if self.is_stand_in:
            self.unet, self.vae = (_random(network, self.device, self.dtype) for network in ("unet", "vae"))
        else:
            self.unet = load_unet(*base, dtype=self.dtype).to(self.device)
            self.vae = load_vae(*base, dtype=self.dtype).to(self.device)
        self.text: Any = self._text()  # the stages keep it on the device, too
        self.tokens = TOKENS if self.is_stand_in else self.text.config.max_position_embeddings
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._meta: dict[str, Any] = {}
        self.multiple = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def _text(self) -> Any:
        """The text encoder, or a tensor of its size. It only takes memory."""
        import torch

        from bestiary.diffusion.base import load_text

        if self.is_stand_in:
            return torch.zeros(TEXT_PARAMETERS, device=self.device, dtype=self.dtype)
        return load_text(self.params.base.model, self.params.base.revision, dtype=self.dtype)[1].to(self.device)

    def encode(self, size: Size) -> None:
        import torch

        with torch.inference_mode():
            pixels = torch.zeros(size.batch, 3, size.side, size.side, device=self.device, dtype=self.dtype)
            self.vae.encode(pixels.contiguous(memory_format=torch.channels_last))

    def decode(self, size: Size) -> None:
        import torch

        with torch.inference_mode():
            self.vae.decode(self._latents(size))

    def predict(self, size: Size) -> None:
        import torch

        with torch.inference_mode():
            self.unet(*self.inputs(size))

    def _latents(self, size: Size) -> torch.Tensor:
        import torch

        shape = (size.batch, self.vae.config.latent_channels, size.side // self.factor, size.side // self.factor)
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def inputs(self, size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The UNet's latents, timesteps and text features."""
        import torch

        shape = (size.batch, self.tokens, self.unet.config.cross_attention_dim)
        timesteps = torch.full((size.batch,), 500, device=self.device)
        features = torch.zeros(shape, device=self.device, dtype=self.dtype)
        return self._latents(size), timesteps, features

    def rate(
        self,
        work: Callable[[Size], None],
        network: str,
        real: Size,
        *,
        per: float,
        prepare: Callable[[Size], float] = lambda _: 0.0,
    ) -> Rate:
        """Seconds of `work` at the real size, divided by `per`.

        Of `prepare`, only the memory counts. It returns the MiB that it keeps on the GPU and torch does not count.
        """
        import torch

        measured, seconds, started = Size(0, 0), 0.0, time.perf_counter()
        peaks: dict[int, tuple[float, float]] = {}
        sizes = growing(real, self.multiple)
        with suppress(torch.OutOfMemoryError):  # which the first measurement reports
            work(sizes[0])  # the very first call loads and sets up code
        while sizes and (size := self._next(sizes, network, measured, seconds, started, peaks)):
            sizes = sizes[sizes.index(size) + 1 :]
            reset_peak_memory()
            try:
                kept, prepared = prepare(size), peak_memory()
                reset_peak_memory()
                seconds = self._time(work, size)
            except torch.OutOfMemoryError:
                break
            measured, peak = size, peak_memory()
            on_device = max(prepared.device_mib or 0.0, (peak.device_mib or 0.0) + kept)
            peaks[size.pixels] = (max(prepared.process_mib, peak.process_mib), on_device)
        if not peaks:
            raise BestiaryError(
                "Not even one picture fits into the GPU's memory. Close other programs that use the GPU, or lower "
                "encode.resolution."
            )
        factor = 1.0 if measured == real else self._operations(network, real) / self._operations(network, measured)
        process, device = ({pixels: peak[which] for pixels, peak in peaks.items()} for which in (0, 1))
        return Rate(
            seconds=seconds * factor / per,
            measured_at=str(measured),
            scaled_by=factor,
            peak_mib=at(real.pixels, process),
            device_mib=device if self.device.type == "cuda" else {},
        )

    def _next(
        self,
        sizes: Sequence[Size],
        network: str,
        measured: Size,
        seconds: float,
        started: float,
        peaks: dict[int, tuple[float, float]],
    ) -> Size | None:
        """The largest size that the time and the memory allow next; the smallest first."""
        if not peaks:
            return sizes[0]
        left = self.seconds - (time.perf_counter() - started)
        for size in reversed(sizes):
            expected = seconds * self._operations(network, size) / self._operations(network, measured)
            if expected < left and self._fits(size, peaks):
                return size
        return None

    def _fits(self, size: Size, peaks: dict[int, tuple[float, float]]) -> bool:
        import psutil

        process = {pixels: peak for pixels, (peak, _) in peaks.items()}
        more = at(size.pixels, process) - max(process.values())
        return more < psutil.virtual_memory().available / MIB * SHARE_OF_FREE_MEMORY

    def _time(self, work: Callable[[Size], None], size: Size) -> float:
        """The seconds of the fastest of several runs, which other programs disturbed least."""
        import torch

        def once() -> float:
            started = time.perf_counter()
            work(size)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        found = [once()]
        while len(found) < RUNS and sum(found) + min(found) < self.seconds / 3:
            found.append(once())
        return min(found)

    def _operations(self, network: str, size: Size) -> float:
        """Of one forward pass, counted on tensors without content."""
        return size.batch * _counted(self._without_content(network), network, size.side, self.factor, self.tokens)

    def _without_content(self, network: str) -> Any:
        import torch

        if network not in self._meta:
            part = self.unet if network == "unet" else self.vae
            with torch.device("meta"):
                self._meta[network] = type(part).from_config(part.config)
        return self._meta[network]

    def rows_per_step(self) -> float:
        """Rows that one denoising step of one picture takes on average: guidance doubles them."""
        from types import SimpleNamespace

        from bestiary.diffusion.base import load_scheduler
        from bestiary.diffusion.sampling import guidance_scales, make_scheduler

        sampling = self.params.evaluate.sampling()
        if sampling.guidance_scale <= 1:
            return 1.0
        if sampling.guidance_interval is None or self.is_stand_in:
            return 2.0
        config = load_scheduler(self.params.base.model, self.params.base.revision).config
        pipeline: Any = SimpleNamespace(scheduler=make_scheduler(sampling.sampler, config, sampling.steps))
        scales = guidance_scales(pipeline, sampling)
        return 1.0 + sum(scale > 1 for scale in scales) / len(scales)


class _TrainingStep:
    """Trains on a part of a step as `train` does: on images, as a CUDA graph if possible, and on preserved samples.

    The batch of a Size counts both.
    """

    def __init__(self, bench: _Bench, part: StepPart) -> None:
        from types import SimpleNamespace

        import torch

        from bestiary.diffusion.fast_step import FastPrediction, graphs_fit
        from bestiary.diffusion.optimization import make_optimizer, start_adapter

        self.bench, self.part, train = bench, part, bench.params.train
        self.trained = start_adapter(bench.unet, train, seed=0, device=bench.device)
        bench.unet.train()
        self.optimizer = make_optimizer(self.trained.weights, train)
        self.predict = FastPrediction(bench.unet)
        self.scales_loss = bench.dtype is torch.float16
        # An Accelerator would start the processes' communication.
        run: Any = SimpleNamespace(
            device=bench.device,
            num_processes=launched_processes() or 1,
            mixed_precision="fp16" if self.scales_loss else "no",
        )
        self.is_graph = graphs_fit(train, run)
        self.graphs: dict[int, float] = {}  # pixels: the MiB that the graph of a step of this size keeps

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(weight.numel() for weight in self.trained.weights)

    def __call__(self, size: Size) -> None:
        import torch

        from bestiary.diffusion.preservation import preservation_error

        images = self._images(size)
        with torch.autocast(self.bench.device.type, self.bench.dtype, enabled=self.scales_loss):
            loss = self.predict(*self.bench.inputs(images)).sample.float().square().mean()
            preserved = self._preserved(size.side)
            # The samples share the images' backward pass.
            one_at_a_time = self.bench.params.train.low_memory
            for batch in preserved.batches(0, range(size.batch - images.batch), one_at_a_time=one_at_a_time):
                loss = loss + preservation_error(self.bench.unet, batch, preserved.features).square().mean()
        loss.backward()
        self.trained.collect_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trained.spread()

    def _images(self, size: Size) -> Size:
        """The images of a batch of images and preserved samples, in about the real proportion."""
        return Size(size.batch - size.batch * self.part.preserved // self.part.rows, size.side)

    def _preserved(self, side: int) -> Preserved:
        """A pool of one sample."""
        from bestiary.diffusion.preservation import Preserved, PreservedSample

        (latents,), (timestep,), features = self.bench.inputs(Size(1, side))
        noisy, first = latents.float(), timestep.new_zeros(())
        return Preserved([PreservedSample(noisy, timestep, first, noisy)], features)

    def prepare(self, size: Size) -> float:
        """Capture the images' graph for this size, if training would, and return the MiB that it keeps.

        A graph's memory stays reserved for it, so torch does not count it as allocated after the capture.
        """
        import torch

        from bestiary.diffusion.fast_step import FastPrediction

        if not self.is_graph:
            return 0.0
        self.predict = FastPrediction(self.bench.unet)  # drops the graph of the size before
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self.predict.use(self.bench.inputs(self._images(size)), compiled=False, graph=True)
        torch.cuda.empty_cache()
        kept = torch.cuda.memory_reserved() - before
        self.graphs[size.pixels] = kept / MIB if self.predict.fast else 0.0
        return self.graphs[size.pixels]

    def graph_mib(self, real: Size) -> float:
        """The MiB that the graph keeps at the real size; 0 without a graph."""
        return at(real.pixels, self.graphs) if self.graphs else 0.0


@cache
def _counted(model: Any, network: str, side: int, factor: int, tokens: int) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    small, config = side // factor, model.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if network == "unet":
            text = torch.empty(1, tokens, config.cross_attention_dim)
            model(torch.empty(1, config.in_channels, small, small), torch.zeros(1), text)
        elif network == "encoder":
            model.encode(torch.empty(1, 3, side, side))
        else:
            model.decode(torch.empty(1, config.latent_channels, small, small))
    return float(counter.get_total_flops())


def _random(network: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen network of Stable Diffusion's size with small random weights, built without its slow initialization."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**UNET) if network == "unet" else AutoencoderKL(**VAE)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.uniform_(-0.03, 0.03)
    return model


def at(pixels: int, measured: dict[int, float]) -> float:
    """The memory at `pixels`, on a straight line through the two nearest measurements.

    Never below the largest measurement for larger sizes, and never below the smallest one.

    >>> at(400, {100: 10.0, 200: 12.0}), at(150, {100: 10.0, 200: 12.0}), at(50, {100: 10.0, 200: 12.0})
    (16.0, 11.0, 10.0)
    >>> at(400, {100: 10.0})
    10.0
    """
    known = sorted(measured.items())
    if len(known) == 1:
        return known[0][1]
    (first, low), (last, high) = next((pair for pair in pairwise(known) if pixels <= pair[1][0]), known[-2:])
    least = max(measured.values()) if pixels > last else min(measured.values())
    return max(least, high + (high - low) * (pixels - last) / (last - first))


def _is_here(wanted: HubModel) -> bool:
    """Whether the whole model is on this machine: as a folder or file, or in the hub's cache."""
    return Path(wanted.model).exists() or is_complete(wanted)


def _judge(params: Params, device: str) -> tuple[Judge, bool]:
    """The judge, and whether it is a stand-in: a CLIP ViT-B/32 with random weights, where the judge is not here."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from bestiary.evaluation.judge import Judge, on_hub

    if _is_here(on_hub(params.judge.model, params.judge.revision)):
        return Judge.load(params.judge.model, params.judge.revision, device), False
    nothing: Any = None  # no tokenizer, for no texts
    return Judge(CLIPModel(CLIPConfig()), nothing, CLIPImageProcessorPil(), device), True


def _judge_seconds(judge: Judge, side: int) -> float:
    """Seconds in which the judge sees a picture."""
    from PIL import Image

    pictures = [Image.new("RGB", (side, side))] * JUDGED
    judge.image_features(pictures[:1])
    started = time.perf_counter()
    judge.image_features(pictures)
    return (time.perf_counter() - started) / JUDGED


def _inspect_seconds(photos: Sequence[Path]) -> float:
    """Seconds to inspect a photo, on one core."""
    from bestiary.data.inspection import inspect

    if not photos:
        return 0.0
    inspect(photos[0].parent, photos[0].name)  # imports what it needs
    started = time.perf_counter()
    for path in photos:
        inspect(path.parent, path.name)
    return (time.perf_counter() - started) / len(photos) / min(cores(), len(photos))


def _run(request: Request) -> Rates:
    started = time.perf_counter()
    import diffusers  # noqa: F401  as a stage imports them
    import mlflow  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from bestiary.diffusion.base import device_and_dtype
    from bestiary.diffusion.low_memory import low_memory

    before = load_average()
    params, processes = Params.model_validate_json(request.params), launched_processes() or 1
    free = torch.cuda.mem_get_info()[0] / MIB if device_and_dtype()[0].type == "cuda" else None
    train = low_memory(params.train, processes)
    bench = _Bench(params.model_copy(update={"train": train}), request.seconds)
    start_s = time.perf_counter() - started
    side, batch = params.encode.resolution, params.evaluate.batch_size
    variants = (2 if params.encode.flip else 1) + params.encode.augmented_variants
    encoded = Size(params.encode.batch_size * variants, side)
    encode = bench.rate(bench.encode, "encoder", encoded, per=encoded.batch)
    decode = bench.rate(bench.decode, "decoder", Size(batch, side), per=batch)
    single_row = bench.rate(bench.predict, "unet", Size(2, side), per=2)
    row = bench.rate(bench.predict, "unet", Size(2 * batch, side), per=2 * batch)
    parameters = sum(each.numel() for part in (bench.unet, bench.vae) for each in part.parameters())
    part = StepPart.of(train, processes)
    step, trained = _TrainingStep(bench, part), Size(part.rows, side)
    judge, judge_is_stand_in = _judge(params, bench.device.type)
    gpus = 1 if bench.device.type == "cpu" else processes  # the processes of one machine share its cores
    return Rates(
        gpus=gpus,
        processes=processes_here(),
        load_average=before,
        device=torch.cuda.get_device_name()
        if bench.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        base_is_stand_in=bench.is_stand_in,
        start_s=start_s,
        inspect_s=_inspect_seconds([Path(path) for path in request.photos]),
        judge_s=_judge_seconds(judge, side),
        judge_mib=sum(weight.nbytes for weight in judge.model.parameters()) / MIB,
        judge_is_stand_in=judge_is_stand_in,
        encode=encode,
        row=row,
        single_row=single_row,
        decode=decode,
        part=part,
        step=bench.rate(step, "unet", trained, per=gpus / (part.times * processes), prepare=step.prepare),
        graph_mib=step.graph_mib(trained),
        rows_per_step=bench.rows_per_step(),
        trainable_parameters=step.trainable,
        base_bytes=4 * (parameters + (TEXT_PARAMETERS if bench.is_stand_in else 0)),
        caption_bytes=bench.tokens * bench.unet.config.cross_attention_dim * bench.dtype.itemsize,
        value_bytes=bench.dtype.itemsize,
        latent_factor=bench.factor,
        device_free_mib=free,
    )


def _explained(error: Exception) -> str:
    """One sentence about an error that ended the measurement. CUDA's errors have several lines."""
    import torch

    reason = str(error).strip().partition("\n")[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and FULL_OR_BUSY.search(reason)):
        return (
            f"The GPU's memory is full or the GPU is busy: {reason.partition('. ')[0]}. Close other programs that use "
            "the GPU."
        )
    return f"The measurement failed with {type(error).__name__}{reason and f': {reason}'}."


if __name__ == "__main__":
    try:
        print(_run(Request.model_validate_json(sys.stdin.read())).model_dump_json())
    except Exception as error:
        raise SystemExit(str(error) if isinstance(error, BestiaryError) else _explained(error)) from None
