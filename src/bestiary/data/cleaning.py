"""From images as they come to images to train on: every one gets a verdict, and none ends the run."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
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
from bestiary.data.findings import Action, Decision, Finding, write_findings
from bestiary.data.folder import class_files, link, replacing
from bestiary.data.hashing import thumbnail
from bestiary.data.images import decode, open_rgb, right_extension
from bestiary.data.inspection import Inspection, cores, inspect_all
from bestiary.errors import BestiaryError
from bestiary.subjects import ANIMALS, subject_of

# Images and texts in, the probability of each text for each image out: (B, len(texts)).
JudgeFunction = Callable[[Sequence[Image.Image], Sequence[str]], NDArray[np.float32]]

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
CONFIDENT = 0.8  # how sure the judge must be which of two folders a picture in both belongs to

_BLANK_CONTRAST = 4.0  # grey levels
_BLURRED_SHARPNESS = 15.0
_DARK_BRIGHTNESS, _BRIGHT_BRIGHTNESS = 20.0, 245.0
_BATCH = 64
_JUDGED_SIDE = 448  # pixels, twice what common judges look at
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Outcome:
    """What cleaning leaves: the manifest of the kept images, and all that was found."""

    images_in: int
    manifest: pd.DataFrame
    findings: list[Finding]
    unused_overrides: list[str]  # paths that no image has
    near_duplicates_seconds: float  # of finding them


@dataclass
class _Desk:
    """The images still in play, and what has been found so far."""

    overrides: Mapping[str, Decision]
    findings: list[Finding] = field(default_factory=list)
    quarantined: set[str] = field(default_factory=set)

    def note(self, look: Inspection, kind: str, detail: str, action: Action, other: str = "") -> None:
        """Write a finding down; an image that a person wants kept is not quarantined."""
        if action == "quarantined" and kind != "unreadable" and self.overrides.get(look.path) == "keep":
            action = "kept"
        if action == "quarantined":
            self.quarantined.add(look.path)
        self.findings.append(Finding(look.path, look.class_folder, kind, detail, action, other))

    def remaining(self, looks: Sequence[Inspection]) -> list[Inspection]:
        return [look for look in looks if look.path not in self.quarantined]


def clean(
    raw: Path,
    target: Path,
    settings: params.Clean,
    *,
    judge: JudgeFunction | None = None,
    overrides: Mapping[str, Decision] | None = None,
    report: Path | None = None,
    workers: int | None = None,
) -> Outcome:
    """Put the usable images of `raw`/<class>/ into `target`/<class>/ with a manifest, and the findings into `report`.

    An image that needs nothing keeps its bytes; the others become RGB. `judge` is needed unless `settings.off_topic` is
    off. `overrides` has the last word. The result depends neither on the number of workers nor on the files' order.
    Raises BestiaryError when nothing is left.
    """
    paths = [f"{name}/{path.name}" for name, files in class_files(raw).items() for path in files]
    desk = _Desk(overrides or {})
    looks = inspect_all(raw, paths, workers)
    _drop_by_hand(desk, looks)
    _judge_alone(desk, desk.remaining(looks), settings)
    _exact_duplicates(desk, desk.remaining(looks))
    looks = desk.remaining(looks)
    opinions = _opinions(raw, looks, judge if settings.off_topic != "off" else None)
    started = time.perf_counter()
    pairs, mirrored = _near_pairs(raw, looks, settings.near_duplicate_bits)
    searched = time.perf_counter() - started
    versions = np.concatenate([pairs, mirrored])
    _conflicts(desk, looks, versions, opinions)
    _near_duplicates(desk, looks, pairs, mirrored)
    if opinions is not None:
        _off_topic(desk, looks, opinions, settings)
    kept = desk.remaining(looks)
    group_of = _group_names(looks, versions, kept)
    if not kept:
        raise BestiaryError(f"None of the {len(paths)} images in {raw} can be used: nothing is left after cleaning.")
    with replacing(target) as fresh:
        manifest = _write(desk, raw, fresh, kept, group_of)
        manifest.to_csv(fresh / "manifest.csv", index=False)
    desk.findings.sort(key=lambda finding: (finding.kind, finding.path))
    if report is not None:
        with replacing(report) as fresh:
            write_findings(fresh, desk.findings, raw)
    return Outcome(len(paths), manifest, desk.findings, sorted(set(desk.overrides) - set(paths)), searched)


def _drop_by_hand(desk: _Desk, looks: Sequence[Inspection]) -> None:
    for look in looks:
        if desk.overrides.get(look.path) == "drop":
            desk.note(look, "dropped by hand", "overrides.csv", "quarantined")


def _judge_alone(desk: _Desk, looks: Sequence[Inspection], settings: params.Clean) -> None:
    """What can be said of an image without looking at any other."""
    for look in looks:
        if look.unreadable:
            desk.note(look, "unreadable", look.unreadable, "quarantined")
            continue
        if right_extension(look.path, look.format) != look.path:
            desk.note(look, "wrong extension", f"is {look.format}", "repaired")
        for change in look.changes:
            desk.note(look, change, "", "converted")
        short, long = sorted((look.width, look.height))
        if short < settings.min_side:
            desk.note(look, "too small", f"{look.width} x {look.height}", "quarantined")
        elif long / short > settings.max_aspect_ratio:
            desk.note(look, "extreme aspect ratio", f"{look.width} x {look.height}", "quarantined")
        elif look.contrast < _BLANK_CONTRAST:
            _act(desk, look, settings.blank, "blank", f"contrast {look.contrast:.1f}")
        elif not _DARK_BRIGHTNESS <= look.brightness <= _BRIGHT_BRIGHTNESS:
            kind = "dark" if look.brightness < _DARK_BRIGHTNESS else "bright"
            _act(desk, look, settings.exposure, kind, f"brightness {look.brightness:.0f}")
        elif look.sharpness < _BLURRED_SHARPNESS:
            _act(desk, look, settings.blurred, "blurred", f"sharpness {look.sharpness:.1f}")


def _act(desk: _Desk, look: Inspection, policy: params.Policy, kind: str, detail: str) -> None:
    if policy != "off":
        desk.note(look, kind, detail, "quarantined" if policy == "quarantine" else "flagged")


def _best_first(desk: _Desk, look: Inspection) -> tuple[bool, int, int, str]:
    """Of two that show the same: the one a person wants, the larger one, the one with more bytes, the first by name."""
    return desk.overrides.get(look.path) != "keep", -look.width * look.height, -look.bytes, look.path


def _exact_duplicates(desk: _Desk, looks: Sequence[Inspection]) -> None:
    """Of the same bytes in one class the first is kept; in two classes they are a conflict, decided later."""
    same: defaultdict[tuple[str, str], list[Inspection]] = defaultdict(list)
    for look in looks:
        same[look.class_folder, look.sha256].append(look)
    for members in same.values():
        first, *others = sorted(members, key=lambda look: _best_first(desk, look))
        for look in others:
            desk.note(look, "exact duplicate", f"of {first.path}", "quarantined", first.path)


def _near_pairs(raw: Path, looks: Sequence[Inspection], bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of `looks` that show the same picture, and those that show it mirrored: (P, 2) and (Q, 2)."""
    plain, middle, mirror = (
        np.array([getattr(look, name) for look in looks], dtype=np.uint64)
        for name in ("hash", "hash_of_middle", "hash_of_mirror")
    )
    same = duplicates.neighbours(plain, plain, bits, half=True)
    cropped = duplicates.neighbours(middle, plain, bits)
    confirmed = _confirm(raw, looks, np.concatenate([same, cropped]), mirrored=False)
    turned = _confirm(raw, looks, duplicates.neighbours(plain, mirror, bits, half=True), mirrored=True)
    known = set(map(tuple, confirmed.tolist()))  # what is symmetric in itself is no mirror image
    return confirmed, np.array([p for p in turned.tolist() if tuple(p) not in known], np.int64).reshape(-1, 2)


def _confirm(
    raw: Path, looks: Sequence[Inspection], candidates: NDArray[np.int64], *, mirrored: bool
) -> NDArray[np.int64]:
    """Those of the pairs of candidates whose aligned pixels agree, each once, the smaller index first."""
    pairs = np.unique(np.sort(candidates[candidates[:, 0] != candidates[:, 1]], axis=1), axis=0)
    wanted = np.unique(pairs)

    def load(index: int) -> NDArray[np.uint8]:
        return np.asarray(thumbnail(open_rgb(raw / looks[index].path)))

    with ThreadPoolExecutor(cores()) as pool:
        thumbnails = dict(zip(wanted.tolist(), pool.map(load, wanted.tolist()), strict=True))
    same = [np.empty(0, bool)]
    for start in range(0, len(pairs), _BATCH):
        left, right = (
            np.stack([thumbnails[index] for index in pairs[start : start + _BATCH, side].tolist()]).astype(np.float32)
            for side in (0, 1)
        )
        same.append(duplicates.compare(left, right[:, :, ::-1] if mirrored else right).same)
    agreed: NDArray[np.int64] = pairs[np.concatenate(same)]
    return agreed


def _conflicts(
    desk: _Desk, looks: Sequence[Inspection], pairs: NDArray[np.int64], opinions: pd.DataFrame | None
) -> None:
    """A picture in two class folders: the judge says which is right; where it cannot, both go."""
    for left, right in ((looks[a], looks[b]) for a, b in pairs.tolist()):
        if left.class_folder == right.class_folder:
            continue
        wrong, detail = [left, right], "the judge was not asked"
        if opinions is not None:
            both = opinions.loc[[left.path, right.path], [left.class_folder, right.class_folder]].mean()
            share = both / max(both.sum(), 1e-9)
            wrong = [look for look in (left, right) if share[look.class_folder] < CONFIDENT]
            detail = ", ".join(f"{name} {value:.2f}" for name, value in share.items())
        for look in wrong:
            other = right if look is left else left
            desk.note(look, "conflict", f"also {other.path} ({detail})", "quarantined", other.path)


def _near_duplicates(
    desk: _Desk, looks: Sequence[Inspection], pairs: NDArray[np.int64], mirrored: NDArray[np.int64]
) -> None:
    """The best of each picture's versions is kept: an image goes when it is paired with one that stays."""
    twins: defaultdict[str, list[tuple[Inspection, str]]] = defaultdict(list)
    for kind, found in (("near duplicate", pairs), ("mirror image", mirrored)):
        for left, right in ((looks[a], looks[b]) for a, b in found.tolist()):
            if left.class_folder == right.class_folder:
                twins[left.path].append((right, kind))
                twins[right.path].append((left, kind))
    staying: set[str] = set()
    for look in sorted(desk.remaining(looks), key=lambda look: _best_first(desk, look)):
        better = next(((twin, kind) for twin, kind in twins[look.path] if twin.path in staying), None)
        if better:
            desk.note(look, better[1], f"of {better[0].path}", "quarantined", better[0].path)
        if look.path not in desk.quarantined:
            staying.add(look.path)


def _opinions(raw: Path, looks: Sequence[Inspection], judge: JudgeFunction | None) -> pd.DataFrame | None:
    """The judge's probability of each class folder's animal, and of no animal at all: paths x (folders, NO_ANIMAL)."""
    if judge is None or not looks:
        return None
    classes = sorted({look.class_folder for look in looks} | _other_animals(looks))
    texts = [*(f"a photo of {subject_of(name).with_article}" for name in classes), *NOT_ANIMALS]
    rows = []
    with ThreadPoolExecutor(cores()) as pool:
        for batch in tqdm(list(_batches(looks)), desc="judge", unit="batch"):
            images = list(pool.map(lambda look: _for_judge(open_rgb(raw / look.path)), batch))
            probabilities = judge(images, texts)
            nothing = probabilities[:, len(classes) :].sum(axis=1, keepdims=True)
            rows.append(np.concatenate([probabilities[:, : len(classes)], nothing], axis=1))
    return pd.DataFrame(np.concatenate(rows), index=[look.path for look in looks], columns=[*classes, NO_ANIMAL])


def _other_animals(looks: Sequence[Inspection]) -> set[str]:
    """All 100, for an image may show one that was not downloaded; unless the folders are somebody's own, whose
    "persian" is a cat too."""
    known = {animal.folder for animal in ANIMALS}
    return known if {look.class_folder for look in looks} <= known else set()


def _for_judge(image: Image.Image) -> Image.Image:
    """`image`, reduced by a whole factor if it is large: a batch of photographs of 50 megapixels needs 10 GB."""
    factor = min(image.size) // _JUDGED_SIDE
    return image.reduce(factor) if factor > 1 else image


def _batches(looks: Sequence[Inspection]) -> Iterator[Sequence[Inspection]]:
    return (looks[start : start + _BATCH] for start in range(0, len(looks), _BATCH))


def _off_topic(desk: _Desk, looks: Sequence[Inspection], opinions: pd.DataFrame, settings: params.Clean) -> None:
    for look in desk.remaining(looks):
        row = opinions.loc[look.path]
        # Two animals are easily taken for each other, an animal and a car are not.
        if row[look.class_folder] < settings.off_topic_threshold or row[NO_ANIMAL] > 0.5:
            detail = f"{look.class_folder} {row[look.class_folder]:.3f}, {row.idxmax()} {row.max():.3f}"
            _act(desk, look, settings.off_topic, "off topic", detail)


def _group_names(looks: Sequence[Inspection], pairs: NDArray[np.int64], kept: Sequence[Inspection]) -> dict[str, str]:
    """A name for the group of versions of one picture that each of `kept` is of, the same in whatever order they come.

    By the content of what is kept: a worse copy that is added later does not rename the group, so nobody changes sides.
    """
    number_of = dict(zip((look.path for look in looks), duplicates.groups(pairs, len(looks)).tolist(), strict=True))
    first: dict[int, str] = {}
    for look in kept:
        number = number_of[look.path]
        first[number] = min(look.sha256, first.get(number, look.sha256))
    return {look.path: f"g{first[number_of[look.path]][:16]}" for look in kept}


def _write(
    desk: _Desk, raw: Path, target: Path, kept: Sequence[Inspection], group_of: Mapping[str, str]
) -> pd.DataFrame:
    names = _clean_names(kept)
    for folder in sorted({look.class_folder for look in kept}):
        (target / folder).mkdir()
    for look in kept:
        if not look.changes:
            link(raw / look.path, target / names[look.path])

    def convert(look: Inspection) -> str:
        destination = target / names[look.path]
        image = decode(raw / look.path).image
        if destination.suffix == ".jpg":
            image.save(destination, quality=_JPEG_QUALITY, subsampling=0)
        else:
            image.save(destination)
        return hashlib.sha256(destination.read_bytes()).hexdigest()

    changed = [look for look in kept if look.changes]
    hashes = {look.path: look.sha256 for look in kept}
    with ThreadPoolExecutor(cores()) as pool:
        converted = tqdm(pool.map(convert, changed), desc="convert", total=len(changed), unit="image")
        hashes |= zip((look.path for look in changed), converted, strict=True)
    columns = {
        "path": [names[look.path] for look in kept],
        "class": [look.class_folder for look in kept],
        "animal": [subject_of(look.class_folder).name for look in kept],
        "group": [group_of[look.path] for look in kept],
        "width": [look.width for look in kept],
        "height": [look.height for look in kept],
        "sha256": [hashes[look.path] for look in kept],
    }
    return pd.DataFrame(columns)


def _clean_names(kept: Sequence[Inspection]) -> dict[str, str]:
    """Where each image goes: under its own name with the right extension, with a piece of its hash if that is taken."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for look in sorted(kept, key=lambda look: (bool(look.changes), look.path)):
        name = right_extension(look.path, look.format)
        if look.changes:
            converted = PurePosixPath(name).with_suffix(".jpg" if look.format in ("JPEG", "MPO") else ".png")
            name = str(converted)
        if name.casefold() in taken:
            path = PurePosixPath(name)
            name = str(path.with_name(f"{path.stem}-{look.sha256[:12]}{path.suffix}"))
        taken.add(name.casefold())
        names[look.path] = name
    return names
