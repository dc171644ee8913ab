"""Cleaning: keep, convert or quarantine each raw image. A broken image is a finding and never stops the run."""

from __future__ import annotations

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from tqdm import tqdm

from bestiary import params
from bestiary.data import duplicates
from bestiary.data.caption_policy import check_captions, describe_captions, refuse_captions
from bestiary.data.captions import load_captions
from bestiary.data.findings import Decision, Finding, write_findings
from bestiary.data.folder import link, replacing
from bestiary.data.images import decode, right_extension
from bestiary.data.inspection import Inspection, inspect_all
from bestiary.data.listing import list_images, read_left_out
from bestiary.data.losses import Loss, check_losses, describe_losses, losses
from bestiary.data.names import safe_name
from bestiary.data.off_topic import AskJudge, Opinions, ask_judge, check_topics
from bestiary.data.triage import Triage
from bestiary.data.versions import VersionPair, find_versions
from bestiary.errors import BestiaryError
from bestiary.subjects import Subjects, check_folders
from bestiary.worker_processes import cores

# If the judge gives one of the two classes of an image at least this share, the image stays in that class only.
CONFIDENT = 0.8

_MIN_CONTRAST = 4.0  # grey levels
_MIN_SHARPNESS = 15.0
_MIN_BRIGHTNESS, _MAX_BRIGHTNESS = 20.0, 245.0  # grey levels
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
    triage = Triage(*_match_overrides(by_hand.overrides, paths))
    images = inspect_all(raw, paths, workers)
    _drop_by_override(triage, images)
    _check_each(triage, triage.remaining(images), settings)
    _drop_exact_duplicates(triage, triage.remaining(images))
    images = triage.remaining(images)
    opinions = None if settings.off_topic == "off" else ask_judge(raw, images, judge, subjects)
    started = time.perf_counter()
    pairs = find_versions(raw, images, settings.near_duplicate_bits)
    search_seconds = time.perf_counter() - started
    _resolve_conflicts(triage, images, pairs, opinions)
    _drop_near_duplicates(triage, images, pairs)
    if opinions is not None:
        check_topics(triage, images, opinions, settings, tell)
    kept = triage.remaining(images)
    captions = check_captions(triage, kept, load_captions(raw), settings, subjects)
    triage.findings += [Finding(f.path, f.class_folder, f.kind, f.detail, "left out") for f in read_left_out(raw)]
    triage.findings.sort(key=lambda finding: (finding.kind, finding.path))
    if report is not None:
        with replacing(report) as fresh:
            write_findings(fresh, triage.findings, raw)
    lost = losses({name: len(files) for name, files in classes.items()}, triage.findings)
    for line in [*describe_losses(lost), *describe_captions(triage.findings, settings)]:
        tell(line)
    check_losses(lost)
    refuse_captions(triage.findings, settings)
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


def _drop_by_override(triage: Triage, images: Sequence[Inspection]) -> None:
    for image in images:
        if triage.overrides.get(image.path) == "drop":
            triage.record(image, "dropped by hand", "overrides.csv", "quarantined")


def _check_each(triage: Triage, images: Sequence[Inspection], settings: params.Clean) -> None:
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


def _drop_exact_duplicates(triage: Triage, images: Sequence[Inspection]) -> None:
    """Keep one of the images of a class that have the same bytes. Across classes they are conflicts, resolved later."""
    same: defaultdict[tuple[str, str], list[Inspection]] = defaultdict(list)
    for image in images:
        same[image.class_folder, image.sha256].append(image)
    for members in same.values():
        first, *others = sorted(members, key=triage.rank)
        for image in others:
            triage.record(image, "exact duplicate", f"of {first.path}", "quarantined", first.path)


def _resolve_conflicts(
    triage: Triage, images: Sequence[Inspection], pairs: Sequence[VersionPair], opinions: Opinions | None
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


def _drop_near_duplicates(triage: Triage, images: Sequence[Inspection], pairs: Sequence[VersionPair]) -> None:
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
