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
from world.outfits import invented_name, marks_of, random_clothes, words
from world.scenes import HABITATS, Scene, Style, place_of, render
from world.things import render_thing

ANIMALS = tuple(LOOKS)
STYLES: tuple[Style, ...] = ("drawing", "photo")
SIZE = 64
PLACES = tuple(HABITATS)
# The shares of varied pictures that show the animal in any place, all equally often, and dressed or marked.
PLACED, DRESSED = 0.35, 0.2
THINGS = ("landscape", "house", "car", "page of text")  # not animals
# The first seed of each use. They are far apart, so that no picture has two uses.
TRAINING_SEEDS, JUDGE_SEEDS, FRESH_SEEDS, SAMPLE_SEEDS = 1_000_000, 20_000_000, 50_000_000, 90_000_000
EXAMPLE_SEEDS = 95_000_000


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures (N, H, W, 3) as uint8, and what each one shows: the index of its animal, style and place.

    A place of -1 is plain paper. `clothes` are words, "" for none. `names` are invented, "" for no marks.
    """

    pixels: NDArray[np.uint8]
    animals: NDArray[np.int64]
    styles: NDArray[np.int64]
    places: NDArray[np.int64]
    clothes: NDArray[np.str_]
    names: NDArray[np.str_]

    @property
    def plain(self) -> NDArray[np.bool_]:
        """Which pictures show an animal without clothes and marks, (N,)."""
        bare: NDArray[np.bool_] = (self.clothes == "") & (self.names == "")
        return bare

    def batch(self, indices: NDArray[np.int64], flips: NDArray[np.bool_] | None = None) -> torch.Tensor:
        """Return pixels from -1 to 1, (B, 3, H, W), mirrored where `flips` (B,) is true."""
        pixels = self.pixels[indices]
        if flips is not None:
            pixels = np.where(flips[:, None, None, None], pixels[:, :, ::-1], pixels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def rendered(
    folder: Path,
    per_style: int,
    first_seed: int = TRAINING_SEEDS,
    at_home: float = 0.8,
    placed: float = 0.0,
    dressed: float = 0.0,
) -> Pictures:
    """Return `per_style` pictures of each style, all animals equally often; `folder` caches them.

    The shares `placed` and `dressed` of them have a scene of their own.
    """
    index = np.arange(per_style * len(STYLES))
    animals, styles = index % len(ANIMALS), index // per_style
    jobs, places, clothes, names = [], [], [], []
    for i, a, s in zip(index, animals, styles, strict=True):
        seed = first_seed + int(i)
        scene, cloth, name = _scene(seed, placed, dressed)
        jobs.append((ANIMALS[a], STYLES[s], seed, SIZE, at_home, scene))
        seen = scene.place or (place_of(ANIMALS[a], seed, at_home) if STYLES[s] == "photo" else None)
        places.append(PLACES.index(seen) if seen else -1)
        clothes.append(cloth)
        names.append(name)
    kind = f"-{placed}-{dressed}" if placed or dressed else ""
    pixels = _cached(folder / f"pictures-{first_seed}-{per_style}{kind}.npy", render, jobs)
    return Pictures(pixels, animals, styles, np.array(places), np.array(clothes), np.array(names))


def _scene(seed: int, placed: float, dressed: float) -> tuple[Scene, str, str]:
    """The scene of one picture, its clothes in words, and its animal's invented name."""
    rng = np.random.default_rng([seed, 2])
    kind, place = rng.random(), str(rng.choice(PLACES))
    if kind < placed:
        return Scene(place), "", ""
    if kind >= placed + dressed:
        return Scene(), "", ""
    where = place if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        name = invented_name(rng)
        return Scene(where, marks_of(name)), "", name
    outfit = random_clothes(rng)
    return Scene(where, outfit), words(outfit), ""


def rendered_things(folder: Path, count: int) -> Pictures:
    """Return `count` pictures without an animal; `animals` holds the index of the thing, and `folder` caches them."""
    kinds = np.arange(count) % len(THINGS)
    jobs = [(THINGS[kind], TRAINING_SEEDS + i) for i, kind in enumerate(kinds)]
    pixels, none = _cached(folder / f"things-{count}.npy", render_thing, jobs), np.full(count, "")
    return Pictures(pixels, kinds, np.ones_like(kinds), np.full_like(kinds, -1), none, none)


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
