"""Likeness of one subject's pictures to its photos, from 0 (like other individuals) to 1 (like its training photos)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bestiary.data.images import open_rgb
from bestiary.evaluation import pictures
from bestiary.evaluation.fidelity import SubjectPhotos, fidelity
from bestiary.evaluation.image_judge import ImageJudge
from bestiary.evaluation.judge import BATCH_SIZE, Judge
from bestiary.evaluation.pictures import Jobs, PictureCache
from bestiary.evaluation.proof import photos_of_others
from bestiary.evaluation.scoring import Array, Bootstrap, unit
from bestiary.params import Proof
from bestiary.samplers import Sampling
from bestiary.subjects import Subject, Subjects, caption

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.evaluation.fast_variant import Trial

CLASS_SEEDS = 2_000_000  # above the seeds of the compared pictures


@dataclass(frozen=True)
class Likeness:
    """The photos that pictures of one subject are compared with, in the same way as `Proof`."""

    image_judge: Judge | ImageJudge
    photos: SubjectPhotos
    resamples: int
    seed: int

    def way(self, images: Sequence[Image]) -> Bootstrap | None:
        """The likeness of these pictures, from other individuals (0) to the training photos (1).

        Results for the same prompts and seeds can be subtracted. None when the judge cannot reliably tell the subject
        from other individuals.
        """
        features = see(self.image_judge, images)
        return fidelity(features, features, self.photos, resamples=self.resamples, seed=self.seed).way


def read_likeness(
    trial: Trial, others: Path, settings: Proof, sampling: Sampling, cache: PictureCache | None
) -> Likeness | None:
    """The likeness to the photos of the only subject; None if there are several subjects, or it has no class word.

    `others` has photos of other individuals. The base draws the class word with `sampling`.
    """
    tables = pictures.read_manifests(trial.split)
    classes = sorted(tables[0]["class"].unique())
    subject = Subjects.read_from(trial.split).of(classes[0])
    if len(classes) > 1 or not subject.class_word:
        return None
    other = settings.image_judge
    judge = ImageJudge.load(other.model, other.revision, trial.judge.device) if other else trial.judge
    training, held_out = (_see_files(judge, [trial.clean / path for path in table["path"]]) for table in tables)
    prompts = [caption(Subject("", subject.class_word, ""), trial.template)] * settings.class_seeds
    drawn = []
    for part in (1, 2):
        first = trial.seed + CLASS_SEEDS * part
        jobs = Jobs([0] * len(prompts), prompts, [first + index for index in range(len(prompts))])
        size, task = trial.batch_size, "draw the class word with the base"
        drawn.append(pictures.draw(trial.pipeline, None, jobs, sampling, batch_size=size, cache=cache, task=task))
    base_class, class_pictures = (see(judge, images) for images in drawn)
    photos = photos_of_others(others, subject)
    of_others = _see_files(judge, photos) if photos else class_pictures
    compared = SubjectPhotos(training, held_out, of_others, base_class)
    return Likeness(judge, compared, trial.resamples, trial.seed)


def see(judge: Judge | ImageJudge, images: Sequence[Image]) -> Array:
    """The judge's class tokens of pictures (N, D), as unit vectors."""
    return unit(judge.class_tokens(images).double().numpy())


def _see_files(judge: Judge | ImageJudge, paths: Sequence[Path]) -> Array:
    batches = [paths[start : start + BATCH_SIZE] for start in range(0, len(paths), BATCH_SIZE)]
    return np.concatenate([see(judge, [open_rgb(path) for path in batch]) for batch in batches])
