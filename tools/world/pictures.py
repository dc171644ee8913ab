"""The training pictures of the bundled models: rendered once on all cores, and cached as memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from world.figures import LOOKS
from world.scenes import Style, render
from world.things import render_thing

ANIMALS = tuple(LOOKS)
STYLES: tuple[Style, ...] = ("drawing", "photo")
SIZE = 64
THINGS = ("landscape", "house", "car", "page of text")  # not animals
# The first seed of each use. They are far apart, so that no picture has two uses.
TRAINING_SEEDS, JUDGE_SEEDS, FRESH_SEEDS, SAMPLE_SEEDS = 1_000_000, 20_000_000, 50_000_000, 90_000_000
EXAMPLE_SEEDS = 95_000_000


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures (N, H, W, 3) as uint8, and the index of each one's animal (N,) and style (N,)."""

    pixels: NDArray[np.uint8]
    animals: NDArray[np.int64]
    styles: NDArray[np.int64]

    def batch(self, indices: NDArray[np.int64], flips: NDArray[np.bool_] | None = None) -> torch.Tensor:
        """Return pixels from -1 to 1, (B, 3, H, W), mirrored where `flips` (B,) is true."""
        pixels = self.pixels[indices]
        if flips is not None:
            pixels = np.where(flips[:, None, None, None], pixels[:, :, ::-1], pixels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def rendered(folder: Path, per_style: int, first_seed: int = TRAINING_SEEDS, at_home: float = 0.8) -> Pictures:
    """Return `per_style` pictures of each style, all animals equally often; `folder` caches them."""
    index = np.arange(per_style * len(STYLES))
    animals, styles = index % len(ANIMALS), index // per_style
    jobs = [
        (ANIMALS[a], STYLES[s], first_seed + int(i), SIZE, at_home)
        for i, a, s in zip(index, animals, styles, strict=True)
    ]
    pixels = _cached(folder / f"pictures-{first_seed}-{per_style}.npy", render, jobs)
    return Pictures(pixels, animals, styles)


def rendered_things(folder: Path, count: int) -> Pictures:
    """Return `count` pictures without an animal; `animals` holds the index of the thing, and `folder` caches them."""
    kinds = np.arange(count) % len(THINGS)
    jobs = [(THINGS[kind], TRAINING_SEEDS + i) for i, kind in enumerate(kinds)]
    return Pictures(_cached(folder / f"things-{count}.npy", render_thing, jobs), kinds, np.ones_like(kinds))


def _cached(path: Path, draw: Callable[..., Image.Image], jobs: Sequence[tuple[object, ...]]) -> NDArray[np.uint8]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.empty((len(jobs), SIZE, SIZE, 3), np.uint8)
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(draw, *zip(*jobs, strict=True), chunksize=64)
            for i, picture in enumerate(tqdm(drawn, total=len(jobs), desc="render pictures", unit="picture")):
                pixels[i] = np.asarray(picture)
        part = path.with_suffix(".part.npy")
        np.save(part, pixels)
        part.replace(path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]
