from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny import CLASSES, build_base, manifests

from bestiary.diffusion.latents import LatentCache, encode_images


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def v_prediction_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("v-base"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean folder with its manifests: three classes, 5 pictures each to train and 2 to validate, oblong ones too."""
    folder = tmp_path_factory.mktemp("clean")
    random = np.random.default_rng(0)
    rows: dict[str, list[dict[str, object]]] = {"train": [], "val": []}
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(7):
            path = f"{name}/{number}.png"
            pixels = random.integers(0, 255, (6, 8 if number % 2 else 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64 if number % 2 else 48, 48)).save(folder / path)
            split = "train" if number < 5 else "val"
            width = 64 if number % 2 else 48
            rows[split].append({"path": path, "class": name, "sha256": f"{name}{number}", "width": width, "height": 48})
    for split, table in rows.items():
        pd.DataFrame(table).to_csv(folder / f"{split}.csv", index=False)
    return folder


@pytest.fixture(scope="session")
def latents(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode_images(base, pictures, manifests(pictures), folder, resolution=32, flip=True, batch_size=4)
    return folder


@pytest.fixture
def caches(latents: Path) -> tuple[LatentCache, LatentCache]:
    return LatentCache.open(latents, "train"), LatentCache.open(latents, "val")
