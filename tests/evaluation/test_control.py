"""The scores must distinguish an adapter that learned its subjects from one that was trained on shuffled captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from support.settings import encode_settings, train_settings

from bestiary.diffusion.base import load_pipeline, load_scheduler
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.sampling import generate
from bestiary.diffusion.training import train
from bestiary.evaluation import pictures
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.pictures import make_jobs
from bestiary.evaluation.scoring import JudgedImages, bootstrap_mean, resample_counts, score
from bestiary.samplers import Sampling

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).parents[2]
CLASSES = ["bee", "giraffe", "owl"]  # the base draws them badly, but recognisably
IMAGES, SEEDS = 12, 12  # of each class: training images, and drawn pictures
SAMPLING = Sampling("dpmsolver++", steps=5, guidance_scale=5.0)
SETTINGS = train_settings(
    steps=50,
    batch_size=12,
    learning_rate=5e-3,
    warmup_steps=5,
    validate_every=50,
    rank=4,
    caption_dropout=0.0,
    min_snr_gamma=None,
)


def encoded(base: Path, folder: Path) -> Latents:
    """The latents of the first images of each class for training, and of the next image for validation."""
    for name, chosen in (("train", slice(IMAGES)), ("val", slice(IMAGES, IMAGES + 1))):
        images = [
            (folder_name, path)
            for folder_name in CLASSES
            for path in sorted((ROOT / "samples" / folder_name).iterdir())[chosen]
        ]
        rows = [
            {"path": f"{folder_name}/{path.name}", "class": folder_name, "sha256": path.name}
            for folder_name, path in images
        ]
        pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    manifests = {name: folder / f"{name}.csv" for name in ("train", "val")}
    settings = encode_settings(resolution=64, flip=False, batch_size=12)
    encode_images(base, ROOT / "samples", manifests, folder / "latents", settings)
    return Latents.open(folder / "latents")


def with_shuffled_captions(latents: Latents) -> Latents:
    """The same images, but each class is captioned as every class equally often, so captions say nothing."""
    images = latents.training.images
    shuffled = [CLASSES[number % len(CLASSES)] for number in range(len(images))]
    assert set(pd.crosstab(images["class"], pd.Series(shuffled)).to_numpy().flat) == {IMAGES // len(CLASSES)}
    return replace(latents, training=replace(latents.training, images=images.assign(**{"class": shuffled})))


@pytest.mark.slow
def test_an_adapter_trained_on_shuffled_captions_does_not_score_better_than_the_base(
    base_folder: Path, judge: Judge, tmp_path: Path
) -> None:
    latents = encoded(base_folder, tmp_path)
    classes = sorted(path.name for path in (ROOT / "samples").iterdir() if path.is_dir())
    labels = np.repeat([classes.index(name) for name in CLASSES], SEEDS).tolist()
    jobs = make_jobs(classes, labels, "a photo of {}", first_seed=0)
    texts = pictures.read_class_texts(judge, classes, "a photo of {}")

    def draw(pipeline: StableDiffusionPipeline) -> JudgedImages:
        return pictures.view(judge, generate(pipeline, jobs.prompts, jobs.seeds, SAMPLING, batch_size=24), labels)

    def scores_of(latents: Latents | None) -> pd.DataFrame:
        """Each picture's scores, drawn with an adapter that was trained on `latents`, or without one."""
        pipeline = load_pipeline(base_folder, device="cpu")
        if latents is not None:
            train(pipeline.unet, load_scheduler(base_folder), latents, SETTINGS, seed=0)
        return score(draw(pipeline), texts)

    def gain(higher: pd.DataFrame, lower: pd.DataFrame, key: str) -> tuple[float, float]:
        """The interval of one score's paired difference."""
        return (bootstrap_mean(higher[key], counts) - bootstrap_mean(lower[key], counts)).ci95

    counts = resample_counts(len(labels), 2000, seed=0)
    base, learned, control = scores_of(None), scores_of(latents), scores_of(with_shuffled_captions(latents))
    assert gain(learned, base, "clip_score")[0] > 0
    for key in ("clip_score", "margin", "top1"):
        assert gain(learned, control, key)[0] > 0, key
        assert gain(control, base, key)[0] <= 0, key
