"""The pictures that are compared: drawn in pairs by base and adapter, read from the split, and seen by the judge."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from PIL import Image

from bestiary.data.images import open_rgb
from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, remove
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import BATCH_SIZE, Judge
from bestiary.evaluation.scoring import Array, Pictures, Words, unit
from bestiary.evaluation.sharing import shared
from bestiary.files import write_atomically
from bestiary.subjects import CAPTION_TEMPLATES, caption, subject_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

DIFFUSION = Path(__file__).parents[1] / "diffusion"
CODE = ("adapter", "base", "sampling")  # what decides a picture, with the models and the settings
SCALE_ZERO_PICTURES = 2  # enough to see that nothing at all changes
READERS = 4  # threads: decoding leaves Python's lock


class Kept:
    """Batches of pictures on disk, named by all that decides their pixels: what was drawn once is not drawn again."""

    def __init__(self, folder: Path, drawn_with: Mapping[str, Any]) -> None:
        """`drawn_with` is what decides the pictures besides the adapter and the settings: the base's hash."""
        self.folder = folder
        self.drawn_with = dict(drawn_with)
        self.used: set[str] = set()
        self.reused = 0  # pictures that this process read and did not draw

    def path(self, **content: Any) -> Path:
        """Where a batch with this `content` belongs, in a folder for all that shares everything but the jobs."""
        jobs = content.pop("jobs")
        folder, name = (
            hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
            for part in (self.drawn_with | content, jobs)
        )
        self.used.add(folder)
        return self.folder / folder / f"{name}.png"

    def drop_unused(self) -> None:
        """Delete the pictures of settings that this evaluation did not ask for."""
        for folder in self.folder.glob("*"):
            if folder.name not in self.used:
                shutil.rmtree(folder, ignore_errors=True)


def read_words(judge: Judge, classes: Sequence[str], template: str) -> Words:
    """What the judge makes of the classes' prompts and of their captions in every template."""
    animals = [subject_of(name) for name in classes]

    def vectors(template: str) -> Array:
        return _float64(judge.text_features([caption(animal, template) for animal in animals]))

    return Words(classes, vectors(template), {name: vectors(name) for name in CAPTION_TEMPLATES})


def view(judge: Judge, images: Sequence[Image.Image], labels: ArrayLike) -> Pictures:
    """What the judge sees in pictures that are meant to show the classes `labels` (N,)."""
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return _view(judge.image_features, batches, labels, "judging")


def view_files(judge: Judge, folder: Path, manifest: pd.DataFrame, classes: Sequence[str]) -> Pictures:
    """What the judge sees in the images of a manifest below `folder`, a batch in memory at a time."""
    paths = [folder / path for path in manifest["path"]]
    batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    with ThreadPoolExecutor(READERS) as pool:
        return _view(
            lambda batch: judge.image_features(list(pool.map(open_rgb, batch))),
            batches,
            manifest["class"].map(classes.index),
            "real images",
        )


def _view(
    features: Callable[[Sequence[Any]], torch.Tensor], batches: Sequence[Sequence[Any]], labels: ArrayLike, name: str
) -> Pictures:
    seen = shared(lambda batch: features(batch).numpy(), batches, name, "batch")
    return Pictures(_float64(torch.from_numpy(np.concatenate(seen))), np.asarray(labels, dtype=np.int64))


def read_manifests(split: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The training and the validation manifest below `split`.

    Raises BestiaryError when either is missing or empty, or a class is in one of them only.
    """
    tables = []
    for name, meaning in (("train", "training"), ("val", "validation")):
        path = split / f"{name}.csv"
        table = pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame()
        if table.empty:
            raise BestiaryError(f"There are no {meaning} images: {path} is missing or lists none.")
        tables.append(table)
    train, validation = tables
    for name in sorted(set(train["class"]) ^ set(validation["class"])):
        raise BestiaryError(f"The class {name} has images for only one of training and validation.")
    return train, validation


def choose(classes: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The classes to draw: those that are `wanted`, or all. Raises BestiaryError when there is no such class."""
    for name in wanted or ():
        if name not in classes:
            raise BestiaryError(f"evaluate.classes names {name}, and the split has no images of it.")
    return [name for name in classes if wanted is None or name in wanted]


def draw(
    pipeline: StableDiffusionPipeline,
    adapter: Path | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    kept: Kept | None = None,
    scale: float = 1.0,
    batch_size: int,
    **settings: Any,
) -> list[Image.Image]:
    """A picture for each prompt and seed, by the base or with an adapter at a scale; shared by Accelerate's processes.

    `settings` are those of `generate`. A batch is drawn, kept and read again as a whole, since in other company a
    picture may round another way. Raises BestiaryError when the adapter does not fit the base or a picture is not
    finite.
    """
    remove(pipeline)  # one that was applied before
    if adapter is not None:
        apply_adapter(pipeline, adapter, scale)
    content = {
        "adapter": [adapter_sha256(adapter), scale] if adapter else None,
        "settings": settings,
        "batch_size": batch_size,
        "device": pipeline.device.type,
        "dtype": str(pipeline.unet.dtype),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "code": [hashlib.sha256((DIFFUSION / f"{name}.py").read_bytes()).hexdigest() for name in CODE],
    }
    name = "base" if adapter is None else "adapter"
    jobs = list(zip(prompts, seeds, strict=True))
    batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
    work = partial(_draw_batch, pipeline, kept, content, settings)
    return [image for strip in shared(work, batches, name, "batch") for image in _cut(strip)]


def draw_pairs(
    pipeline: StableDiffusionPipeline,
    adapter: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    scale: float = 1.0,
    **how: Any,
) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures of the base and of the adapter for the same prompts and the same noise, as `draw` makes them.

    Raises BestiaryError also when the adapter at scale 0 does not give the base's pictures exactly.
    """
    few = slice(SCALE_ZERO_PICTURES)
    plain = draw(pipeline, None, prompts[few], seeds[few], **how | {"kept": None})
    at_zero = draw(pipeline, adapter, prompts[few], seeds[few], scale=0.0, **how | {"kept": None})
    if any(one.tobytes() != other.tobytes() for one, other in zip(plain, at_zero, strict=True)):
        raise BestiaryError("The adapter at scale 0 does not give the base's pictures, so no comparison would be fair.")
    return draw(pipeline, None, prompts, seeds, **how), draw(pipeline, adapter, prompts, seeds, scale=scale, **how)


def _draw_batch(
    pipeline: StableDiffusionPipeline,
    kept: Kept | None,
    content: Mapping[str, Any],
    settings: Mapping[str, Any],
    jobs: Sequence[tuple[str, int]],
) -> bytes:
    path = kept.path(jobs=jobs, **content) if kept else None
    if kept and path and path.is_file():
        data = path.read_bytes()
        with suppress(OSError, ValueError, SyntaxError):  # a disk that lost power may leave one broken: draw it again
            if len(_cut(data)) == len(jobs):
                kept.reused += len(jobs)
                return data

    prompts, seeds = zip(*jobs, strict=True)
    data = _strip(generate(pipeline, prompts, seeds, batch_size=len(jobs), **settings))
    if path:
        write_atomically(path, data)
    return data


def _strip(images: Sequence[Image.Image]) -> bytes:
    """Square pictures of one size below each other, as a PNG, which keeps every pixel."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(image) for image in images])).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _cut(strip: bytes) -> list[Image.Image]:
    with Image.open(io.BytesIO(strip)) as image:
        side = image.width
        return [image.crop((0, top, side, top + side)) for top in range(0, image.height, side)]


def _float64(features: torch.Tensor) -> Array:
    return unit(features.numpy().astype(np.float64))
