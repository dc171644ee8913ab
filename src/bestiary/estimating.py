"""Estimate what a run of the pipeline takes on this machine, from a few measured steps: time, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bestiary.evaluation.benchmark import (
    CONVERGED_FACTOR,
    MAX_CONVERGED_STEPS,
    MIN_CONVERGED_STEPS,
    WARM_UP_STEPS,
    default_setting,
    plan,
)
from bestiary.evaluation.rates import BUSY, Rate, Rates, measure_rates
from bestiary.memory import MIB
from bestiary.params import Params
from bestiary.samplers import SAMPLERS
from bestiary.subjects import CAPTION_TEMPLATES
from bestiary.worker_processes import cores

SECONDS = 40.0  # to measure for, at most; imports and loading come on top
PHOTOS = 8  # that are inspected
PRESERVED_ROWS, PRESERVED_PICTURES = 384, 48  # that preservation predicts, and that its kinds draw, before training
PICTURE_BYTES = 1.5  # of a pixel in a PNG
DVC_COPIES = 2  # an output lies in the project and, unless the file system shares blocks, again in DVC's cache
SCIENCEDB_IMAGES, SCIENCEDB_CLASSES = 39_704, 100  # of that dataset, before it is downloaded
SCIENCEDB_IMAGE_BYTES = 60_000  # of a JPEG of 500 x 375 pixels, about


@dataclass(frozen=True)
class Images:
    """The images of a run: how many classes and images, their bytes, and some of them to measure with."""

    classes: int
    count: int
    bytes: int
    some: Sequence[Path]
    proved: int = 0  # classes with a class word, which a proof draws


@dataclass(frozen=True)
class Line:
    """What one stage takes.

    memory_mib is the process's. device_mib is that of the GPU, of which work that cannot halve its batches needs
    least_device_mib.
    """

    stage: str
    seconds: float
    memory_mib: float | None = None
    device_mib: float | None = None
    least_device_mib: float | None = None
    disk_bytes: float = 0.0


def estimate(params: Params, images: Images, seconds: float = SECONDS) -> tuple[Rates, list[Line]]:
    """Measure for about `seconds`, and estimate each stage. Raises BestiaryError when nothing can be measured."""
    rates = measure_rates(params, images.some, seconds)
    return rates, lines(params, images, rates)


def lines(params: Params, images: Images, rates: Rates) -> list[Line]:
    """What each stage takes, from measured rates."""
    side, train = params.encode.resolution, params.train
    variants = (2 if params.encode.flip else 1) + params.encode.augmented_variants
    latents = 2 * 4 * (side / rates.latent_factor) ** 2 * rates.value_bytes * variants  # mean and deviation
    captions = images.classes * len(CAPTION_TEMPLATES) * rates.caption_bytes
    evaluated, drawing = _evaluation_pictures(params, images), _picture(params, rates, rates.row)
    judges = 2 if params.evaluate.second_judge else 1
    asks = params.clean.off_topic != "off"
    adapter = 4.0 * rates.trainable_parameters
    pictures_bytes = evaluated * side**2 * PICTURE_BYTES

    def line(
        stage: str, work: float, *memory: Rate, processes: int = 1, gpu: _Gpu | None = None, disk: float = 0.0
    ) -> Line:
        peak = max((processes * rate.peak_mib for rate in memory), default=None)
        most, least = (gpu.most, gpu.least) if gpu else (None, None)
        return Line(stage, rates.start_s + work, peak, most, least, disk)

    return [
        line("download", 0.0, disk=DVC_COPIES * images.bytes),
        line("clean", images.count * (rates.inspect_s + asks * rates.judge_s), disk=DVC_COPIES * images.bytes),
        line("split", 0.0),
        line(
            "encode",
            images.count * variants * rates.encode.seconds / rates.gpus,
            rates.encode,
            processes=rates.processes,
            gpu=_Gpu.halving(partial(_encoding_mib, params, rates), params.encode.batch_size * variants),
            disk=DVC_COPIES * (images.count * latents + captions),
        ),
        # Checkpoints hold the adapter, its average and the optimizer's two averages.
        line(
            "train",
            _training(params, images, rates),
            rates.step,
            _validated_row(params, rates),
            processes=rates.processes,
            gpu=_training_gpu(params, images, rates),
            disk=(DVC_COPIES + 4) * adapter,
        ),
        line(
            "evaluate",
            (evaluated * drawing + (evaluated + images.count) * rates.judge_s * judges) / rates.gpus,
            rates.row,
            rates.decode,
            processes=rates.processes,
            gpu=_Gpu.halving(
                partial(_drawing_mib, params, rates), params.evaluate.batch_size, judges * rates.judge_mib
            ),
            disk=pictures_bytes,
        ),
        line(
            "benchmark",
            _benchmark(params, rates),
            rates.single_row,
            rates.decode,
            gpu=_Gpu.halving(partial(_drawing_mib, params, rates), max(params.benchmark.batch_sizes), rates.judge_mib),
        ),
        line("register", 2 * rates.start_s, rates.single_row, disk=adapter + train.rank),
    ]


@dataclass(frozen=True)
class _Gpu:
    """MiB of a GPU's memory: the most that a stage uses, and what it needs even with halved batches."""

    most: float
    least: float

    @classmethod
    def halving(cls, needed: Callable[[int], float | None], batch: int, beside: float = 0.0) -> _Gpu | None:
        """Of work that takes `needed(batch)`, beside other memory, and can halve its batches down to one."""
        most, least = needed(batch), needed(1)
        return None if most is None or least is None else cls(most + beside, least + beside)


def _encoding_mib(params: Params, rates: Rates, pictures: int) -> float | None:
    return rates.encode.device_mib_at(pictures * params.encode.resolution**2)


def _drawing_mib(params: Params, rates: Rates, pictures: int) -> float | None:
    """MiB of a GPU's memory to draw so many guided pictures at once."""
    pixels = pictures * params.encode.resolution**2
    row, decode = rates.row.device_mib_at(2 * pixels), rates.decode.device_mib_at(pixels)
    return None if row is None or decode is None else max(row, decode)


def _training_gpu(params: Params, images: Images, rates: Rates) -> _Gpu | None:
    """Steps, validations and the predictions to preserve cannot halve their batches; the sheet can."""
    from bestiary.diffusion.preservation import BATCH_SIZE
    from bestiary.evaluation.watching import BATCH_SIZE as SHEET

    train, pixels, part = params.train, params.encode.resolution**2, rates.part
    drawn = min(train.sheet_animals, images.classes) * train.sheet_seeds
    sheet = _Gpu.halving(partial(_drawing_mib, params, rates), 1 if train.low_memory else min(SHEET, drawn))
    step = rates.step.device_mib_at(part.rows * pixels)
    validation = rates.row.device_mib_at(part.images * pixels)
    if sheet is None or step is None or validation is None:
        return None
    judge = 0.0 if train.low_memory else rates.judge_mib  # with low_memory, it is on the CPU
    beside = rates.graph_mib + judge  # the graph of the training step keeps its memory meanwhile
    least = [step + judge, max(validation, sheet.least) + beside]
    batch = 1 if train.low_memory else BATCH_SIZE
    if train.preservation.kind != "none":
        least.append(rates.row.device_mib_at(batch * pixels) or 0.0)
    if train.preservation.kind in ("drawn", "both"):
        least += [_drawing_mib(params, rates, batch) or 0.0, _encoding_mib(params, rates, batch) or 0.0]
    return _Gpu(max(*least, sheet.most + beside), max(least))


def _validated_row(params: Params, rates: Rates) -> Rate:
    return rates.single_row if params.train.low_memory else rates.row


def _picture(params: Params, rates: Rates, row: Rate, steps: int | None = None) -> float:
    """Seconds of a picture."""
    return (steps or params.evaluate.steps) * rates.rows_per_step * row.seconds + rates.decode.seconds


def _evaluation_pictures(params: Params, images: Images) -> int:
    settings = params.evaluate
    classes = len(settings.classes) if settings.classes else images.classes
    pictures = 2 * classes * settings.seeds + 2
    if settings.sweep:
        weights, scales = len(settings.sweep.scales), len(settings.sweep.guidance_scales)
        pictures += classes * settings.sweep.seeds * weights * scales
    if proof := settings.proof:
        contexts, unrelated = (len(prompts) * proof.seeds for prompts in (proof.contexts, proof.unrelated))
        pictures += images.proved * (3 * proof.class_seeds + 4 * contexts + 2 * unrelated)
    return pictures


def _training(params: Params, images: Images, rates: Rates) -> float:
    train = params.train
    validations = 1 + math.ceil(train.steps / train.validate_every)
    held_out = math.ceil(images.count * params.split.val_fraction)
    drawn = min(train.sheet_animals, images.classes) * train.sheet_seeds
    row_seconds = _validated_row(params, rates).seconds
    sheet = drawn * (2 * train.sheet_steps * row_seconds + rates.decode.seconds)
    validation = sheet + held_out * row_seconds
    before = 0.0
    if train.preservation.kind != "none":
        before += PRESERVED_ROWS * row_seconds
    if train.preservation.kind in ("drawn", "both"):
        before += PRESERVED_PICTURES * (2 * train.sheet_steps * row_seconds + rates.decode.seconds)
    return train.steps * rates.step.seconds + validations * validation + before


def _benchmark(params: Params, rates: Rates) -> float:
    settings = params.benchmark
    planned = plan(settings, default_setting(params.evaluate))
    seconds = 0.0
    for setting in planned:
        row = rates.single_row if setting.batch == 1 else rates.row
        guided = {"always": 2.0, "never": 1.0}.get(setting.guidance, rates.rows_per_step)
        step = guided * row.seconds
        pictures = max(settings.repeats * setting.batch, settings.pictures)
        seconds += pictures * (setting.steps * step + rates.decode.seconds) + setting.batch * WARM_UP_STEPS * step
    converging = {each.guidance for each in planned if not SAMPLERS[each.scheduler].stochastic}
    steps = int(CONVERGED_FACTOR * max(each.steps for each in planned))
    steps = min(MAX_CONVERGED_STEPS, max(MIN_CONVERGED_STEPS, steps))
    return seconds + len(converging) * settings.pictures * _picture(params, rates, rates.row, steps)


def render(params: Params, images: Images, rates: Rates, found: Sequence[Line]) -> Iterator[str]:
    """The estimate as a table, and what it rests on."""
    has_device = any(line.device_mib for line in found)
    yield f"{'stage':12}{'time':>10}{'memory':>12}" + (f"{'GPU memory':>13}" if has_device else "") + f"{'disk':>12}"
    for line in [*found, total_line(found)]:
        device = f"{shown_size(line.device_mib):>13}" if has_device else ""
        disk = shown_size(line.disk_bytes / MIB) if line.disk_bytes else "-"
        yield f"{line.stage:12}{duration(line.seconds):>10}{shown_size(line.memory_mib):>12}{device}{disk:>12}"
    subjects = f"{images.classes} subject{'s' * (images.classes != 1)}"
    yield f"Profile {params.profile}, {images.count} images of {subjects}, on {rates.device}."
    if params.dataset.source == "sciencedb":
        yield "The time to download the images is not included: it depends on the network."
    if rates.load_average > BUSY * cores():
        yield (
            f"Other programs keep this machine busy (load {rates.load_average:.1f} on {cores()} cores). It is faster "
            "when they have finished."
        )
    if rates.base_is_stand_in:
        yield (
            f"{params.base.model} is not complete on this machine. Networks of the size of Stable Diffusion 1.5 with "
            f"random weights were measured instead. Its download takes {shown_size(rates.base_bytes / MIB)} more disk."
        )
    if rates.judge_is_stand_in:
        yield f"{params.judge.model} is not complete on this machine: a CLIP ViT-B/32 with random weights was measured."
    kinds: Mapping[str, Rate] = {
        "encoding": rates.encode,
        "decoding": rates.decode,
        "denoising": rates.row,
        "training": rates.step,
    }
    for what, rate in kinds.items():
        if rate.scaled_by > 1:
            yield f"Scaled: {what} was measured at {rate.measured_at}, and multiplied by {rate.scaled_by:.1f}."


def total_line(found: Sequence[Line]) -> Line:
    """All stages: their seconds and disk add up, and the largest memory counts."""
    return Line(
        "total",
        sum(line.seconds for line in found),
        max((line.memory_mib for line in found if line.memory_mib), default=None),
        max((line.device_mib for line in found if line.device_mib), default=None),
        sum(line.disk_bytes for line in found),
    )


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(4.4), duration(331), duration(40_000), duration(1_000_000)
    ('4 s', '5.5 min', '11.1 h', '12 days')
    """
    if seconds > 72 * 3600:
        return f"{seconds / 86400:.0f} days"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def shown_size(mib: float | None) -> str:
    if mib is None:
        return "-"
    return f"{max(mib, 1):.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"


def images_of(files: Mapping[str, Sequence[Path]], proved: int = 0) -> Images:
    """The images by class folder, as a run would take them."""
    every = [path for paths in files.values() for path in paths]
    size = sum(path.stat().st_size for path in every)
    return Images(len(files), len(every), size, every[:: max(1, len(every) // PHOTOS)][:PHOTOS], proved)


def project_images(root: Path, params: Params) -> Images:
    """The images that a run of the project at `root` would use. Raises BestiaryError when there are none to count."""
    from bestiary.data.folder import choose
    from bestiary.data.listing import list_images
    from bestiary.files import dvc_cache
    from bestiary.subjects import Subjects

    dataset = params.dataset
    if dataset.source == "sciencedb":
        classes = len(dataset.classes) if dataset.classes else SCIENCEDB_CLASSES
        each = min(dataset.images_per_class or SCIENCEDB_IMAGES, SCIENCEDB_IMAGES // SCIENCEDB_CLASSES)
        return Images(classes, classes * each, classes * each * SCIENCEDB_IMAGE_BYTES, [])
    folder = _image_folder(root, dataset.folder)
    subjects = Subjects.read(folder.with_name("subjects.yaml"))
    there = list_images(folder, dvc_cache).images
    others = set(subjects.folders_of_others.values())
    taught = {name: files for name, files in there.items() if name not in others}
    found = choose(taught, dataset.classes, dataset.images_per_class)
    described = [name for name in found if subjects.of(name).class_word]
    return images_of(found, len(described) if params.evaluate.proof else 0)


def _image_folder(root: Path, name: str) -> Path:
    """The folder of the images. Before the first `dvc repro`, the folder that data.dvc imports from."""
    from bestiary.yaml_file import read_yaml

    folder = root / name
    if folder.is_dir():
        return folder
    pointer = folder.with_name(f"{folder.name}.dvc")
    content = read_yaml(pointer) if pointer.is_file() else {}
    deps = content.get("deps") if isinstance(content, dict) else None
    source = root / str(deps[0].get("path", "")) if deps and isinstance(deps[0], dict) else folder
    return source if source != root and source.is_dir() else folder


def project_estimate(root: Path, params: Params) -> Iterator[str]:
    """The lines that `bestiary estimate` prints about the project at `root`.

    Raises BestiaryError when there are no images to count, or when nothing can be measured.
    """
    images = project_images(root, params)
    rates, found_lines = estimate(params, images)
    yield from render(params, images, rates, found_lines)
