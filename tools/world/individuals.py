"""Drawn individuals of one class: penguins that differ in what they wear. They are the subjects of examples/."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from world.figures import LOOKS, WHITE, draw
from world.scenes import compose
from world.shapes import Canvas, Colour, bow, stroke


@dataclass(frozen=True)
class Clothes:
    """The colours of a scarf and of a hat; None: without it. The bundled VAE keeps orange, yellow, blue and white."""

    scarf: Colour | None = None
    hat: Colour | None = None


PIP = Clothes(scarf=(252, 132, 24), hat=(250, 206, 40))
# Other penguins: some plain, some dressed in another way.
OTHERS = (
    Clothes(),
    Clothes(hat=(40, 150, 80)),
    Clothes(scarf=(36, 84, 206)),
    Clothes(scarf=(240, 240, 236), hat=(36, 84, 206)),
)


def penguin(clothes: Clothes, place: str, seed: int, size: int) -> Image.Image:
    """One RGB picture in the photo style, `size` x `size` pixels. Never mirrored: clothes have a left and a right."""
    rng = np.random.default_rng(seed)
    tint = rng.uniform(-10, 10, 3)

    def paint(colour: Colour) -> Colour:
        red, green, blue = (int(c) for c in (np.asarray(colour, dtype=float) + tint).clip(0, 255))
        return red, green, blue

    scale = 0.45 * 0.92 * rng.uniform(0.86, 1.04)
    x, y = 0.5 + rng.uniform(-0.08, 0.08), 0.5 + rng.uniform(-0.03, 0.05)
    canvas = Canvas(size, 4 if size <= 96 else 3, x, y, scale, rng.uniform(-0.12, 0.12), False)
    draw(canvas, LOOKS["penguin"], paint, rng, detailed=True)
    if clothes.scarf:
        end = rng.uniform(-0.08, 0.10)
        canvas.fill(stroke(bow((-0.40, -0.10), (0.40, -0.10), -0.08), 0.17), paint(clothes.scarf))
        canvas.fill(stroke([(0.18, -0.04), (0.24 + end, 0.44)], 0.17, 0.20), paint(clothes.scarf))
    if clothes.hat:
        tip = 0.10 + rng.uniform(-0.1, 0.1)
        canvas.fill(np.array([(-0.33, -0.62), (0.33, -0.62), (tip, -1.06)]), paint(clothes.hat))
        canvas.fill(stroke([(-0.35, -0.62), (0.35, -0.62)], 0.12), paint(WHITE))
    return compose(canvas, place, rng)
