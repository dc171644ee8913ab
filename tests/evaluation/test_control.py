"""The report must tell an adapter that learned its animals from one that could not: its captions were shuffled."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bestiary.diffusion.base import load_pipeline, load_scheduler
from bestiary.diffusion.latents import LatentCache, encode_images
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import TrainingSettings, train
from bestiary.evaluation import pictures
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.scoring import Pictures, bootstrap_mean, resample_counts, score
from bestiary.subjects import caption, subject_of

ROOT = Path(__file__).parents[2]
CLASSES = ["bee", "giraffe", "owl"]  # which the base can half draw
IMAGES, SEEDS = 12, 12  # of each class: to train on, and drawn
SETTINGS = TrainingSettings(
    steps=50,
    batch_size=12,
    learning_rate=5e-3,
    warmup_steps=5,
    validate_every=50,
    seed=0,
    rank=4,
    alpha=8,
    ema_decay=0.9,
    targets=["to_q", "to_k", "to_v", "to_out.0"],
)


def encoded(base: Path, folder: Path) -> tuple[LatentCache, LatentCache]:
    """The first images of each class to train on, the next one to validate with."""
    for name, chosen in (("train", slice(IMAGES)), ("val", slice(IMAGES, IMAGES + 1))):
        images = [
            (animal, path) for animal in CLASSES for path in sorted((ROOT / "samples" / animal).iterdir())[chosen]
        ]
        rows = [{"path": f"{animal}/{path.name}", "class": animal, "sha256": path.name} for animal, path in images]
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    manifests = {name: folder / f"{name}.csv" for name in ("train", "val")}
    encode_images(base, ROOT / "samples", manifests, folder / "latents", resolution=64, flip=False, batch_size=12)
    return LatentCache.open(folder / "latents", "train"), LatentCache.open(folder / "latents", "val")


def without_meaning(cache: LatentCache) -> LatentCache:
    """The same images, each class's captioned as every class equally often: nothing in them tells one from another."""
    dealt = [CLASSES[number % len(CLASSES)] for number in range(len(cache))]
    assert set(pd.crosstab(cache.images["class"], pd.Series(dealt)).to_numpy().flat) == {IMAGES // len(CLASSES)}
    return replace(cache, images=cache.images.assign(**{"class": dealt}))


@pytest.mark.slow
def test_an_adapter_that_learned_from_shuffled_captions_is_not_taken_for_a_better_one(
    base_folder: Path, judge: Judge, tmp_path: Path
) -> None:
    training, validation = encoded(base_folder, tmp_path)
    animals = sorted(path.name for path in (ROOT / "samples").iterdir() if path.is_dir())
    labels = np.repeat([animals.index(name) for name in CLASSES], SEEDS)
    prompts = [caption(subject_of(animals[label]), "a photo of {}") for label in labels]
    words = pictures.read_words(judge, animals, "a photo of {}")
    how = {"steps": 5, "guidance_scale": 5.0, "scheduler": "dpmsolver++", "batch_size": 24}

    def look(pipeline) -> Pictures:
        return pictures.view(judge, generate(pipeline, prompts, range(len(prompts)), **how), labels)

    def delta(cache: LatentCache) -> dict[str, tuple[float, float]]:
        """The interval of each score's paired difference, by an adapter trained on `cache`."""
        adapted = load_pipeline(base_folder, device="cpu")
        train(adapted.unet, load_scheduler(base_folder), cache, validation, SETTINGS)
        scores = score(look(adapted), words)
        return {
            key: (bootstrap_mean(scores[key], counts) - bootstrap_mean(base[key], counts)).ci95
            for key in ("clip_score", "margin", "top1")
        }

    counts = resample_counts(len(labels), 2000, seed=0)
    base = score(look(load_pipeline(base_folder, device="cpu")), words)
    learned, control = delta(training), delta(without_meaning(training))
    for key in ("clip_score", "margin", "top1"):
        assert learned[key][0] > 0, learned
        assert control[key][0] <= 0, control
