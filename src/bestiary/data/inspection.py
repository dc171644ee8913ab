"""One look at every image: what its file is, what it measures, what it looks like to a hash."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from tqdm import tqdm

from bestiary.data.hashing import hashes, small_grey, thumbnail
from bestiary.data.images import UnreadableImageError, decode

_FEW = 1000  # so few images are done before a second process has started
_CHUNK = 16


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
    grey = small_grey(image)
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
    """Variance of the Laplacian."""
    levels = np.asarray(grey, np.int16)
    if min(levels.shape) < 3:
        return 0.0
    laplacian = levels[:-2, 1:-1] + levels[2:, 1:-1]
    laplacian += levels[1:-1, :-2]
    laplacian += levels[1:-1, 2:]
    laplacian -= 4 * levels[1:-1, 1:-1]
    values = laplacian.astype(np.float32).ravel()
    return float(values @ values / values.size - values.mean() ** 2)


def inspect_all(root: Path, paths: Sequence[str], workers: int | None = None) -> list[Inspection]:
    """Look at all files, in the order of `paths` whatever the number of workers (default: one for each core)."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    workers = workers or (cores() if len(paths) >= _FEW else 1)
    with tqdm(desc="inspect", total=len(paths), unit="image") as bar:

        def look(chunk: Sequence[str]) -> list[Inspection]:
            found = _inspect(root, chunk)
            bar.update(len(chunk))
            return found

        if workers == 1:
            return [each for chunk in chunks for each in look(chunk)]
        # spawn: this process may hold threads and an open database, which a fork would copy in any state. Until the
        # others have started, and after that too, it does its part: from the end, until it meets them.
        with ProcessPoolExecutor(workers - 1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                with _without_script():
                    elsewhere = [pool.submit(_inspect, root, chunk) for chunk in chunks]
                here: list[list[Inspection]] = []
                while len(here) < len(chunks) and elsewhere[-1 - len(here)].cancel():
                    here.insert(0, look(chunks[-1 - len(here)]))
                found = []
                for future in elsewhere[: len(chunks) - len(here)]:
                    found.append(future.result())
                    bar.update(len(found[-1]))
                return [each for chunk in found + here for each in chunk]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextmanager
def _without_script() -> Iterator[None]:
    """Processes started in here do not import the script that was started, with all that it imports: they need
    nothing of it, and it would take each of them a second."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _inspect(root: Path, paths: Sequence[str]) -> list[Inspection]:
    return [inspect(root, path) for path in paths]


def peak_memory_mib() -> float:
    """The most memory that this process and its workers can have held at once, the judge's included."""
    own, largest = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (own + (cores() - 1) * largest) / 1024


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
