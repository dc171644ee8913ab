"""Pictures to clean: other ones for other seeds, with soft ground, shapes and texture as photographs have them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("cat", "owl")


def draw(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    random = np.random.default_rng(seed)
    ground = Image.fromarray(random.integers(40, 216, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(ground)
    for _ in range(8):
        x, y = random.uniform(0, size[0]), random.uniform(0, size[1])
        a, b = random.uniform(0.05, 0.25, 2) * size
        pen.ellipse((x - a, y - b, x + a, y + b), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    soft = np.asarray(ground.filter(ImageFilter.GaussianBlur(0.7)), np.float32)
    return Image.fromarray((soft + random.normal(0, 4, soft.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return draw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two class folders with six good images each."""
    folder = tmp_path / "raw"
    for index, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            draw(100 * index + number).save(folder / name / f"{number}.jpg", quality=92)
    return folder
