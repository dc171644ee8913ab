"""Cleaning: keep, convert or quarantine each raw image. A broken image is a finding and never stops the run."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from bestiary import params
from bestiary.data import duplicates
from bestiary.data.captions import load_captions, names_subject
from bestiary.data.findings import Action, Decision, Finding, write_findings
from bestiary.data.folder import link, replacing
from bestiary.data.images import decode, open_rgb, right_extension
from bestiary.data.inspection import Inspection, cores, inspect_all
from bestiary.data.listing import list_images, read_left_out
from bestiary.data.losses import MUCH, Loss, check_losses, describe_losses, losses
from bestiary.data.names import printable, safe_name
from bestiary.data.versions import VersionPair, find_versions
from bestiary.errors import BestiaryError
from bestiary.subjects import ANIMALS, Subject, Subjects, caption, check_folders

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
NO_NAME = "caption without name"
# If the judge gives one of the two classes of an image at least this share, the image stays in that class only.
CONFIDENT = 0.8

# In a folder that shows no animal, an image is off topic if its likeness to the folder, its median cosine with the
# others, is this many deviations below the usual likeness. The deviation is that of all pairs, so folders of varied
# pictures lose nothing. Measured with the bundled judge on folders of 12: ordinary pictures reach 3.3, one of another
# thing 7 to 22.
_OUTLIER_DEVIATIONS, _LEAST_DEVIATION = 5.0, 0.045
_COMPARED = 4  # images; fewer say nothing about what is usual
_MIN_CONTRAST = 4.0  # grey levels
_MIN_SHARPNESS = 15.0
_MIN_BRIGHTNESS, _MAX_BRIGHTNESS = 20.0, 245.0  # grey levels
_BATCH = 64
_JUDGED_SIDE = 448  # pixels, twice the input size of common judges
_JPEG_QUALITY = 95
_PHOTO_FORMATS = ("JPEG", "MPO", "HEIF", "AVIF")  # converted to JPEG: the others may be drawings, which JPEG blurs


@dataclass(frozen=True)
class ByHand:
    """What the images' owner decided: which images to keep or drop, and what the folders show."""

    overrides: Mapping[str, Decision] = field(default_factory=dict)
    subjects: Subjects = field(default_factory=Subjects)


@dataclass(frozen=True)
class Outcome:
    """The result of cleaning: the manifest of the images that were kept, and all findings."""

    images_in: int
    manifest: pd.DataFrame
    findings: list[Finding]
    unused_overrides: list[str]  # paths that no image has
    near_duplicates_seconds: float  # spent on searching for them
    losses: list[Loss]  # of each class that lost images


@dataclass
class _Triage:
    """The findings so far, and which images they put into quarantine."""

    overrides: Mapping[str, Decision]
    unused_overrides: list[str]
    findings: list[Finding] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)

    def record(
        self,
        image: Inspection,
        kind: str,
        detail: str,
        action: Action,
        other: str = "",
        score: float | None = None,
    ) -> None:
        """Record a finding. An image with the override "keep" is not quarantined, unless it is unreadable."""
        if action == "quarantined" and kind != "unreadable" and self.overrides.get(image.path) == "keep":
            action = "kept"
        if action == "quarantined":
            self.quarantined.add(image.path)
        self.findings.append(Finding(image.path, image.class_folder, kind, detail, action, other, score))

    def apply_policy(self, policy: params.Policy, image: Inspection, kind: str, detail: str, score: float) -> None:
        """Quarantine the image, flag it, or ignore the observation, as `policy` says."""
        if policy != "off":
            self.record(image, kind, detail, "quarantined" if policy == "quarantine" else "flagged", score=score)

    def remaining(self, images: Sequence[Inspection]) -> list[Inspection]:
        return [image for image in images if image.path not in self.quarantined]

    def rank(self, image: Inspection) -> tuple[bool, int, int, str]:
        """Sort key for versions of one picture: "keep" overrides first, then more pixels, more bytes, the name."""
        return self.overrides.get(image.path) != "keep", -image.width * image.height, -image.bytes, image.path


def clean(
    raw: Path,
    target: Path,
    settings: params.Clean,
    *,
    judge: AskJudge | None = None,
    by_hand: ByHand | None = None,
    report: Path | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Outcome:
    """Write the usable images of `raw`/<class>/ and their manifest to `target`, and the findings to `report`.

    An image that is plain RGB already keeps its bytes; the others are converted. `judge` is needed unless
    `settings.off_topic` is off. Overrides win over every check. `tell` gets lines about what each class lost. The
    result does not depend on the number of workers or on the order of the files.

    Raises BestiaryError when folders stand for the same subject, and when no image of a class is left; the report is
    then there, and `target` is as it was.
    """
    tell, by_hand = tell or (lambda _: None), by_hand or ByHand()
    classes, subjects = list_images(raw).images, by_hand.subjects
    check_folders(classes, subjects)
    if not any(classes.values()):
        raise BestiaryError(f"There are no images in {raw}. Run `dvc repro download`.")
    paths = [f"{name}/{path.name}" for name, files in classes.items() for path in files]
    triage = _Triage(*_match_overrides(by_hand.overrides, paths))
    images = inspect_all(raw, paths, workers)
    _drop_by_override(triage, images)
    _check_each(triage, triage.remaining(images), settings)
    _drop_exact_duplicates(triage, triage.remaining(images))
    images = triage.remaining(images)
    opinions = None if settings.off_topic == "off" else _ask_judge(raw, images, judge, subjects)
    started = time.perf_counter()
    pairs = find_versions(raw, images, settings.near_duplicate_bits)
    search_seconds = time.perf_counter() - started
    _resolve_conflicts(triage, images, pairs, opinions)
    _drop_near_duplicates(triage, images, pairs)
    if opinions is not None:
        _check_topics(triage, images, opinions, settings, tell)
    kept = triage.remaining(images)
    captions = _check_captions(triage, kept, load_captions(raw), settings, subjects)
    triage.findings += [Finding(f.path, f.class_folder, f.kind, f.detail, "left out") for f in read_left_out(raw)]
    triage.findings.sort(key=lambda finding: (finding.kind, finding.path))
    if report is not None:
        with replacing(report) as fresh:
            write_findings(fresh, triage.findings, raw)
    lost = losses({name: len(files) for name, files in classes.items()}, triage.findings)
    for line in describe_losses(lost):
        tell(line)
    check_losses(lost)
    _refuse_captions(triage, settings)
    group_of = _name_groups(images, pairs, kept)
    with replacing(target) as fresh:
        manifest = _write_images(raw, fresh, kept, group_of, subjects)
        manifest = manifest.assign(caption=[captions.get(image.path, "") for image in kept]) if captions else manifest
        subjects.write_to(fresh)
        manifest.to_csv(fresh / "manifest.csv", index=False)
    return Outcome(len(paths), manifest, triage.findings, triage.unused_overrides, search_seconds, lost)


def _match_overrides(overrides: Mapping[str, Decision], paths: Sequence[str]) -> tuple[dict[str, Decision], list[str]]:
    """Return the overrides by the paths of images, and the paths in `overrides` that no image has.

    A path may have the file's name as it was in data/, before it got a name that suits every system.
    """
    known, matched, unused = set(paths), dict[str, Decision](), list[str]()
    for path, decision in overrides.items():
        folder, _, name = path.partition("/")
        found = next((each for each in (path, f"{folder}/{safe_name(name)}") if each in known), None)
        if found is None:
            unused.append(path)
        else:
            matched[found] = decision
    return matched, sorted(unused)


def _drop_by_override(triage: _Triage, images: Sequence[Inspection]) -> None:
    for image in images:
        if triage.overrides.get(image.path) == "drop":
            triage.record(image, "dropped by hand", "overrides.csv", "quarantined")


def _check_each(triage: _Triage, images: Sequence[Inspection], settings: params.Clean) -> None:
    """Make the checks that need no other image."""
    for image in images:
        if image.unreadable:
            triage.record(image, "unreadable", image.unreadable, "quarantined")
            continue
        if right_extension(image.path, image.format) != image.path:
            triage.record(image, "wrong extension", f"is {image.format}", "repaired")
        for change in image.changes:
            triage.record(image, change, "", "converted")
        short, long = sorted((image.width, image.height))
        if short < settings.min_side:
            triage.record(image, "too small", f"{image.width} x {image.height}", "quarantined")
        elif long / short > settings.max_aspect_ratio:
            triage.record(image, "extreme aspect ratio", f"{image.width} x {image.height}", "quarantined")
        elif image.contrast < _MIN_CONTRAST:
            score = 1 - image.contrast / _MIN_CONTRAST
            triage.apply_policy(settings.blank, image, "blank", f"contrast {image.contrast:.1f}", score)
        elif not _MIN_BRIGHTNESS <= image.brightness <= _MAX_BRIGHTNESS:
            kind = "dark" if image.brightness < _MIN_BRIGHTNESS else "bright"
            dark, bright = 1 - image.brightness / _MIN_BRIGHTNESS, (image.brightness - _MAX_BRIGHTNESS) / 10
            score = max(dark, bright)
            triage.apply_policy(settings.exposure, image, kind, f"brightness {image.brightness:.0f}", score)
        elif image.sharpness < _MIN_SHARPNESS:
            score = 1 - image.sharpness / _MIN_SHARPNESS
            triage.apply_policy(settings.blurred, image, "blurred", f"sharpness {image.sharpness:.1f}", score)


def _drop_exact_duplicates(triage: _Triage, images: Sequence[Inspection]) -> None:
    """Keep one of the images of a class that have the same bytes. Across classes they are conflicts, resolved later."""
    same: defaultdict[tuple[str, str], list[Inspection]] = defaultdict(list)
    for image in images:
        same[image.class_folder, image.sha256].append(image)
    for members in same.values():
        first, *others = sorted(members, key=triage.rank)
        for image in others:
            triage.record(image, "exact duplicate", f"of {first.path}", "quarantined", first.path)


def _resolve_conflicts(
    triage: _Triage, images: Sequence[Inspection], pairs: Sequence[VersionPair], opinions: _Opinions | None
) -> None:
    """Quarantine pictures that are in two classes: in the class that the judge rejects, or in both if it is unsure."""
    for left, right in ((images[pair.first], images[pair.second]) for pair in pairs):
        if left.class_folder == right.class_folder:
            continue
        wrong, detail = [left, right], "the judge was not asked"
        if opinions is not None:
            names = [opinions.name_of(image) for image in (left, right)]
            both = opinions.of_subject.loc[[left.path, right.path], names].mean()
            share = both / max(both.sum(), 1e-9)
            wrong = [image for image in (left, right) if share[opinions.name_of(image)] < CONFIDENT]
            detail = ", ".join(f"{name} {value:.2f}" for name, value in share.items())
        for image in wrong:
            other = right if image is left else left
            triage.record(image, "conflict", f"also {other.path} ({detail})", "quarantined", other.path)


def _drop_near_duplicates(triage: _Triage, images: Sequence[Inspection], pairs: Sequence[VersionPair]) -> None:
    """Keep the best version of each picture: an image is quarantined if it is paired with a better one that stays."""
    versions: defaultdict[str, list[tuple[Inspection, VersionPair]]] = defaultdict(list)
    defeats: Counter[str] = Counter()
    for pair in pairs:
        left, right = images[pair.first], images[pair.second]
        if left.class_folder == right.class_folder:
            versions[left.path].append((right, pair))
            versions[right.path].append((left, pair))
            if pair.worse is not None:
                defeats[images[pair.worse].path] += 1

    def rank(image: Inspection) -> tuple[bool, int, tuple[bool, int, int, str]]:
        return triage.overrides.get(image.path) != "keep", defeats[image.path], triage.rank(image)

    staying: set[str] = set()
    for image in sorted(triage.remaining(images), key=rank):
        better = next(((version, pair) for version, pair in versions[image.path] if version.path in staying), None)
        if better:
            version, pair = better
            kind = "mirror image" if pair.mirrored else "near duplicate"
            triage.record(image, kind, f"of {version.path}", "quarantined", version.path, pair.doubt)
        if image.path not in triage.quarantined:
            staying.add(image.path)


@dataclass(frozen=True)
class _Opinions:
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


def _ask_judge(raw: Path, images: Sequence[Inspection], judge: AskJudge | None, subjects: Subjects) -> _Opinions | None:
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
    return _Opinions(
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


def _check_topics(
    triage: _Triage,
    images: Sequence[Inspection],
    opinions: _Opinions,
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
                    "such images, so they are kept. Look at them; clean.off_topic decides."
                )
            policy = "quarantine" if known and not unsure else "flag"
        for image, detail, score in doubtful:
            triage.apply_policy(policy, image, "off topic", detail, score)


def _not_the_animal(
    images: Sequence[Inspection], opinions: _Opinions, threshold: float
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
    np.fill_diagonal(cosines, np.nan)
    likeness = np.nanmedian(cosines, axis=1)
    usual = float(np.median(likeness))
    spread = float(np.nanmedian(np.abs(cosines - np.nanmedian(cosines))))
    deviation = max(1.4826 * spread, _LEAST_DEVIATION)  # the factor makes it a normal distribution's
    return [
        (image, f"likeness to its folder {own:.2f}, usually {usual:.2f}", float(min(1.0, usual - own)))
        for image, own in zip(images, likeness.tolist(), strict=True)
        if own < usual - _OUTLIER_DEVIATIONS * deviation
    ]


def _check_captions(
    triage: _Triage,
    images: Sequence[Inspection],
    captions: Mapping[str, str],
    settings: params.Clean,
    subjects: Subjects,
) -> dict[str, str]:
    """Return the captions to train with, by path. An image with an empty caption uses the templates."""
    checked = {}
    for image in images:
        text, subject = captions.get(image.path), subjects.of(image.class_folder)
        if text is None:
            continue
        if not text:
            triage.record(image, "empty caption", "templates are used", "flagged")
            continue
        if not names_subject(text, subject):
            prepend = settings.caption_without_name == "prepend"
            triage.record(image, NO_NAME, f"{subject.name} not in: {text}", "repaired" if prepend else "flagged")
            text = f"{subject.name}, {text}" if prepend else text
        checked[image.path] = text
    return checked


def _refuse_captions(triage: _Triage, settings: params.Clean) -> None:
    nameless = [finding for finding in triage.findings if finding.kind == NO_NAME]
    if nameless and settings.caption_without_name == "refuse":
        more = f" and {len(nameless) - 1} more" if nameless[1:] else ""
        raise BestiaryError(
            f"The caption of {nameless[0].path}{more} lacks the subject's name: {printable(nameless[0].detail[:200])}. "
            "Add the name, or set clean.caption_without_name to prepend."
        )


def _name_groups(
    images: Sequence[Inspection], pairs: Sequence[VersionPair], kept: Sequence[Inspection]
) -> dict[str, str]:
    """Return, for each path of `kept`, a name for the group of versions of its picture.

    The name comes from the content of the kept versions, so it does not depend on their order. A worse version that is
    added later does not rename the group, so no image changes sides of the split.
    """
    links = np.array([(pair.first, pair.second) for pair in pairs], np.int64).reshape(-1, 2)
    numbers = duplicates.groups(links, len(images)).tolist()
    number_of = dict(zip((image.path for image in images), numbers, strict=True))
    first: dict[int, str] = {}
    for image in kept:
        number = number_of[image.path]
        first[number] = min(image.sha256, first.get(number, image.sha256))
    return {image.path: f"g{first[number_of[image.path]][:16]}" for image in kept}


def _write_images(
    raw: Path, target: Path, kept: Sequence[Inspection], group_of: Mapping[str, str], subjects: Subjects
) -> pd.DataFrame:
    """Link or convert each image into `target`; return the manifest."""
    names = _output_names(kept)
    for folder in sorted({image.class_folder for image in kept}):
        (target / folder).mkdir()
    for image in kept:
        if not image.changes:
            link(raw / image.path, target / names[image.path])

    def convert(image: Inspection) -> str:
        destination = target / names[image.path]
        picture = decode(raw / image.path).image
        if destination.suffix == ".jpg":
            picture.save(destination, quality=_JPEG_QUALITY, subsampling=0)
        else:
            picture.save(destination)
        return hashlib.sha256(destination.read_bytes()).hexdigest()

    changed = [image for image in kept if image.changes]
    hashes = {image.path: image.sha256 for image in kept}
    with ThreadPoolExecutor(cores()) as pool:
        converted = tqdm(
            pool.map(convert, changed), desc="convert images", total=len(changed), unit="image", disable=not changed
        )
        hashes |= zip((image.path for image in changed), converted, strict=True)
    columns = {
        "path": [names[image.path] for image in kept],
        "class": [image.class_folder for image in kept],
        "animal": [subjects.of(image.class_folder).name for image in kept],
        "group": [group_of[image.path] for image in kept],
        "width": [image.width for image in kept],
        "height": [image.height for image in kept],
        "sha256": [hashes[image.path] for image in kept],
    }
    return pd.DataFrame(columns)


def _output_names(kept: Sequence[Inspection]) -> dict[str, str]:
    """Return where each image goes: its own name with the right extension, plus part of its hash if that is taken."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for image in sorted(kept, key=lambda image: (bool(image.changes), image.path)):
        folder, _, file = image.path.partition("/")
        file = right_extension(safe_name(file), image.format)
        if image.changes:
            file = str(PurePosixPath(file).with_suffix(".jpg" if image.format in _PHOTO_FORMATS else ".png"))
        name = f"{folder}/{file}"
        if name.casefold() in taken:
            path = PurePosixPath(name)
            name = str(path.with_name(f"{path.stem}-{image.sha256[:12]}{path.suffix}"))
        taken.add(name.casefold())
        names[image.path] = name
    return names
