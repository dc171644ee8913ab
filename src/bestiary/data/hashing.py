"""Perceptual hashes: what an image looks like in 64 bits, computed from a small grey version of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL = 64  # pixels per side

_MAX_GREY_SIDE = 256
_HASHED_SIZE = (32, 32)
_COSINES = np.cos(np.pi / 64 * np.arange(8)[:, None] * (2 * np.arange(32) + 1))  # the 8 lowest of a 32-point DCT-II
_MIRROR_SIGNS = (-1.0) ** np.arange(8)  # mirroring an image multiplies the columns of its transform by these

Box = tuple[float, float, float, float]  # left, top, right, bottom as shares of width and height

# Parts of an image whose hashes are close to those of cropped copies: the middle, and the image less one side.
VIEWS: tuple[Box, ...] = (
    (0.04, 0.04, 0.96, 0.96),
    (0.08, 0.08, 0.92, 0.92),
    (0.12, 0.12, 0.88, 0.88),
    (0.16, 0.16, 0.84, 0.84),
    (0.14, 0.0, 0.86, 1.0),
    (0.0, 0.14, 1.0, 0.86),
    (0.15, 0.0, 1.0, 1.0),
    (0.0, 0.15, 1.0, 1.0),
    (0.0, 0.0, 0.85, 1.0),
    (0.0, 0.0, 1.0, 0.85),
)

_TONE = 4.0  # grey levels around a margin's tone: compression changes it by less
_FLAT, _WITH_TEXT = 0.97, 0.4  # shares of a line's pixels in the margin's tone
_MIN_CONTENT = 0.4  # share of width and of height: with less left, the margins belong to the picture


def small_grey(image: Image.Image) -> Image.Image:
    """Return `image` in grey, reduced by a whole factor to at most 256 pixels per side."""
    grey = image if image.mode == "L" else image.convert("L")
    return grey.reduce(-(-max(grey.size) // _MAX_GREY_SIDE)) if max(grey.size) > _MAX_GREY_SIDE else grey


def thumbnail(image: Image.Image) -> Image.Image:
    """Return `image` in grey, squeezed to 64 x 64 pixels."""
    return small_grey(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


def content_box(grey: Image.Image) -> tuple[int, int, int, int]:
    """Return the box of a small grey image without flat margins: borders, letterbox bars, and bars with a caption.

    >>> grey = Image.new("L", (296, 296), "white")
    >>> grey.paste(Image.effect_noise((256, 256), 60), (20, 20))
    >>> content_box(grey)
    (21, 21, 275, 275)
    """
    levels = np.asarray(grey, np.float32)
    top, bottom = _margin(levels), _margin(levels[::-1])
    height = grey.height - top - bottom
    if height >= _MIN_CONTENT * grey.height:
        columns = levels[top : top + height].T
        left, right = _margin(columns), _margin(columns[::-1])
        width = grey.width - left - right
        if width >= _MIN_CONTENT * grey.width:
            return left, top, left + width, top + height
    return 0, 0, grey.width, grey.height


def _margin(lines: NDArray[np.float32]) -> int:
    """Return how many lines from the first are a margin. It ends with a flat line; a caption may interrupt it."""
    share = (np.abs(lines - np.median(lines[0])) <= _TONE).mean(axis=1)
    end = int(np.argmax(share < _WITH_TEXT)) if share.min() < _WITH_TEXT else len(share)
    flat = np.flatnonzero(share[:end] >= _FLAT)
    return int(flat[-1]) + 2 if share[0] >= _FLAT else 0  # the next line is blurred by reducing and compression


@dataclass(frozen=True, slots=True)
class Hashes:
    """The 64-bit perceptual hashes of a thumbnail, of its mirror image, and of each of its `VIEWS`."""

    plain: int
    mirror: int
    views: tuple[int, ...]


def hashes(thumb: Image.Image) -> Hashes:
    """Return the 64-bit perceptual hashes of a thumbnail, of its mirror image, and of its views.

    Each equals `imagehash.phash` of that image. The resized views and one matrix product give all of them, because
    hashing is most of what cleaning costs beyond decoding.

    >>> grey = thumbnail(Image.linear_gradient("L").rotate(30))
    >>> hashes(grey).plain == hashes(grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).mirror
    True
    """
    side = THUMBNAIL
    parts = [
        thumb.resize(_HASHED_SIZE, Image.Resampling.LANCZOS, (left * side, top * side, right * side, bottom * side))
        for left, top, right, bottom in ((0.0, 0.0, 1.0, 1.0), *VIEWS)
    ]
    waves = _COSINES @ np.stack([np.asarray(part, np.float64) for part in parts]) @ _COSINES.T  # (views, 8, 8)
    waves = np.concatenate([waves[:1], waves[:1] * _MIRROR_SIGNS, waves[1:]]).reshape(-1, 64)
    ordered = np.sort(waves, axis=1)
    bits = waves > (ordered[:, 31:32] + ordered[:, 32:33]) / 2  # above the median
    plain, mirror, *views = np.packbits(bits, axis=1).view(">u8")[:, 0].tolist()
    return Hashes(plain, mirror, tuple(views))
