"""Finding near-duplicates: perceptual hashes propose pairs, and a comparison of the aligned pixels decides."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from bestiary.data.hashing import THUMBNAIL

Thumbnails = NDArray[np.float32]  # (B, 64, 64), grey, 0 to 255

_IDENTITY = np.array([1, 0, 0, 0, 1, 0], np.float32)  # a warp: see `compare`
_MIN_WARP = np.array([0.6, -0.1, -0.5, -0.1, 0.6, -0.5], np.float32)
_MAX_WARP = np.array([1.6, 0.1, 0.5, 0.1, 1.6, 0.5], np.float32)
_BLOCK = 64  # rows of the distance matrix at a time: 64 x 40,000 x 8 bytes = 20 MB


def neighbours(
    left: NDArray[np.uint64], right: NDArray[np.uint64], bits: int, *, half: bool = False
) -> NDArray[np.int64]:
    """Return the pairs (i, j) whose 64-bit hashes `left[i]` and `right[j]` differ in at most `bits` bits, (P, 2).

    `half` returns only pairs with i < j: enough where the pairs (i, j) and (j, i) mean the same.

    >>> values = np.array([0b0000, 0b0011, 0b1111], np.uint64)
    >>> neighbours(values, values, 2, half=True).tolist()
    [[0, 1], [1, 2]]
    """

    def block(start: int) -> NDArray[np.int64]:
        first = start + 1 if half else 0
        distances = np.bitwise_count(left[start : start + _BLOCK, None] ^ right[None, first:])
        rows, columns = np.nonzero(distances <= bits)
        pairs = np.stack([rows + start, columns + first], axis=1).astype(np.int64)
        return pairs[pairs[:, 0] < pairs[:, 1]] if half else pairs

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # NumPy releases the GIL
        found = list(pool.map(block, range(0, len(left), _BLOCK)))
    return np.concatenate([np.empty((0, 2), np.int64), *found])


def groups(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return a group number for each of `count` images, (N,). Images that pairs connect share a group.

    >>> numbers = groups(np.array([[0, 2]]), 3)
    >>> bool(numbers[0] == numbers[2] != numbers[1])
    True
    """
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    numbers: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
    return numbers


# Measured on drawn animals of one class, the hardest case (same outline, same background). Of the copies that were
# resized, re-encoded or cropped by up to 12 % per side, 98 % correlate by at least 0.988 and differ by at most 12 grey
# levels. Different drawings reach a correlation of 0.960 and differ by as little as 15 levels.
_MIN_CORRELATION = 0.975
_MAX_WORST_BLOCK = 15.0
# Watermarks and clipped highlights change few blocks much. Measured on 6 photograph-like pictures of each kind: copies
# with clipped highlights correlate by at least 0.976, with 94 % of the blocks; watermarked ones by 0.989, with 77 %.
# Of different drawings of the sample, those with over 93 % of the blocks reach 0.957, the others 0.981.
_MOST_BLOCKS = (0.975, 0.93)  # least correlation, and least share of the textured blocks that correlate
_MANY_BLOCKS = (0.985, 0.75)
_MIN_OVERLAP = 0.6
# Pixels per side, Gauss-Newton steps, and the correlation from which on a pair is refined further.
_LEVELS = ((16, 8, 0.75), (32, 4, 0.9), (64, 3, 0.9))
_TEXTURE = 3.0  # grey levels, standard deviation within a block
_BLOCK_CORRELATION = 0.8


@dataclass(frozen=True)
class Similarity:
    """How similar pairs of thumbnails are after the first is warped onto the second. Each (B,), but `warp`."""

    correlation: NDArray[np.float32]  # of the pixels that both show
    worst_block: NDArray[np.float32]  # mean difference of the most different 8 x 8 block, in grey levels
    overlap: NDArray[np.float32]  # share of the second thumbnail that the first covers
    agreement: NDArray[np.float32]  # share of the textured blocks whose texture correlates
    warp: NDArray[np.float32]  # (B, 6), see `compare`

    @property
    def same(self) -> NDArray[np.bool_]:
        """Whether the two show the same picture. (B,)"""
        alike = (self.correlation >= _MIN_CORRELATION) & (self.worst_block <= _MAX_WORST_BLOCK)
        for correlation, agreement in (_MOST_BLOCKS, _MANY_BLOCKS):
            alike |= (self.correlation >= correlation) & (self.agreement >= agreement)
        return alike & (self.overlap >= _MIN_OVERLAP)

    @property
    def doubt(self) -> NDArray[np.float32]:
        """How near a pair is to not being the same, 0 to 1. (B,)"""
        doubt: NDArray[np.float32] = np.clip((1 - self.correlation) / (1 - _MIN_CORRELATION), 0, 1)
        return doubt


def warp_of(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the warps (B, 6) that take a whole image onto the part of another in `boxes` (B, 4): see `hashing.Box`.

    >>> warp_of(np.array([[0.0, 0.0, 0.8, 1.0]])).round(2).tolist()
    [[0.8, 0.0, -0.2, 0.0, 1.0, 0.0]]
    """
    left, top, right, bottom = boxes.T
    zero = np.zeros_like(left)
    return np.stack([right - left, zero, left + right - 1, zero, bottom - top, top + bottom - 1], axis=1)


def compare(left: Thumbnails, right: Thumbnails, start: NDArray[np.float32] | None = None) -> Similarity:
    """Align each of `left` (B, 64, 64) with its counterpart in `right` (B, 64, 64) by an affine warp; compare them.

    The point (x, y) of the second, each from -1 to 1, lies at (ax + by + c, dx + ey + f) of the first; the warp is
    a to f. The alignment runs Gauss-Newton from coarse to fine, from the warps `start` (B, 6), over warp, gain and
    offset (Lucas & Kanade 1981). Pairs that differ clearly at 16 x 16 pixels are not refined.
    """
    warp = np.tile(_IDENTITY, (len(left), 1)) if start is None else start.astype(np.float32)
    near = np.arange(len(left))
    for size, rounds, enough in _LEVELS:
        warp[near] = _align(left[near], right[near], warp[near], size, rounds)
        near = near[_correlation(left[near], right[near], warp[near], size) > enough]
        if not len(near):
            break
    nothing = np.zeros((4, len(left)), np.float32)
    similarity = Similarity(nothing[0], nothing[1], nothing[2], nothing[3], warp)
    if len(near):
        for name, values in vars(_score(left[near], right[near], warp[near])).items():
            getattr(similarity, name)[near] = values
    return similarity


def _correlation(left: Thumbnails, right: Thumbnails, warp: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the correlation of thumbnails shrunk to `size` pixels, where both show something. (B,)"""
    x, y = _warped(warp, size)
    inside = ((np.abs(x) < 1) & (np.abs(y) < 1)).astype(np.float32)
    p, q = _sample(shrink(left, size)[..., None], x, y)[..., 0], shrink(right, size).reshape(len(right), -1)
    area = inside.sum(axis=1, keepdims=True) + 1e-6
    p = (p - (p * inside).sum(axis=1, keepdims=True) / area) * inside
    q = (q - (q * inside).sum(axis=1, keepdims=True) / area) * inside
    correlation: NDArray[np.float32] = (p * q).sum(axis=1) / (np.sqrt((p * p).sum(axis=1) * (q * q).sum(axis=1)) + 1e-6)
    return correlation


def warped(image: NDArray[np.float32], warp: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return `image` (n, n) moved by one warp (6,), and which of its pixels lie inside of it. (n, n) each"""
    x, y = _warped(warp[None], len(image))
    inside = ((np.abs(x) < 1) & (np.abs(y) < 1)).reshape(image.shape)
    return _sample(image[None, ..., None], x, y).reshape(image.shape), inside


def _align(
    left: Thumbnails, right: Thumbnails, warp: NDArray[np.float32], size: int, rounds: int
) -> NDArray[np.float32]:
    """Improve `warp` (B, 6) in `rounds` Gauss-Newton steps on thumbnails shrunk to `size` pixels."""
    count = len(left)
    a, b = shrink(left, size), shrink(right, size).reshape(count, -1)
    gy, gx = np.gradient(a, axis=(1, 2))
    stack = np.stack([a, gx * (size / 2), gy * (size / 2)], axis=-1)
    u, v = _grid(size)
    for _ in range(rounds):
        x, y = _warped(warp, size)
        inside = ((np.abs(x) < 1) & (np.abs(y) < 1)).astype(np.float32)
        moved, dx, dy = np.moveaxis(_sample(stack, x, y), -1, 0)
        columns = [dx * u, dx * v, dx, dy * u, dy * v, dy, moved, np.ones_like(moved)]
        jacobian = np.stack(columns, axis=2)  # (B, pixels, 8)
        weighted = (jacobian * inside[..., None]).transpose(0, 2, 1)
        normal = (weighted @ jacobian).astype(np.float64) + 1e-2 * np.eye(8)
        # The last two unknowns are gain and offset. The others come out multiplied by the gain.
        solution = np.linalg.solve(normal, (weighted @ b[..., None]).astype(np.float64))[..., 0]
        gain = np.where(np.abs(solution[:, 6:7]) < 0.1, 1.0, solution[:, 6:7])
        warp = warp + np.clip(solution[:, :6] / gain, -0.1, 0.1).astype(np.float32)
        warp = np.clip(warp, _MIN_WARP, _MAX_WARP)
    return warp


def _warped(warp: NDArray[np.float32], size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return where the pixels of the second image lie in the first, (B, size * size) each."""
    u, v = _grid(size)
    x = warp[:, 0:1] * u + warp[:, 1:2] * v + warp[:, 2:3]
    y = warp[:, 3:4] * u + warp[:, 4:5] * v + warp[:, 5:6]
    return x, y


def _sample(images: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sample `images` (B, H, W, C) at points (B, P), each from -1 to 1, bilinearly: (B, P, C)."""
    count, size = images.shape[:2]
    column = np.clip((x + 1) * (size / 2) - 0.5, 0, size - 1.001)
    row = np.clip((y + 1) * (size / 2) - 0.5, 0, size - 1.001)
    left, top = column.astype(np.int32), row.astype(np.int32)
    across, down = (column - left)[..., None], (row - top)[..., None]
    flat = images.reshape(count * size * size, -1)
    corner = top * size + left + (np.arange(count, dtype=np.int32) * size * size)[:, None]
    upper = flat[corner] * (1 - across) + flat[corner + 1] * across
    lower = flat[corner + size] * (1 - across) + flat[corner + size + 1] * across
    sampled: NDArray[np.float32] = (upper * (1 - down) + lower * down).astype(np.float32)
    return sampled


def _grid(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the centres of `size` x `size` pixels, each from -1 to 1: x and y, (1, size * size) each."""
    centres = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return np.tile(centres, size)[None], np.repeat(centres, size)[None]


def shrink(images: Thumbnails, size: int) -> Thumbnails:
    """Return square images (B, n * size, n * size) as means of n x n pixels, (B, size, size)."""
    factor = images.shape[1] // size
    return images.reshape(len(images), size, factor, size, factor).mean(axis=(2, 4)) if factor > 1 else images


def _score(left: Thumbnails, right: Thumbnails, warp: NDArray[np.float32]) -> Similarity:
    x, y = _warped(warp, THUMBNAIL)
    moved = _sample(left[..., None], x, y).reshape(left.shape)
    edge = 1 - 1 / THUMBNAIL
    inside = ((np.abs(x) < edge) & (np.abs(y) < edge)).reshape(left.shape).astype(np.float32)
    # Compare smoothed images: resizing and re-encoding change the fine texture.
    weight = _smooth(inside) + 1e-6
    area = inside.sum(axis=(1, 2), keepdims=True) + 1e-6
    p, q = _smooth(moved * inside) / weight, _smooth(right * inside) / weight
    p = (p - (p * inside).sum(axis=(1, 2), keepdims=True) / area) * inside
    q = (q - (q * inside).sum(axis=(1, 2), keepdims=True) / area) * inside
    energy_p, energy_q = (p * p).sum(axis=(1, 2)), (q * q).sum(axis=(1, 2))
    product = (p * q).sum(axis=(1, 2))
    difference = np.abs(q - p * (product / (energy_p + 1e-6))[:, None, None])
    return Similarity(
        correlation=product / (np.sqrt(energy_p * energy_q) + 1e-6),
        worst_block=shrink(difference, 8).max(axis=(1, 2)),
        overlap=area[:, 0, 0] / THUMBNAIL**2,
        agreement=_agreement(p, q, inside),
        warp=warp,
    )


def _agreement(p: Thumbnails, q: Thumbnails, inside: Thumbnails) -> NDArray[np.float32]:
    """Return which share of the textured 8 x 8 blocks correlates. (B,)"""

    def blocks(images: Thumbnails) -> Thumbnails:
        count = len(images)
        return images.reshape(count, 8, 8, 8, 8).transpose(0, 1, 3, 2, 4).reshape(count, 64, 64)

    a, b, whole = blocks(p), blocks(q), blocks(inside).min(axis=2) > 0
    a, b = a - a.mean(axis=2, keepdims=True), b - b.mean(axis=2, keepdims=True)
    spread_a, spread_b = np.sqrt((a * a).mean(axis=2)), np.sqrt((b * b).mean(axis=2))
    correlation = (a * b).mean(axis=2) / (spread_a * spread_b + 1e-6)
    usable = whole & (np.maximum(spread_a, spread_b) > _TEXTURE)
    agreeing = ((correlation > _BLOCK_CORRELATION) & usable).sum(axis=1)
    share: NDArray[np.float32] = (agreeing / np.maximum(usable.sum(axis=1), 1)).astype(np.float32)
    return share


def _smooth(images: Thumbnails) -> Thumbnails:
    smoothed: Thumbnails = gaussian_filter(images, (0, 1, 1))
    return smoothed
