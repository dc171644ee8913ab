"""Perceptual hashes: what an image looks like in 64 bits, computed from a small grey version of it."""

from __future__ import annotations

import numpy as np
from PIL import Image

THUMBNAIL = 64  # pixels per side

_MAX_GREY_SIDE = 256
_HASHED_SIZE = (32, 32)
_COSINES = np.cos(np.pi / 64 * np.arange(8)[:, None] * (2 * np.arange(32) + 1))  # the 8 lowest of a 32-point DCT-II
_MIRROR_SIGNS = (-1.0) ** np.arange(8)  # mirroring an image multiplies the columns of its transform by these


def small_grey(image: Image.Image) -> Image.Image:
    """Return `image` in grey, reduced by a whole factor to at most 256 pixels per side."""
    grey = image if image.mode == "L" else image.convert("L")
    return grey.reduce(-(-max(grey.size) // _MAX_GREY_SIDE)) if max(grey.size) > _MAX_GREY_SIDE else grey


def thumbnail(image: Image.Image) -> Image.Image:
    """Return `image` in grey, squeezed to 64 x 64 pixels."""
    return small_grey(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


def hashes(thumb: Image.Image) -> tuple[int, int, int]:
    """Return the 64-bit perceptual hashes of a thumbnail, of its middle, and of its mirror image.

    Each equals `imagehash.phash` of that view. The hash of the middle is close to the hash of a copy with slightly
    cropped edges. Two resized views and one matrix product give all three, because hashing is most of what cleaning
    costs beyond decoding.

    >>> grey = thumbnail(Image.linear_gradient("L").rotate(30))
    >>> hashes(grey)[0] == hashes(grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[2]
    True
    """
    edge = 0.04 * THUMBNAIL
    boxes = ((0, 0, THUMBNAIL, THUMBNAIL), (edge, edge, THUMBNAIL - edge, THUMBNAIL - edge))
    views = [thumb.resize(_HASHED_SIZE, Image.Resampling.LANCZOS, box=box) for box in boxes]
    plain, middle = _COSINES @ np.stack([np.asarray(view, np.float64) for view in views]) @ _COSINES.T  # (8, 8) each
    waves = np.stack([plain, middle, plain * _MIRROR_SIGNS]).reshape(3, 64)
    ordered = np.sort(waves, axis=1)
    bits = waves > (ordered[:, 31:32] + ordered[:, 32:33]) / 2  # above the median
    first, second, third = np.packbits(bits, axis=1).view(">u8")[:, 0].tolist()
    return first, second, third
