from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from support.settings import encode_settings
from support.tiny import CLASSES, build_base, manifests

from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import Latents


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def v_prediction_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("v-base"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean folder and its manifests: three classes with 5 training and 2 validation pictures, some oblong."""
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
def latents_folder(base: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    encode_images(base, pictures, manifests(pictures), folder, encode_settings())
    return folder


@pytest.fixture
def latents(latents_folder: Path) -> Latents:
    return Latents.open(latents_folder)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU: the base in bfloat16, without autocast."""
    monkeypatch.setattr("bestiary.diffusion.training.device_and_dtype", lambda: (torch.device("cpu"), torch.bfloat16))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
