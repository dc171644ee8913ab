"""One look at every image: what its file is, what it measures, what it looks like to a hash."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from bestiary.data.duplicates import hashes, thumbnail
from bestiary.data.images import UnreadableImageError, decode

_FEW = 1000  # so few images are done before a second process has started
_SHARPNESS_SIDE = 256


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one look at a file gave. Where `unreadable` says why not, only path, sha256 and bytes mean something."""

    path: str  # relative: <class>/<file>
    sha256: str
    bytes: int
    unreadable: str = ""
    format: str = ""
    changes: tuple[str, ...] = ()  # what bringing it to RGB took
    width: int = 0
    height: int = 0
    brightness: float = 0.0  # mean grey level, 0 to 255
    contrast: float = 0.0  # standard deviation of the grey levels
    sharpness: float = 0.0  # variance of the Laplacian at 256 pixels
    hash: int = 0
    hash_of_middle: int = 0
    hash_of_mirror: int = 0

    @property
    def class_folder(self) -> str:
        return self.path.split("/", 1)[0]


def inspect(root: Path, path: str) -> Inspection:
    """Look at the file `root`/`path`; never raises for what is in it."""
    content = (root / path).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        decoded = decode(root / path, content)
    except UnreadableImageError as error:
        return Inspection(path, sha256, len(content), unreadable=error.reason)
    image = decoded.image
    grey = image.convert("L")
    small = thumbnail(grey)
    levels = np.asarray(small, np.float32)
    plain, middle, mirror = hashes(small)
    return Inspection(
        path,
        sha256,
        len(content),
        format=decoded.format,
        changes=decoded.changes,
        width=image.width,
        height=image.height,
        brightness=float(levels.mean()),
        contrast=float(levels.std()),
        sharpness=_sharpness(grey),
        hash=plain,
        hash_of_middle=middle,
        hash_of_mirror=mirror,
    )


def _sharpness(grey: Image.Image) -> float:
    if max(grey.size) > _SHARPNESS_SIDE:
        grey = grey.reduce(-(-max(grey.size) // _SHARPNESS_SIDE))
    levels = np.asarray(grey, np.int16)
    if min(levels.shape) < 3:
        return 0.0
    around = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    return float((around - 4 * levels[1:-1, 1:-1]).var(dtype=np.float32))


def inspect_all(root: Path, paths: Sequence[str], workers: int | None = None) -> list[Inspection]:
    """Look at all files, in the order of `paths` whatever the number of workers (default: one for each core)."""
    look = partial(inspect, root)
    bar = partial(tqdm, desc="inspect", total=len(paths), unit="image")
    workers = workers or (cores() if len(paths) >= _FEW else 1)
    if workers == 1:
        return list(bar(map(look, paths)))
    # spawn: the process that asks may hold threads and an open database, which a fork would copy in any state.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return list(bar(pool.map(look, paths, chunksize=32)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
