"""Reading every image once: what its file is, its measurements, and its perceptual hashes."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from bestiary.data.hashing import Hashes, content_box, hashes, small_grey, thumbnail
from bestiary.data.images import decode
from bestiary.data.listing import RAW_SUFFIXES
from bestiary.image_files import UnreadableImageError, read_image
from bestiary.worker_processes import cores, empty_main_module

_MIN_FILES_FOR_WORKERS = 1000  # with fewer files, one process finishes before a second one has started
_CHUNK = 16
_MEASURED_SIDE = 1024  # pixels that measurements and hashes need at most


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one look at a file found. If `unreadable` gives a reason, only path, sha256 and bytes are set."""

    path: str  # relative: <class>/<file>
    sha256: str
    bytes: int
    unreadable: str = ""
    format: str = ""
    changes: tuple[str, ...] = ()  # what converting it to plain RGB changes
    width: int = 0  # pixels
    height: int = 0
    brightness: float = 0.0  # mean grey level, 0 to 255
    contrast: float = 0.0  # standard deviation of the grey levels
    sharpness: float = 0.0  # variance of the Laplacian at 256 pixels
    hashes: Hashes | None = None  # of the image without flat margins

    @property
    def class_folder(self) -> str:
        return self.path.split("/", 1)[0]


def inspect(root: Path, path: str) -> Inspection:
    """Inspect the file `root`/`path`. Whatever the file holds, this does not raise."""
    try:
        content = read_image(root / path)
    except OSError as error:
        return Inspection(path, "", 0, unreadable=(error.strerror or "cannot be read").lower())
    except UnreadableImageError as error:
        return Inspection(path, "", 0, unreadable=error.reason)
    sha256 = hashlib.sha256(content).hexdigest()
    if PurePosixPath(path).suffix.lower() in RAW_SUFFIXES:
        return Inspection(path, sha256, len(content), unreadable="a camera's raw file")
    try:
        decoded = decode(root / path, content, at_least=_MEASURED_SIDE)
    except UnreadableImageError as error:
        return Inspection(path, sha256, len(content), unreadable=error.reason)
    image = decoded.image
    grey = small_grey(image)
    small = thumbnail(grey)
    levels = np.asarray(small, np.float32)
    return Inspection(
        path,
        sha256,
        len(content),
        format=decoded.format,
        changes=decoded.changes,
        width=decoded.size[0],
        height=decoded.size[1],
        brightness=float(levels.mean()),
        contrast=float(levels.std()),
        sharpness=_sharpness(grey),
        hashes=hashes(thumbnail(grey.crop(content_box(grey)))),
    )


def inspect_all(root: Path, paths: Sequence[str], workers: int | None = None) -> list[Inspection]:
    """Inspect all files, in the order of `paths` for any number of worker processes (default: one per core)."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    workers = workers or (cores() if len(paths) >= _MIN_FILES_FOR_WORKERS else 1)
    with tqdm(desc="inspect images", total=len(paths), unit="image") as bar:
        if workers > 1:
            return _inspect_in_parallel(root, chunks, workers, bar)
        found: list[Inspection] = []
        for chunk in chunks:
            found += _inspect_chunk(root, chunk)
            bar.update(len(chunk))
        return found


def _inspect_in_parallel(
    root: Path, chunks: Sequence[Sequence[str]], workers: int, bar: tqdm[NoReturn]
) -> list[Inspection]:
    """Let `workers` - 1 processes inspect the chunks from the front while this process inspects from the back."""
    # spawn: this process may hold threads and an open database, which a fork would copy in an undefined state. This
    # process also does its share, because the others take a while to start.
    with ProcessPoolExecutor(workers - 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            with empty_main_module():
                pending = [pool.submit(_inspect_chunk, root, chunk) for chunk in chunks]
            own: list[list[Inspection]] = []
            while len(own) < len(chunks) and pending[-1 - len(own)].cancel():
                own.insert(0, _inspect_chunk(root, chunks[-1 - len(own)]))
                bar.update(len(own[0]))
            found: list[list[Inspection]] = []
            for future in pending[: len(chunks) - len(own)]:
                found.append(future.result())
                bar.update(len(found[-1]))
            return [inspection for chunk in found + own for inspection in chunk]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _inspect_chunk(root: Path, paths: Sequence[str]) -> list[Inspection]:
    return [inspect(root, path) for path in paths]


def _sharpness(grey: Image.Image) -> float:
    """Return the variance of the Laplacian."""
    levels = np.asarray(grey, np.int16)
    if min(levels.shape) < 3:
        return 0.0
    laplacian = levels[:-2, 1:-1] + levels[2:, 1:-1]
    laplacian += levels[1:-1, :-2]
    laplacian += levels[1:-1, 2:]
    laplacian -= 4 * levels[1:-1, 1:-1]
    values = laplacian.astype(np.float32).ravel()
    return float(values @ values / values.size - values.mean() ** 2)
