"""Images to clean: one per seed, with the soft background, shapes and texture of a photograph."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("cat", "owl")


def draw(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Draw the picture of a seed, (width, height) pixels."""
    random = np.random.default_rng(seed)
    background = Image.fromarray(random.integers(40, 216, (6, 8, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(background)
    for _ in range(8):
        x, y = random.uniform(0, size[0]), random.uniform(0, size[1])
        a, b = random.uniform(0.05, 0.25, 2) * size
        pen.ellipse((x - a, y - b, x + a, y + b), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    soft = np.asarray(background.filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    return Image.fromarray((soft + random.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return draw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of two class folders with six good images each."""
    folder = tmp_path / "raw"
    for index, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            draw(100 * index + number).save(folder / name / f"{number}.jpg", quality=92)
    return folder
