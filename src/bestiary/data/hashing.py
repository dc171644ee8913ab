"""What an image looks like in 64 bits: perceptual hashes, from a small grey version of it."""

from __future__ import annotations

import numpy as np
from PIL import Image

THUMBNAIL = 64  # pixels, each side

_SMALL = 256
_HASHED = (32, 32)
_COSINES = np.cos(np.pi / 64 * np.arange(8)[:, None] * (2 * np.arange(32) + 1))  # the 8 slowest of a DCT-II of 32
_MIRRORED = (-1.0) ** np.arange(8)  # what mirroring does to each column of the transform


def small_grey(image: Image.Image) -> Image.Image:
    """`image` in grey, reduced by a whole factor to at most 256 pixels a side."""
    grey = image if image.mode == "L" else image.convert("L")
    return grey.reduce(-(-max(grey.size) // _SMALL)) if max(grey.size) > _SMALL else grey


def thumbnail(image: Image.Image) -> Image.Image:
    """`image` in grey, squeezed to 64 x 64."""
    return small_grey(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


def hashes(thumb: Image.Image) -> tuple[int, int, int]:
    """64-bit perceptual hashes of a thumbnail, of its middle, and of its mirror image: imagehash.phash of each.

    The hash of the middle lies near that of a copy with a little cut off its sides. All three from two images and one
    product of matrices: hashing is most of what cleaning costs beyond decoding.
    """
    edge = 0.04 * THUMBNAIL
    boxes = ((0, 0, THUMBNAIL, THUMBNAIL), (edge, edge, THUMBNAIL - edge, THUMBNAIL - edge))
    views = [thumb.resize(_HASHED, Image.Resampling.LANCZOS, box=box) for box in boxes]
    plain, middle = _COSINES @ np.stack([np.asarray(view, np.float64) for view in views]) @ _COSINES.T  # (8, 8) each
    waves = np.stack([plain, middle, plain * _MIRRORED]).reshape(3, 64)
    ordered = np.sort(waves, axis=1)
    bits = waves > (ordered[:, 31:32] + ordered[:, 32:33]) / 2  # above the median
    first, second, third = np.packbits(bits, axis=1).view(">u8")[:, 0].tolist()
    return first, second, third
