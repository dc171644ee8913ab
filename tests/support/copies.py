"""Altered copies of photograph-like pictures: the ground truth for the search for near-duplicates.

No photograph is used: a scene is fractal texture under uneven light, with textured things, blur and a camera's noise.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Alter = Callable[[Image.Image], Image.Image]

_FIELD = 640  # pixels per side of a field of noise
_SIZES = ((400, 300), (300, 400), (384, 256), (320, 320), (267, 400))
_LANCZOS, _BICUBIC = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC


@lru_cache
def _field(roughness: float) -> NDArray[np.float32]:
    """Fractal noise from -1 to 1. Each octave has 2 ** -roughness of the contrast of the one before."""
    random = np.random.default_rng(round(10 * roughness))
    total, cells, contrast = np.zeros((_FIELD, _FIELD), np.float32), 4, 1.0
    while cells < _FIELD:
        octave = Image.fromarray(random.standard_normal((cells, cells)).astype(np.float32))
        total += np.asarray(octave.resize((_FIELD, _FIELD), _BICUBIC)) * contrast
        cells, contrast = cells * 2, contrast * 2.0**-roughness
    field: NDArray[np.float32] = (total / np.abs(total).max()).astype(np.float32)
    return field


def photograph(seed: int) -> Image.Image:
    """Draw a scene: sky and ground, things with texture and shadow, light, blur, noise."""
    random = np.random.default_rng(seed)
    width, height = _SIZES[seed % len(_SIZES)]

    def surface(roughness: float, contrast: float) -> NDArray[np.float32]:
        x, y = random.integers(0, (_FIELD - width, _FIELD - height))
        part = _field(roughness)[y : y + height, x : x + width, None]
        tone = random.uniform(40, 200) * (1 + random.normal(0, 0.16, 3))
        return (tone * (1 + contrast * part)).astype(np.float32)

    def mask(draw_shape: Callable[[ImageDraw.ImageDraw], None], blur: float) -> NDArray[np.float32]:
        layer = Image.new("L", (width, height))
        draw_shape(ImageDraw.Draw(layer))
        return (np.asarray(layer.filter(ImageFilter.GaussianBlur(blur)), np.float32)[..., None] / 255).astype(
            np.float32
        )

    horizon = random.uniform(0.2, 0.6) * height
    ground = mask(lambda pen: pen.rectangle((0, horizon, width, height), 255), 2)
    pixels = surface(0.9, 0.3) * (1 - ground) + surface(0.3, 0.9) * ground
    for _ in range(int(random.integers(5, 11))):
        x, y = random.uniform(0, width), random.uniform(0.2, 1) * height
        across, down = random.uniform(0.05, 0.25, 2) * min(width, height)
        shadow = mask(partial(_ellipse, (x + 9, y + 9, across, down)), 7)
        thing = mask(partial(_ellipse, (x, y, across, down)), 0.8)
        pixels = pixels * (1 - 0.6 * shadow) * (1 - thing) + surface(random.choice((0.0, 0.3, 0.6)), 0.7) * thing
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.5))
    noisy = np.asarray(image, np.float32) + random.normal(0, 2.5, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _ellipse(place: tuple[float, float, float, float], pen: ImageDraw.ImageDraw) -> None:
    x, y, across, down = place
    pen.ellipse((x - across, y - down, x + across, y + down), fill=255)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut so much off each side, as shares of width and height."""
    width, height = image.size
    return image.crop((int(left * width), int(top * height), width - int(right * width), height - int(bottom * height)))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), _LANCZOS)


def _captioned(image: Image.Image) -> Image.Image:
    bar = image.height // 10
    taller = Image.new("RGB", (image.width, image.height + bar), "black")
    taller.paste(image)
    pen = ImageDraw.Draw(taller)
    pen.text((4, image.height + 2), "agency.example - AB12", fill="white", font=ImageFont.load_default(bar * 2 // 3))
    return taller


def _watermarked(image: Image.Image) -> Image.Image:
    layer = Image.new("RGBA", image.size)
    font = ImageFont.load_default(image.width // 9)
    middle = (image.width / 2, image.height / 2)
    ImageDraw.Draw(layer).text(middle, "example stock", (255, 255, 255, 150), font, "mm")
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def _signed(image: Image.Image) -> Image.Image:
    image = image.copy()
    font = ImageFont.load_default(image.width // 20)
    corner = (image.width - 4, image.height - 4)
    ImageDraw.Draw(image).text(corner, "(c) somebody 2012", "white", font, "rs")
    return image


@dataclass(frozen=True)
class Kind:
    """One way to alter a copy, the share of copies that must be found, and whether its pixels are plainly worse."""

    alter: Alter
    recall: float = 0.95
    worse: bool = True
    quality: int = 88  # of the copy's JPEG


KINDS: dict[str, Kind] = {
    "resized to 50 %": Kind(lambda image: _scaled(image, 0.5)),
    "enlarged to 150 %": Kind(lambda image: _scaled(image, 1.5)),
    "JPEG quality 30": Kind(lambda image: image, worse=False, quality=30),
    "grey": Kind(lambda image: image.convert("L").convert("RGB"), worse=False),
    "crop 5 % a side": Kind(lambda image: cropped(image, 0.05, 0.05, 0.05, 0.05)),
    "crop 10 % a side": Kind(lambda image: cropped(image, 0.1, 0.1, 0.1, 0.1)),
    "crop 15 % a side": Kind(lambda image: cropped(image, 0.15, 0.15, 0.15, 0.15)),
    "crop 10 % off one side": Kind(lambda image: cropped(image, 0.1, 0, 0, 0)),
    "crop 20 % off one side": Kind(lambda image: cropped(image, 0, 0, 0, 0.2)),
    "white border 5 %": Kind(lambda image: ImageOps.expand(image, min(image.size) // 20, "white")),
    "black border 10 %": Kind(lambda image: ImageOps.expand(image, min(image.size) // 10, "black")),
    "letterbox to a square": Kind(lambda image: ImageOps.pad(image, (max(image.size),) * 2, _LANCZOS, "black")),
    "caption bar 10 %": Kind(_captioned),
    "watermark across": Kind(_watermarked, 0.85, quality=96),
    "watermark in a corner": Kind(_signed, 0.85, quality=96),
    "brightness x 1.3": Kind(lambda image: ImageEnhance.Brightness(image).enhance(1.3), 0.85, worse=False),
    "contrast x 1.5": Kind(lambda image: ImageEnhance.Contrast(image).enhance(1.5), 0.85, worse=False),
    "mirrored": Kind(ImageOps.mirror, worse=False),
    "mirrored, crop 5 %": Kind(lambda image: cropped(ImageOps.mirror(image), 0.05, 0.05, 0.05, 0.05)),
    "rotated by 2 degrees": Kind(lambda image: image.rotate(2, _BICUBIC), 0.6, worse=False),
    "rotated by 2 degrees, cropped": Kind(
        lambda image: cropped(image.rotate(2, _BICUBIC), 0.045, 0.045, 0.045, 0.045), 0.6
    ),
}


@dataclass(frozen=True)
class Found:
    """What cleaning found of the copies of one kind."""

    planted: int
    recall: float
    originals_lost: int  # of which the copy was kept


def plant_copies(folder: Path, count: int) -> dict[str, list[tuple[str, str]]]:
    """Write `count` pictures of each kind with a copy each into `folder`; return (original, copy) file names.

    Each kind has pictures of its own, so that one run also measures whether different pictures are taken for copies.
    Names do not give away the copy.
    """
    folder.mkdir(parents=True)
    planted: dict[str, list[tuple[str, str]]] = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        planted[name] = []
        for index in range(count):
            seed = 1000 * number + index
            first, second = (f"{value:08x}.jpg" for value in np.random.default_rng(10**6 + seed).integers(0, 2**32, 2))
            photograph(seed).save(folder / first, quality=92)
            with Image.open(folder / first) as image:
                kind.alter(image.convert("RGB")).save(folder / second, quality=kind.quality)
            planted[name].append((first, second))
    return planted


def score_copies(
    planted: dict[str, list[tuple[str, str]]], taken: Iterable[tuple[str, str]]
) -> tuple[dict[str, Found], float]:
    """Return what was found of each kind, and the precision. `taken` pairs (file thrown out, its better version)."""
    gone = dict(taken)
    found = {}
    correct = 0
    for name, pairs in planted.items():
        lost = sum(gone.get(original) == copy for original, copy in pairs)
        hits = lost + sum(gone.get(copy) == original for original, copy in pairs)
        correct += hits
        found[name] = Found(len(pairs), hits / len(pairs), lost)
    return found, correct / max(len(gone), 1)
