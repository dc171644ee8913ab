"""Images off topic: the judge does not see the folder's animal, or the image is unlike the others of its folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from bestiary import params
from bestiary.data.images import open_rgb
from bestiary.data.inspection import Inspection
from bestiary.data.losses import MUCH
from bestiary.data.triage import Triage
from bestiary.subjects import ANIMALS, Subject, Subjects, caption
from bestiary.worker_processes import cores

# Takes B images and T texts; returns the probability of each text for each image, (B, T).
JudgeFunction = Callable[[Sequence[Image.Image], Sequence[str]], NDArray[np.float32]]
# Takes B images; returns their features as unit vectors, (B, D).
FeaturesFunction = Callable[[Sequence[Image.Image]], NDArray[np.float32]]


@dataclass(frozen=True)
class AskJudge:
    """The two questions that cleaning asks the judge."""

    probabilities: JudgeFunction
    features: FeaturesFunction


NOT_ANIMALS = (
    "a photo of a landscape",
    "a photo of a house",
    "a photo of a car",
    "a photo of a page of text",
    "a photo of a person",
    "a photo of food",
    "a diagram",
    "a logo",
)
NO_ANIMAL = "no animal"

# In a folder that shows no animal, an image is off topic if its likeness to the folder, its mean cosine with the three
# images nearest to it, is this many deviations below the usual likeness. The nearest ones, because a subject in an
# unusual place is unlike most of its folder. Measured with the bundled judge on folders of 8 to 20: ordinary pictures
# are up to 0.35 below the usual likeness (one owl in eight 0.53), pictures of other things 0.4 to 1.4.
_OUTLIER_DEVIATIONS, _LEAST_DEVIATION = 5.0, 0.08
_NEAREST = 3
_COMPARED = 4  # images; fewer say nothing about what is usual
_BATCH = 64
_JUDGED_SIDE = 448  # pixels, twice the input size of common judges


@dataclass(frozen=True)
class Opinions:
    """What the judge says of each image's path: the probabilities of the subjects by name, and of no animal."""

    of_subject: pd.DataFrame
    of_no_animal: pd.Series[float]
    features: Mapping[str, NDArray[np.float32]]  # (D,) of the images in folders that are none of the animals
    subjects: Subjects

    def name_of(self, image: Inspection) -> str:
        """The name of the image's own subject, which is a column of `of_subject`."""
        return self.subjects.of(image.class_folder).name

    def about(self, image: Inspection) -> tuple[float, float, str]:
        """The probabilities of the image's own subject and of no animal, and both with the judge's choice in words."""
        values = self.of_subject.loc[[image.path]].to_numpy()[0]
        names, no_animal = list(self.of_subject.columns), self.of_no_animal[image.path]
        name = self.name_of(image)
        own, choice, highest = values[names.index(name)], names[values.argmax()], values.max()
        if no_animal > highest:
            choice, highest = NO_ANIMAL, no_animal
        return float(own), float(no_animal), f"{name} {own:.3f}, {choice} {highest:.3f}"


def ask_judge(raw: Path, images: Sequence[Inspection], judge: AskJudge | None, subjects: Subjects) -> Opinions | None:
    """Return the judge's probabilities of the subjects that an image may show, and of no animal."""
    if judge is None or not images:
        return None
    possible = _possible_subjects(images, subjects)
    texts = [*(caption(subject, "a photo of {}") for subject in possible), *NOT_ANIMALS]
    rows, features = [], dict[str, NDArray[np.float32]]()
    with ThreadPoolExecutor(cores()) as pool:
        for batch in tqdm(list(_batches(images)), desc="look for off-topic images", unit="batch"):
            pictures = list(pool.map(lambda image: _shrink_for_judge(open_rgb(raw / image.path)), batch))
            rows.append(judge.probabilities(pictures, texts))
            own = [place for place, image in enumerate(batch) if subjects.of(image.class_folder) not in ANIMALS]
            if own:
                found = judge.features([pictures[place] for place in own])
                features |= {batch[place].path: row for place, row in zip(own, found, strict=True)}
    probabilities, paths = np.concatenate(rows), [image.path for image in images]
    return Opinions(
        pd.DataFrame(probabilities[:, : len(possible)], index=paths, columns=[subject.name for subject in possible]),
        pd.Series(probabilities[:, len(possible) :].sum(axis=1), index=paths),
        features,
        subjects,
    )


def _possible_subjects(images: Sequence[Inspection], subjects: Subjects) -> list[Subject]:
    """Return the subjects of the folders, and of all 100 animals: an image may show one that was not downloaded.

    Leave the other animals out if any folder is somebody's own subject: their "persian" is also a cat.
    """
    own = {subjects.of(folder) for folder in {image.class_folder for image in images}}
    return sorted(own | set(ANIMALS) if own <= set(ANIMALS) else own, key=lambda subject: subject.folder)


def _shrink_for_judge(image: Image.Image) -> Image.Image:
    """Reduce a large image by a whole factor: a batch of 50-megapixel photographs would need 10 GB."""
    factor = min(image.size) // _JUDGED_SIDE
    return image.reduce(factor) if factor > 1 else image


def _batches(images: Sequence[Inspection]) -> Iterator[Sequence[Inspection]]:
    return (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))


def check_topics(
    triage: Triage,
    images: Sequence[Inspection],
    opinions: Opinions,
    settings: params.Clean,
    tell: Callable[[str], None],
) -> None:
    of_class: defaultdict[str, list[Inspection]] = defaultdict(list)
    for image in triage.remaining(images):
        of_class[image.class_folder].append(image)
    for folder, members in of_class.items():
        known = opinions.subjects.of(folder) in ANIMALS
        if known:
            doubtful = _not_the_animal(members, opinions, settings.off_topic_threshold)
        else:
            doubtful = _outliers(members, opinions.features)
        policy = settings.off_topic
        if policy == "auto":
            # The judge may not know the pictures, and in somebody's own folder a rare view may be an outlier.
            unsure = len(doubtful) > MUCH * len(members)
            if known and unsure:
                tell(
                    f"{folder}: the judge calls {len(doubtful)} of {len(members)} images off topic. It may not know "
                    "such images, so they are kept. If they are wrong, set clean.off_topic to quarantine."
                )
            policy = "quarantine" if known and not unsure else "flag"
        for image, detail, score in doubtful:
            triage.apply_policy(policy, image, "off topic", detail, score)


def _not_the_animal(
    images: Sequence[Inspection], opinions: Opinions, threshold: float
) -> list[tuple[Inspection, str, float]]:
    """The images in which the judge does not see their animal, each with the evidence and a score."""
    doubtful = []
    for image in images:
        own, no_animal, detail = opinions.about(image)
        # The threshold is low because the judge confuses similar animals; it rarely takes an animal for a car.
        if own < threshold or no_animal > 0.5:
            doubtful.append((image, detail, max(1 - own, no_animal)))
    return doubtful


def _outliers(
    images: Sequence[Inspection], features: Mapping[str, NDArray[np.float32]]
) -> list[tuple[Inspection, str, float]]:
    """The images that are unlike the others of their folder, each with the evidence and a score."""
    if len(images) < _COMPARED:
        return []
    vectors = np.stack([features[image.path] for image in images]).astype(np.float64)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1.0)
    likeness = np.sort(cosines, axis=1)[:, -_NEAREST:].mean(axis=1)
    usual = float(np.median(likeness))
    spread = float(np.median(np.abs(likeness - usual)))
    deviation = max(1.4826 * spread, _LEAST_DEVIATION)  # the factor makes it a normal distribution's
    return [
        (image, f"likeness to its folder {own:.2f}, usually {usual:.2f}", float(min(1.0, usual - own)))
        for image, own in zip(images, likeness.tolist(), strict=True)
        if own < usual - _OUTLIER_DEVIATIONS * deviation
    ]
