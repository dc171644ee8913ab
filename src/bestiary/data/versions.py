"""Versions of one picture among images: finding them, and which of two is the worse one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from bestiary.data import duplicates
from bestiary.data.hashing import THUMBNAIL, VIEWS, Hashes, content_box, small_grey
from bestiary.data.images import decode
from bestiary.data.inspection import Inspection
from bestiary.worker_processes import cores

_BATCH = 64
_DETAIL = 2 * THUMBNAIL  # pixels per side, for finding watermarks
_BLOCK = 8
_PIXELS_NEEDED = 1024  # per side, of a JPEG that is only looked at in small
MIRRORED_VIEWS = 3  # of a mirrored picture, search for crops of the middle only: the first views
_WHOLE = (0.0, 0.0, 1.0, 1.0)
_SAME_CUT = 0.03  # versions whose area differs by less show the same part of the picture
_SAME_BUT_FRAMED = 0.12  # the edge of a frame is known to a few pixels of the small image
_FRAMED = 0.02  # share of the image that is a flat margin, more than in the other
_MUCH_SMALLER = 0.25  # of the other's pixels: so small a version does not win by showing more
# An enlarged image has less than this, times the square of the smaller version's share of its side, of the smaller
# version's detail at its finest scale. Measured on JPEGs enlarged by 1.2 to 2 and shrunk to 50 to 80 %.
_ENLARGED = 1.2
_NEARLY_AS_LARGE, _MIN_SHARE = 0.95, 0.5
_NO_DETAIL = 0.02
_ROUNDING = 1 / 12  # variance of rounding to whole grey levels
_MIN_MARK, _MAX_MARK = 6.0, 0.5  # grey levels that a mark changes a block by; share of blocks
_MORE_EDGES = 1.2  # in the changed blocks, relative to the other image
_WINDOW = 512  # pixels per side of the part in which fine detail is measured


@dataclass(frozen=True)
class VersionPair:
    """Two images that show the same picture, by their indices, the smaller first."""

    first: int
    second: int
    mirrored: bool
    doubt: float  # 0 to 1: how near the pair is to not being taken for versions
    worse: int | None = None  # index of the worse one; None if neither is


@dataclass(frozen=True)
class _Candidates:
    """Pairs of images that may be versions. The second is like a part of the first."""

    pairs: NDArray[np.int64]  # (P, 2)
    boxes: NDArray[np.float32]  # (P, 4): which part
    mirrored: bool


def find_versions(raw: Path, images: Sequence[Inspection], bits: int) -> list[VersionPair]:
    """Return the pairs of `images` below `raw` that show the same picture, in order of their indices.

    Perceptual hashes within `bits` of 64 propose pairs; the aligned pixels decide, and say which version is worse.
    """
    found: dict[tuple[int, int], VersionPair] = {}
    for mirrored in (False, True):  # copies of a symmetric picture are not mirror images
        for pair in _confirm(raw, images, _propose(images, bits, mirrored=mirrored)):
            found.setdefault((pair.first, pair.second), pair)
    return [found[key] for key in sorted(found)]


def _hashes_of(image: Inspection) -> Hashes:
    assert image.hashes is not None, f"{image.path} is unreadable, so it has no versions"
    return image.hashes


def _propose(images: Sequence[Inspection], bits: int, *, mirrored: bool) -> _Candidates:
    """Return each pair with a hash of the first, or of a view of it, within `bits` of the second's: nearest view."""
    known = [_hashes_of(image) for image in images]
    plain = np.array([each.plain for each in known], np.uint64)
    views = np.array([each.views for each in known], np.uint64).reshape(-1, len(VIEWS))
    searched = np.array([each.mirror for each in known], np.uint64) if mirrored else plain
    found = []
    for number, hashes in enumerate((plain, *views.T[: MIRRORED_VIEWS if mirrored else None])):
        pairs = duplicates.neighbours(hashes, searched, bits, half=number == 0)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        distances = np.bitwise_count(hashes[pairs[:, 0]] ^ searched[pairs[:, 1]])
        found.append(np.column_stack([np.sort(pairs, axis=1), distances, np.full(len(pairs), number), pairs]))
    rows = np.concatenate(found).astype(np.int64)
    rows = rows[np.lexsort(rows.T[::-1])]  # each pair's nearest view first
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    rows = rows[first]
    return _Candidates(rows[:, 4:], np.array([_WHOLE, *VIEWS], np.float32)[rows[:, 3]], mirrored)


@dataclass(frozen=True)
class _Look:
    """One image in grey without flat margins, and which share of the image that is."""

    pixels: NDArray[np.uint8]  # (_DETAIL, _DETAIL)
    content: float


def _look(path: Path) -> _Look:
    grey = small_grey(decode(path, at_least=_PIXELS_NEEDED).image)
    content = grey.crop(content_box(grey))
    pixels = np.asarray(content.resize((_DETAIL, _DETAIL), Image.Resampling.LANCZOS))
    return _Look(pixels, content.width * content.height / (grey.width * grey.height))


def _confirm(raw: Path, images: Sequence[Inspection], candidates: _Candidates) -> list[VersionPair]:
    """Return the candidates whose aligned pixels agree."""
    used = np.unique(candidates.pairs).tolist()
    with ThreadPoolExecutor(cores()) as pool:
        looks = dict(zip(used, pool.map(lambda index: _look(raw / images[index].path), used), strict=True))
    found = []
    for start in range(0, len(candidates.pairs), _BATCH):
        pairs = candidates.pairs[start : start + _BATCH]
        left, right = (
            np.stack([looks[index].pixels for index in side]).astype(np.float32) for side in pairs.T.tolist()
        )
        if candidates.mirrored:
            right = right[:, :, ::-1]
        similarity = duplicates.compare(
            duplicates.shrink(left, THUMBNAIL),
            duplicates.shrink(right, THUMBNAIL),
            duplicates.warp_of(candidates.boxes[start : start + _BATCH]),
        )
        for number in np.flatnonzero(similarity.same).tolist():
            first, second = pairs[number].tolist()
            warp = similarity.warp[number]
            worse = _worse(
                raw,
                (images[first], images[second]),
                (looks[first].content, looks[second].content),
                float(warp[0] * warp[4] - warp[1] * warp[3]),
                _with_a_mark(left[number], right[number], warp),
            )
            index = None if worse is None else (first, second)[worse]
            doubt = float(similarity.doubt[number])
            found.append(VersionPair(min(first, second), max(first, second), candidates.mirrored, doubt, index))
    return found


def _worse(
    raw: Path, pair: tuple[Inspection, Inspection], contents: tuple[float, float], area: float, marked: int | None
) -> int | None:
    """Return which of two versions is worse (0 or 1), or None.

    Worse is, in this order: the one that shows less; the one with a frame; the one with a mark across; the one that was
    enlarged, or is smaller. `contents` are the shares of the images without
    flat margins, `area` is the share of the first that the second shows. A version of less than a quarter
    of the other's pixels wins none of the first two.
    """
    area, contents = _with_flat_parts(area, contents)
    pixels = [image.width * image.height * content for image, content in zip(pair, contents, strict=True)]
    pixels[0] *= area  # of the part that both show, roughly
    small = min(pixels) < _MUCH_SMALLER * max(pixels)
    smaller = int(pixels[1] < pixels[0])
    worse = None
    one_framed = abs(contents[0] - contents[1]) > _FRAMED
    if abs(area - 1) > (_SAME_BUT_FRAMED if one_framed else _SAME_CUT):
        worse = int(area < 1)
    elif one_framed:
        worse = int(contents[1] < contents[0])
    elif marked is not None:
        return marked
    if worse is not None and not (small and worse != smaller):
        return worse
    if min(pixels) > 0.95 * max(pixels):
        return None
    larger = 1 - smaller
    return larger if _was_enlarged(raw, pair[larger], pair[smaller]) else smaller


def _with_flat_parts(area: float, contents: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    """Return `area` and `contents` with what only seems to be a margin: a flat sky, where the other shows more."""
    first, second = contents
    if max(contents) == 1:
        return area, contents
    if area > 1:
        shown = min(1.0, first * area)
        return area * first / shown, (shown, second)
    shown = min(1.0, second / area)
    return area * shown / second, (first, shown)


def _with_a_mark(left: NDArray[np.float32], right: NDArray[np.float32], warp: NDArray[np.float32]) -> int | None:
    """Return which of two aligned images (0 or 1) has something drawn over it, or None.

    Such a thing changes few parts much, and has more edges than what it hides.
    """
    moved, inside = duplicates.warped(left, warp)
    gain, offset = np.polyfit(moved[inside], right[inside], 1)
    difference = _blocks(np.abs(gaussian_filter(gain * moved + offset - right, 1.0)) * inside)
    odd = difference > max(3 * float(np.median(difference)), _MIN_MARK)
    if not odd.any() or odd.mean() > _MAX_MARK:
        return None
    edges = [_blocks(np.abs(np.gradient(image)).sum(axis=0) * inside) for image in (moved, right)]
    strength = [float(each[odd].mean() / (each[~odd].mean() + 1e-6)) for each in edges]
    marked = int(strength[1] > strength[0])
    return marked if strength[marked] > max(1.0, _MORE_EDGES * strength[1 - marked]) else None


def _blocks(image: NDArray[np.float32]) -> NDArray[np.float32]:
    means: NDArray[np.float32] = duplicates.shrink(image[None], len(image) // _BLOCK)[0]
    return means


def _was_enlarged(raw: Path, larger: Inspection, smaller: Inspection) -> bool:
    """Whether the larger of two versions has hardly any detail that is too fine for the smaller one."""
    share = min(smaller.width / larger.width, smaller.height / larger.height)
    if share > _NEARLY_AS_LARGE:
        return False
    images = [decode(raw / image.path).image.convert("L") for image in (larger, smaller)]
    if share < _MIN_SHARE:
        size = (round(images[0].width * share / _MIN_SHARE), round(images[0].height * share / _MIN_SHARE))
        images[0] = images[0].resize(size, Image.Resampling.LANCZOS)
    limit = _ENLARGED * max(share, _MIN_SHARE) ** 2
    return _fine_detail(images[0]) < limit * (_fine_detail(images[1]) + _NO_DETAIL)


def _fine_detail(grey: Image.Image) -> float:
    """Return how strong the two finest frequencies are beside a middle one, in the 8 x 8 blocks of JPEG."""
    left, top = (max(0, side - _WINDOW) // 16 * 8 for side in grey.size)
    levels = np.asarray(grey, np.float32)[top : top + _WINDOW, left : left + _WINDOW]
    rows, columns = levels.shape[0] // 8, levels.shape[1] // 8
    blocks = levels[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3)
    power = (dctn(blocks, axes=(2, 3), norm="ortho") ** 2).mean(axis=(0, 1))
    frequency = np.maximum.outer(np.arange(8), np.arange(8))
    middle, *fine = (power[frequency == number].mean() for number in (3, 6, 7))
    return float(sum(np.sqrt(max(each - _ROUNDING, 0.0)) for each in fine) / np.sqrt(middle + 1e-6))
