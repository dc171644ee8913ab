"""Pictures of the drawn animals: a habitat, a style, light. The same seed gives the same picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from world.figures import LOOKS, Look, draw
from world.outfits import Outfit, dress
from world.shapes import Canvas, Colour

Style = Literal["drawing", "photo"]
Pixels = NDArray[np.floating[Any]]  # (H, W, 3), 0 to 255

# The colours above and below, and whether there is ground to stand on.
HABITATS: dict[str, tuple[Colour, Colour, bool]] = {
    "grass": ((132, 196, 240), (92, 168, 62), True),
    "savanna": ((250, 206, 140), (206, 170, 84), True),
    "forest": ((60, 120, 84), (66, 92, 44), True),
    "snow": ((150, 196, 232), (236, 242, 250), True),
    "night": ((24, 30, 74), (58, 62, 92), False),
    "lake": ((150, 206, 236), (64, 140, 176), True),
    "sea": ((44, 148, 206), (10, 62, 122), False),
    "sand": ((96, 186, 220), (236, 208, 146), True),
    "flowers": ((176, 214, 150), (112, 166, 84), False),
    "sky": ((72, 152, 232), (190, 222, 246), False),
    "leaf": ((130, 186, 70), (66, 134, 46), False),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows besides the animal: a place that is drawn in both styles, and what the animal wears.

    Without a place, a photo shows the animal's habitat or a random one, and a drawing has plain paper.
    """

    place: str | None = None
    outfit: Outfit = ()


def place_of(animal: str, seed: int, at_home: float = 0.8) -> str:
    """The place that `render` draws behind a photo whose scene names none."""
    return _place(LOOKS[animal], np.random.default_rng(seed), at_home)


def _place(look: Look, rng: np.random.Generator, at_home: float) -> str:
    return look.habitat if rng.random() < at_home else str(rng.choice(sorted(HABITATS)))


def render(
    animal: str, style: Style, seed: int, size: int = 64, at_home: float = 0.8, scene: Scene = Scene()
) -> Image.Image:
    """Draw one RGB picture of `animal` (a class folder's name), `size` x `size` pixels. `seed` decides everything else.

    `at_home` is the share of pictures that show the animal in its habitat. The others show it in a random habitat.
    """
    look = LOOKS[animal]
    rng = np.random.default_rng(seed)
    place = scene.place or _place(look, rng, at_home)
    tint = rng.uniform(-10, 10, 3)

    def paint(colour: Colour) -> Colour:
        value = np.asarray(colour, dtype=float) + tint
        if style == "drawing":  # pastel: about half way to white
            value = value * 0.55 + 255 * 0.45
        red, green, blue = (int(c) for c in value.clip(0, 255))
        return red, green, blue

    scale = 0.45 * look.size * rng.uniform(0.88, 1.04)
    x, y = 0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.03, 0.04)
    canvas = Canvas(size, 4 if size <= 96 else 3, x, y, scale, rng.uniform(-0.08, 0.08), rng.random() < 0.5)
    draw(canvas, look, paint, rng, detailed=style == "photo")
    dress(canvas, animal, scene.outfit, paint, np.random.default_rng([seed, 1]))
    if style == "drawing":
        figure, _, cover = _cut_out(canvas)
        if scene.place:
            return _to_image(_over(figure, cover, sketched(place, size, rng)))
        paper = np.asarray(HABITATS[place][0], dtype=np.float32) * 0.25 + 255 * 0.75 + rng.uniform(-6, 6)
        return _to_image(_over(figure, cover, np.broadcast_to(paper.astype(np.float32), figure.shape)))
    return compose(canvas, place, rng)


def compose(canvas: Canvas, place: str, rng: np.random.Generator) -> Image.Image:
    """Put the figure on `canvas` into a place, in the photo style."""
    figure, silhouette, cover = _cut_out(canvas)
    size, (x, y), scale = canvas.size, canvas.centre, canvas.scale
    ground = backdrop(place, size, rng)
    if HABITATS[place][2]:
        ground = ground * (1 - 0.45 * _shadow(size, x, y + scale * 0.86, scale))
    return _to_image(_over(_lit(figure, silhouette, size), cover, ground) + rng.normal(0, 1.5, (size, size, 1)))


def _cut_out(canvas: Canvas) -> tuple[Pixels, Image.Image, Pixels]:
    """The figure (H, W, 3), its silhouette, and how much of each pixel it covers (H, W, 1), at the picture's size."""
    size = (canvas.size, canvas.size)
    figure = np.asarray(canvas.image.resize(size, Image.Resampling.BOX), dtype=np.float32)
    silhouette = canvas.silhouette.resize(size, Image.Resampling.BOX)
    return figure, silhouette, np.asarray(silhouette, dtype=np.float32)[..., None] / 255


def _over(figure: Pixels, cover: Pixels, ground: Pixels) -> Pixels:
    # The canvas is black outside the animal, so its edge pixels are already weighted by their cover.
    return figure * np.where(cover > 0, 1.0, 0.0) + ground * (1 - cover)


def backdrop(place: str, size: int, rng: np.random.Generator) -> Pixels:
    """Draw an empty scene in the photo style, (size, size, 3)."""
    above, below, grounded = HABITATS[place]
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]  # (H, 1, 1)
    horizon = rng.uniform(0.52, 0.68)
    edge = 1 / (1 + np.exp(-(down - horizon) * 60)) if grounded else down
    picture = np.asarray(above, np.float32) * (1 - edge) + np.asarray(below, np.float32) * edge
    picture = picture * (1.08 - 0.16 * down) * np.ones((size, size, 1), np.float32)
    clouds, texture = _blotches(5, size, rng), _blotches(14, size, rng)
    scene: Pixels = picture + 26 * clouds + 14 * texture * (edge if grounded else 0.6)
    return scene


def sketched(place: str, size: int, rng: np.random.Generator) -> Pixels:
    """Draw an empty scene in the drawing style, two pale flat colours, (size, size, 3)."""
    above, below, grounded = HABITATS[place]
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]  # (H, 1, 1)
    horizon = rng.uniform(0.52, 0.68)
    edge = 1 / (1 + np.exp(-(down - horizon) * 60)) if grounded else down
    picture = np.asarray(above, np.float32) * (1 - edge) + np.asarray(below, np.float32) * edge
    scene: Pixels = picture * 0.6 * np.ones((size, size, 1), np.float32) + 255 * 0.4 + rng.uniform(-6, 6)
    return scene


def _blotches(cells: int, size: int, rng: np.random.Generator) -> Pixels:
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC), np.float32)[..., None] / 127.5 - 1


def _shadow(size: int, x: float, y: float, scale: float) -> Pixels:
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    distance = ((columns - x) / (scale * 0.95)) ** 2 + ((rows - y) / (scale * 0.16)) ** 2
    shadow: Pixels = np.clip(1.4 - distance, 0, 1)[..., None].astype(np.float32)
    return shadow


def _lit(figure: Pixels, silhouette: Image.Image, size: int) -> Pixels:
    """Light the figure from above: the slope of the blurred silhouette stands in for a round body."""
    height = np.asarray(silhouette.filter(ImageFilter.GaussianBlur(size * 0.06)), np.float32) / 255
    slope_y, slope_x = np.gradient(height, axis=0), np.gradient(height, axis=1)
    light: Pixels = (slope_y + 0.4 * slope_x) * size * 0.05
    lit: Pixels = figure * (1 + np.clip(light, -0.28, 0.28))[..., None]
    return lit


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
