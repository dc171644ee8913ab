"""Draw pictures with the base and the adapter, read the split's real images, and get the judge's features of both."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from PIL import Image

from bestiary.data.images import open_rgb
from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, remove
from bestiary.diffusion.base import processes
from bestiary.diffusion.engines import is_exported
from bestiary.diffusion.full_memory import Halving
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import BATCH_SIZE, Judge
from bestiary.evaluation.scoring import Array, ClassTexts, JudgedImages, unit
from bestiary.evaluation.sharing import map_across_processes, one_process_per_core
from bestiary.files import write_atomically
from bestiary.samplers import Sampling
from bestiary.subjects import Subjects, caption, templates_of
from bestiary.tables import read_table

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from bestiary.evaluation.judging_ahead import JudgingAhead

PACKAGE = Path(__file__).parents[1]
# The code that decides a picture's pixels.
DRAWING_CODE = (
    "samplers.py",
    "diffusion/adapter.py",
    "diffusion/adapter_config.py",
    "diffusion/adapter_format.py",
    "diffusion/adapter_names.py",
    "diffusion/adapter_reading.py",
    "diffusion/weight_changes.py",
    "diffusion/base.py",
    "diffusion/sampling.py",
)
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
# When a process for each core draws faster than one process with a thread for each core.
SMALL_BASE = 50_000_000  # parameters; threads share the work of a larger UNet well, and each process has its own copy
MANY_STEPS = 10_000  # of all pictures together: a minute or more
WEIGHT_ZERO_PICTURES = 2  # enough to show whether an adapter with weight 0 changes anything
READER_THREADS = 4  # decoding an image releases Python's lock

Source = TypeVar("Source")
Batch = Sequence[tuple[str, int]]  # a prompt and a seed for each picture
OnDrawn = Callable[[Sequence[Image.Image]], object]


@dataclass(frozen=True)
class Jobs:
    """The pictures to draw: the class index, the prompt and the seed of each."""

    labels: Sequence[int]
    prompts: Sequence[str]
    seeds: Sequence[int]

    def take(self, indices: Iterable[int]) -> Jobs:
        """The jobs at `indices`, in that order.

        >>> Jobs([0, 1], ["a bee", "an owl"], [7, 8]).take([1])
        Jobs(labels=[1], prompts=['an owl'], seeds=[8])
        """
        chosen = list(indices)
        return Jobs(
            [self.labels[index] for index in chosen],
            [self.prompts[index] for index in chosen],
            [self.seeds[index] for index in chosen],
        )


def make_jobs(
    classes: Sequence[str],
    labels: Sequence[int],
    template: str,
    first_seed: int,
    subjects: Subjects | None = None,
) -> Jobs:
    """One job for each class index in `labels`, with the template's prompt. No two jobs have the same seed.

    >>> make_jobs(["bee", "owl"], [0, 1], "a photo of {}", first_seed=7)
    Jobs(labels=[0, 1], prompts=['a photo of a bee', 'a photo of an owl'], seeds=[7, 8])
    """
    subjects = subjects or Subjects()
    prompts = [caption(subjects.of(classes[label]), template) for label in labels]
    return Jobs(labels, prompts, [first_seed + index for index in range(len(labels))])


class PictureCache:
    """Drawn batches of pictures on disk, keyed by everything that decides their pixels."""

    def __init__(self, folder: Path, base_sha256: str) -> None:
        self.folder = folder
        self.base_sha256 = base_sha256
        self.used: set[str] = set()
        self.reused = 0  # pictures that this process read from the cache

    def path(self, settings_key: str, batch: Batch) -> Path:
        """The file of a batch of (prompt, seed). Batches with the same base and settings share a folder."""
        folder, name = _hash([self.base_sha256, settings_key]), _hash(batch)
        self.used.add(folder)
        return self.folder / folder / f"{name}.png"

    def drop_unused(self) -> None:
        """Delete the pictures of settings that this evaluation did not use."""
        for folder in self.folder.glob("*"):
            if folder.name not in self.used:
                shutil.rmtree(folder, ignore_errors=True)


def read_class_texts(
    judge: Judge, classes: Sequence[str], template: str, subjects: Subjects | None = None
) -> ClassTexts:
    """The judge's features of each class's prompt, and of its captions in every template."""
    shown = [(subjects or Subjects()).of(name) for name in classes]

    def features(template: str) -> Array:
        return _float64(judge.text_features([caption(subject, template) for subject in shown]))

    return ClassTexts(classes, features(template), {name: features(name) for name in templates_of(shown)})


def view(
    judge: Judge,
    images: Sequence[Image.Image],
    labels: ArrayLike,
    task: str = "judge pictures",
    ahead: JudgingAhead | None = None,
) -> JudgedImages:
    """The judge's features of pictures that should show the classes `labels` (N,). `task` names the progress bar.

    Pictures that were judged `ahead` are not judged again.
    """
    return _view(partial(ahead.features, judge) if ahead else judge.image_features, images, labels, task)


def view_files(
    judge: Judge, folder: Path, manifest: pd.DataFrame, classes: Sequence[str], task: str = "judge images"
) -> JudgedImages:
    """The judge's features of a manifest's images below `folder`. Only one batch at a time is in memory.

    `task` names the progress bar.
    """
    paths = [folder / path for path in manifest["path"]]
    with ThreadPoolExecutor(READER_THREADS) as pool:
        return _view(
            lambda batch: judge.image_features(list(pool.map(open_rgb, batch))),
            paths,
            manifest["class"].map(classes.index),
            task,
        )


def _view(
    features: Callable[[Sequence[Source]], torch.Tensor], images: Sequence[Source], labels: ArrayLike, task: str
) -> JudgedImages:
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    parts = map_across_processes(lambda batch: features(batch).numpy(), batches, task, "batch")
    return JudgedImages(_float64(torch.from_numpy(np.concatenate(parts))), np.asarray(labels, dtype=np.int64))


def read_manifests(split: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training and the validation manifest in the folder `split`.

    Raises BestiaryError when either is missing or empty, or when a class is in only one of them.
    """
    tables = []
    for name, meaning in (("train", "training"), ("val", "validation")):
        path = split / f"{name}.csv"
        table = read_table(path) if path.is_file() else pd.DataFrame()
        if table.empty:
            raise BestiaryError(f"There are no {meaning} images: {path} is missing or empty. Run `dvc repro split`.")
        tables.append(table)
    train, validation = tables
    for name in sorted(set(train["class"]) ^ set(validation["class"])):
        raise BestiaryError(
            f"The class {name} has images for only one of training and validation. Add images of it or remove it."
        )
    return train, validation


def choose(classes: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The classes to draw: those in `wanted`, or all. Raises BestiaryError for a class that does not exist.

    >>> choose(["bee", "owl", "tiger"], ["tiger", "bee"])
    ['bee', 'tiger']
    """
    for name in wanted or ():
        if name not in classes:
            raise BestiaryError(f"evaluate.classes names {name}, but the split has no images of it.")
    return [name for name in classes if wanted is None or name in wanted]


def draw(
    pipeline: StableDiffusionPipeline,
    adapter: Path | None,
    jobs: Jobs,
    sampling: Sampling,
    *,
    batch_size: int,
    cache: PictureCache | None = None,
    task: str = "draw pictures",
    on_drawn: OnDrawn | None = None,
) -> list[Image.Image]:
    """One picture for each job, by the base or with an adapter. Accelerate's processes share the work.

    `task` names the progress bar. `on_drawn` gets the pictures that this process draws, batch by batch.
    A batch is drawn, cached and read again as a whole, because rounding may depend on the other pictures of its batch.
    Only a batch that does not fit into a GPU's memory is drawn in parts.
    Raises BestiaryError when the adapter does not fit the base or a picture is not finite.
    """
    remove(pipeline)  # the adapter of an earlier call
    if adapter is None:
        sampling = replace(sampling, adapter_weight=1.0)  # has no effect here; one value keeps the cache key the same
    else:
        apply_adapter(pipeline, adapter, sampling.adapter_weight)
    key = _settings_key(pipeline, adapter, sampling, batch_size) if cache else ""
    return _draw_batches(pipeline, jobs, sampling, batch_size, task, cache, key, on_drawn)


def draw_as_loaded(
    pipeline: StableDiffusionPipeline, jobs: Jobs, sampling: Sampling, *, batch_size: int, task: str
) -> list[Image.Image]:
    """Like `draw`, but with the pipeline as it is, such as an export that contains its adapter."""
    return _draw_batches(pipeline, jobs, sampling, batch_size, task)


def _draw_batches(
    pipeline: StableDiffusionPipeline,
    jobs: Jobs,
    sampling: Sampling,
    batch_size: int,
    task: str,
    cache: PictureCache | None = None,
    key: str = "",
    on_drawn: OnDrawn | None = None,
) -> list[Image.Image]:
    prompts_and_seeds = list(zip(jobs.prompts, jobs.seeds, strict=True))
    batches = [prompts_and_seeds[start : start + batch_size] for start in range(0, len(prompts_and_seeds), batch_size)]
    in_processes = on_drawn is None and _is_long(pipeline, sampling, len(jobs.seeds))
    missing: list[Batch] = []  # that other processes draw
    if in_processes:
        missing = [batch for batch in batches if not (cache and _cached(cache.path(key, batch), len(batch)))]
    fitting = Halving("Drawing", "evaluate.batch_size")
    with closing(one_process_per_core(partial(_generate, pipeline, sampling), missing)) as results:
        drawn = zip(missing, results, strict=True)

        def paint(batch: Batch) -> list[Image.Image]:
            if in_processes:
                # Skips batches that are now in the cache: repeated ones, or drawn by another run meanwhile.
                for other, images in drawn:
                    if other == batch:
                        return images
            images = [image for part in fitting.parts(partial(_generate, pipeline, sampling), batch) for image in part]
            if on_drawn:
                on_drawn(images)
            return images

        strips = map_across_processes(partial(_draw_batch, paint, cache, key), batches, task, "batch")
    return [image for strip, batch in zip(strips, batches, strict=True) for image in _cut(strip, len(batch))]


def _is_long(pipeline: StableDiffusionPipeline, sampling: Sampling, pictures: int) -> bool:
    """Whether a process for each core draws so many pictures sooner than this one, by more than the processes' start.

    Each of these processes computes with one thread, so some pictures round differently than in a process with several.
    They are the same for any number of processes. Cached pictures count, too: a resumed run then draws the others in
    the same way.
    """
    return (
        not is_exported(pipeline)  # which cannot be copied to other processes
        and pipeline.device.type == "cpu"
        and processes().num_processes == 1
        and sum(weight.numel() for weight in _weights(pipeline)) <= SMALL_BASE
        and pictures * sampling.steps >= MANY_STEPS
    )


def _weights(pipeline: StableDiffusionPipeline) -> Iterator[torch.Tensor]:
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        yield from module.parameters()


def draw_pairs(
    pipeline: StableDiffusionPipeline,
    adapter: Path,
    jobs: Jobs,
    sampling: Sampling,
    *,
    batch_size: int,
    cache: PictureCache | None = None,
    on_drawn: OnDrawn | None = None,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The base's and the adapter's pictures of the same prompts and noise, drawn as `draw` does.

    Also raises BestiaryError when the adapter with weight 0 does not give exactly the base's pictures.
    """
    few = jobs.take(range(min(WEIGHT_ZERO_PICTURES, len(jobs.seeds))))
    size, check = batch_size, "check that adapter weight 0 draws the base's pictures"
    plain = draw(pipeline, None, few, sampling, batch_size=size, task=check)
    at_zero = draw(pipeline, adapter, few, replace(sampling, adapter_weight=0.0), batch_size=size, task=check)
    if any(one.tobytes() != other.tobytes() for one, other in zip(plain, at_zero, strict=True)):
        raise BestiaryError(
            f"The adapter {adapter} with weight 0 does not give the base's pictures, so a comparison would be unfair. "
            "Train it again."
        )
    drawer = partial(draw, pipeline, jobs=jobs, sampling=sampling, batch_size=size, cache=cache, on_drawn=on_drawn)
    return drawer(adapter=None, task="draw with the base"), drawer(adapter=adapter, task="draw with the adapter")


def _settings_key(pipeline: StableDiffusionPipeline, adapter: Path | None, sampling: Sampling, batch_size: int) -> str:
    """A hash of everything that decides a picture's pixels besides the base's weights, the prompt and the seed."""
    return _hash(
        {
            "adapter": adapter_sha256(adapter) if adapter else None,
            "sampling": asdict(sampling),
            "batch_size": batch_size,
            "device": pipeline.device.type,
            "dtype": str(pipeline.unet.dtype),
            "libraries": {name: version(name) for name in LIBRARIES},
            "code": [hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest() for name in DRAWING_CODE],
        }
    )


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _generate(pipeline: StableDiffusionPipeline, sampling: Sampling, batch: Batch) -> list[Image.Image]:
    """The pictures of a batch of (prompt, seed)."""
    prompts, seeds = zip(*batch, strict=True)
    return generate(pipeline, prompts, seeds, sampling, batch_size=len(batch))


def _draw_batch(
    paint: Callable[[Batch], list[Image.Image]],
    cache: PictureCache | None,
    settings_key: str,
    batch: Batch,
) -> bytes:
    """A batch of (prompt, seed) as one PNG, from the cache if it is there."""
    path = cache.path(settings_key, batch) if cache else None
    if cache and path and (cached := _cached(path, len(batch))):
        cache.reused += len(batch)
        return cached
    data = _strip(paint(batch))
    if path:
        write_atomically(path, data)
    return data


def _cached(path: Path, count: int) -> bytes | None:
    """The strip of `count` pictures in a file; None when there is none."""
    if path.is_file():
        data = path.read_bytes()
        with suppress(OSError, ValueError, SyntaxError):  # a file damaged by a power failure is drawn again
            _cut(data, count)
            return data
    return None


def _strip(images: Sequence[Image.Image]) -> bytes:
    """Pictures of one size below each other as a PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(image) for image in images])).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _cut(strip: bytes, count: int) -> list[Image.Image]:
    """The `count` pictures of a strip. Raises ValueError when the strip does not hold so many."""
    with Image.open(io.BytesIO(strip), formats=("PNG",)) as image:
        height, rest = divmod(image.height, count)
        if rest:
            raise ValueError(f"{image.height} rows of pixels are not {count} pictures")
        return [image.crop((0, top, image.width, top + height)) for top in range(0, image.height, height)]


def _float64(features: torch.Tensor) -> Array:
    return unit(features.numpy().astype(np.float64))
