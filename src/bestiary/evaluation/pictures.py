"""The pictures that are compared: drawn in pairs by base and adapter, read from the split, and seen by the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from bestiary.animals import CAPTION_TEMPLATES, by_folder, caption
from bestiary.data.images import open_rgb
from bestiary.diffusion.adapter import apply_adapter, remove
from bestiary.diffusion.sampling import generate
from bestiary.errors import BestiaryError
from bestiary.evaluation.judge import BATCH_SIZE, Judge
from bestiary.evaluation.scoring import Array, Pictures, Words, unit

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

SCALE_ZERO_PICTURES = 2  # enough to see that nothing at all changes


def read_words(judge: Judge, classes: Sequence[str], template: str) -> Words:
    """What the judge makes of the classes' prompts and of their captions in every template."""
    animals = [by_folder(name) for name in classes]

    def vectors(template: str) -> Array:
        return _float64(judge.text_features([caption(animal, template) for animal in animals]))

    return Words(classes, vectors(template), {name: vectors(name) for name in CAPTION_TEMPLATES})


def view(judge: Judge, images: Sequence[Image], labels: ArrayLike) -> Pictures:
    """What the judge sees in pictures that are meant to show the classes `labels` (N,)."""
    return Pictures(_float64(judge.image_features(images)), np.asarray(labels, dtype=np.int64))


def view_files(judge: Judge, folder: Path, manifest: pd.DataFrame, classes: Sequence[str]) -> Pictures:
    """What the judge sees in the images of a manifest below `folder`, a batch in memory at a time."""
    features = []
    for start in tqdm(range(0, len(manifest), BATCH_SIZE), desc="real images", unit="batch"):
        paths = manifest["path"].iloc[start : start + BATCH_SIZE]
        features.append(judge.image_features([open_rgb(folder / path) for path in paths]))
    return Pictures(_float64(torch.cat(features)), manifest["class"].map(classes.index).to_numpy(dtype=np.int64))


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


def draw(
    pipeline: StableDiffusionPipeline,
    adapter: Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **settings: Any,
) -> tuple[list[Image], list[Image]]:
    """The pictures of the base and of the adapter for the same prompts and the same noise.

    `settings` are those of `generate`. Raises BestiaryError when the adapter does not fit the base, when at scale 0 it
    does not give the base's pictures exactly, or when a picture is not finite.
    """
    few = slice(SCALE_ZERO_PICTURES)
    remove(pipeline)  # one that was applied before
    plain = _generate(pipeline, "base", prompts[few], seeds[few], settings)
    apply_adapter(pipeline, adapter, scale=0.0)
    at_zero = _generate(pipeline, "adapter", prompts[few], seeds[few], settings)
    if any(one.tobytes() != other.tobytes() for one, other in zip(plain, at_zero, strict=True)):
        raise BestiaryError("The adapter at scale 0 does not give the base's pictures, so no comparison would be fair.")
    remove(pipeline)
    base = _generate(pipeline, "base", prompts, seeds, settings)
    apply_adapter(pipeline, adapter)
    return base, _generate(pipeline, "adapter", prompts, seeds, settings)


def _generate(
    pipeline: StableDiffusionPipeline,
    name: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
) -> list[Image]:
    def check(_module: Any, _inputs: Any, decoded: torch.Tensor) -> None:
        if not torch.isfinite(decoded).all():  # as bytes they would only be black
            raise BestiaryError(f"The {name} draws pictures that are not finite numbers, so there is nothing to score.")

    hook = pipeline.vae.decoder.register_forward_hook(check)
    try:
        with tqdm(desc=name, total=len(prompts), unit="picture") as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done * len(prompts) // total - bar.n)

            return generate(pipeline, prompts, seeds, progress=progress, **settings)
    finally:
        hook.remove()


def _float64(features: torch.Tensor) -> Array:
    return unit(features.numpy().astype(np.float64))
