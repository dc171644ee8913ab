"""Pictures without an animal: the judge must tell them from animals, and web data sets contain some by mistake."""

from __future__ import annotations

import numpy as np
from PIL import Image

from world.scenes import HABITATS, backdrop
from world.shapes import Canvas, ellipse, stroke


def render_thing(kind: str, seed: int, size: int = 64) -> Image.Image:
    """Draw a landscape, a house, a car or a page of text: RGB, `size` x `size` pixels."""
    rng = np.random.default_rng(seed)
    if kind == "page of text":
        return _page(size, rng)
    place = str(rng.choice([name for name, (_, _, grounded) in HABITATS.items() if grounded]))
    ground = Image.fromarray(backdrop(place, size, rng).clip(0, 255).astype(np.uint8))
    if kind == "landscape":
        return ground
    scale, x, y = 0.45 * rng.uniform(0.75, 1.0), 0.5 + rng.uniform(-0.06, 0.06), 0.55 + rng.uniform(-0.05, 0.05)
    canvas = Canvas(size, 4, x, y, scale, 0.0, bool(rng.random() < 0.5))
    red, green, blue = (int(c) for c in rng.integers(60, 230, 3))
    wall, dark = (red, green, blue), (red // 2, green // 2, blue // 2)
    if kind == "house":
        canvas.fill([(-0.7, -0.1), (0.7, -0.1), (0.7, 0.8), (-0.7, 0.8)], wall)
        canvas.fill([(-0.9, -0.1), (0.0, -0.8), (0.9, -0.1)], dark)
        canvas.fill([(-0.15, 0.3), (0.15, 0.3), (0.15, 0.8), (-0.15, 0.8)], dark)
        for side in (-1, 1):
            left = side * 0.42 - 0.13
            canvas.fill([(left, 0.1), (left + 0.26, 0.1), (left + 0.26, 0.36), (left, 0.36)], (190, 225, 245))
    else:
        canvas.fill(
            [(-0.9, 0.1), (-0.6, 0.1), (-0.35, -0.3), (0.35, -0.3), (0.6, 0.1), (0.9, 0.15), (0.9, 0.5), (-0.9, 0.5)],
            wall,
        )
        canvas.fill([(-0.48, 0.08), (-0.28, -0.2), (0.28, -0.2), (0.46, 0.08)], (190, 225, 245))
        canvas.fill(stroke([(0.0, -0.22), (0.0, 0.1)], 0.06), wall)
        for wheel in (-0.5, 0.5):
            canvas.fill(ellipse(wheel, 0.5, 0.2, 0.2), (30, 30, 34))
            canvas.fill(ellipse(wheel, 0.5, 0.09, 0.09), (190, 190, 196))
    ground.paste(
        canvas.image.resize((size, size), Image.Resampling.BOX),
        mask=canvas.silhouette.resize((size, size), Image.Resampling.BOX).point(
            lambda cover: 255 if cover > 127 else 0
        ),
    )
    return ground


def _page(size: int, rng: np.random.Generator) -> Image.Image:
    page = np.full((size, size, 3), rng.integers(225, 256), np.uint8)
    line = max(4, size // 12)
    for top in range(line, size - line, line):
        column = size // 10
        while column < size * 0.9:
            word = int(rng.integers(size // 16 + 1, size // 5))
            page[top : top + line // 2, column : min(column + word, int(size * 0.9))] = rng.integers(20, 90)
            column += word + max(2, size // 24)
    return Image.fromarray(page)
