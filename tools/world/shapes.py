"""Outlines in the animal's own units, and the canvas that fills them.

An animal fits a square from about -1 to 1, with x to the right and y downwards. It looks right or at the viewer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

Points = NDArray[np.float64]  # (N, 2)
Colour = tuple[int, int, int]


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0, corners: int = 36) -> Points:
    """Return the outline of an ellipse, turned by `angle` radians, (corners, 2)."""
    t = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    u, v = rx * np.cos(t), ry * np.sin(t)
    return np.stack([x + np.cos(angle) * u - np.sin(angle) * v, y + np.sin(angle) * u + np.cos(angle) * v], axis=1)


def stroke(points: Sequence[Sequence[float]] | Points, start: float, end: float | None = None) -> Points:
    """Return the outline of a line through `points` whose width changes from `start` to `end`."""
    line = np.asarray(points, dtype=float)
    tangent = np.gradient(line, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    half = np.linspace(start, start if end is None else end, len(line))[:, None] / 2
    return np.concatenate([line + normal * half, (line - normal * half)[::-1]])


def bow(a: Sequence[float], b: Sequence[float], bend: float, corners: int = 12) -> Points:
    """Return points of an arc from `a` to `b` whose middle is `bend` away from the straight line."""
    t = np.linspace(0, 1, corners)[:, None]
    first, last = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    direction = last - first
    side = np.array([-direction[1], direction[0]])
    side /= np.linalg.norm(side) + 1e-9
    arc: Points = first + t * direction + np.sin(np.pi * t) * bend * side
    return arc


def burst(x: float, y: float, inner: float, outer: float, rays: int) -> Points:
    """Return the outline of a ragged disc, such as a mane."""
    t = np.linspace(0, 2 * np.pi, rays * 2, endpoint=False)
    radius = np.where(np.arange(rays * 2) % 2 == 0, outer, inner)
    return np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], axis=1)


class Canvas:
    """A picture that is being drawn, `supersampling` times larger than needed so that its edges become smooth."""

    def __init__(self, size: int, supersampling: int, x: float, y: float, scale: float, turn: float, mirrored: bool):
        self.size, self.centre, self.scale = size, (x, y), scale  # in pixels, and in shares of the picture
        self.side = size * supersampling
        self.image = Image.new("RGB", (self.side, self.side))
        self.silhouette = Image.new("L", (self.side, self.side), 0)
        self.skin = Image.new("L", (self.side, self.side), 0)  # where a pattern may be drawn
        self._turn = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        self._mirror = np.array([-1.0 if mirrored else 1.0, 1.0])
        self._offset = np.array([x, y]) * self.side
        self._scale = scale * self.side

    def _place(self, outline: Points) -> list[tuple[float, float]]:
        placed = (outline * self._mirror) @ self._turn.T * self._scale + self._offset
        return [(float(x), float(y)) for x, y in placed]

    def fill(self, outline: Points | Sequence[Sequence[float]], colour: Colour, skin: bool = False) -> None:
        """Fill one outline; a pattern that is drawn later may cover it if it is `skin`."""
        points = self._place(np.asarray(outline, dtype=float))
        ImageDraw.Draw(self.image).polygon(points, fill=colour)
        ImageDraw.Draw(self.silhouette).polygon(points, fill=255)
        ImageDraw.Draw(self.skin).polygon(points, fill=255 if skin else 0)

    def pattern(self, outlines: Iterable[Points], colour: Colour) -> None:
        """Fill the outlines, but only where there is skin."""
        mask = Image.new("L", (self.side, self.side), 0)
        draw = ImageDraw.Draw(mask)
        for outline in outlines:
            draw.polygon(self._place(outline), fill=255)
        self.image.paste(colour, (0, 0), ImageChops.multiply(mask, self.skin))
