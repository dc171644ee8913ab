"""What downloading, cleaning and splitting cost, each beside the least it could cost; the last line is JSON.

python benchmarks/data.py [--quick]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from bestiary import params
from bestiary.data import duplicates
from bestiary.data.cleaning import clean
from bestiary.data.inspection import cores
from bestiary.data.sciencedb import download

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "data"))  # the misbehaving server, and what plants faults

CLEAN = params.load_params(ROOT / "params.yaml").clean.model_copy(update={"off_topic": "off"})


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_jpeg(folder: Path, number: int) -> None:
    """A picture of 500 x 375 with about the detail of a photograph."""
    random = np.random.default_rng(number)
    soft = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(random.integers(0, 256, (188, 250), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    levels = np.asarray(soft, np.float32) + (np.asarray(fine, np.float32)[..., None] - 128) * 0.3
    path = folder / ("cat", "owl")[number % 2] / f"{number:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def open_and_decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def in_processes(work: Callable[..., Any], items: list[Any]) -> None:
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(work, items, chunksize=32))


def cleaning(folder: Path, count: int) -> dict[str, float]:
    """Seconds of cleaning without the judge beside only opening and decoding, and the memory that it takes."""
    in_processes(partial(write_jpeg, folder / "raw"), list(range(count)))
    decode = timed(lambda: in_processes(open_and_decode, sorted((folder / "raw").glob("*/*"))))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        seconds, memory_mib = fresh.submit(clean_alone, folder).result()
    return {
        "images": count,
        "decode_s": decode,
        "clean_s": seconds,
        "ratio": seconds / decode,
        "peak_memory_mib": memory_mib,
    }


def clean_alone(folder: Path) -> tuple[float, float]:
    """Seconds of cleaning, and the most memory that this process and all its workers may have held, in MiB."""
    seconds = timed(lambda: clean(folder / "raw", folder / "clean", CLEAN, report=folder / "report"))
    own, worker = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return seconds, (own + cores() * worker) / 1024


def neighbours(count: int = 40_000) -> dict[str, float]:
    """Seconds of the three searches that cleaning makes over `count` hashes, and of the grouping."""
    hashes = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    hashes[count // 2 :][: count // 20] = hashes[: count // 20] ^ np.uint64(0b1011)

    def search() -> None:
        bits = CLEAN.near_duplicate_bits
        found = [duplicates.neighbours(hashes, hashes, bits, half=half) for half in (True, True, False)]
        duplicates.groups(np.concatenate(found), count)

    return {"hashes": count, "seconds": timed(search)}


def downloading(folder: Path, count: int) -> dict[str, float]:
    """Seconds of the client beside a bare loop of httpx with as many connections, over small files."""
    from server import serving

    random = np.random.default_rng(0)
    files = {f"/V1/Animal/{('cat', 'owl')[n % 2]}/{n}.jpg": b"\xff\xd8\xff" + random.bytes(4096) for n in range(count)}
    settings = params.ScienceDB(
        dataset_id="x", version="V1", connections=4, retries=2, timeout_s=30.0, allow_missing=0.0
    )
    with serving(files) as server:
        with httpx.Client(follow_redirects=True, limits=httpx.Limits(max_connections=4)) as client:
            get = partial(get_once, client, f"{server.url}/download")

            def loop() -> None:
                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(get, server.ids))

            bare = timed(loop)
        os.environ["SCIENCEDB_API_URL"] = os.environ["SCIENCEDB_DOWNLOAD_URL"] = server.url
        server.most_at_once = 0
        ours = timed(lambda: download(folder / "taken", settings, cache=folder / "cache"))
        return {
            "files": count,
            "bare_loop_s": bare,
            "client_s": ours,
            "ratio": ours / bare,
            "most_requests_at_once": server.most_at_once,
        }


def get_once(client: httpx.Client, address: str, file_id: str) -> bytes:
    return client.get(address, params={"fileId": file_id}).content


def planted() -> dict[str, float]:
    """Recall of each kind of fault planted among drawn pictures, and the good ones that were thrown out."""
    from conftest import draw
    from plant import plant, recall, wrongly_dropped

    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        for index, animal in enumerate(("cat", "dog", "owl", "pig", "fox")):
            (raw / animal).mkdir(parents=True)
            for number in range(80):
                draw(1000 * index + number).save(raw / animal / f"{number}.jpg", quality=90)
        faults = plant(raw, 0.02)
        outcome = clean(raw, Path(name) / "clean", CLEAN)
        gone = {finding.path for finding in outcome.findings if finding.action == "quarantined"}
        table = {f"recall {kind}": recall(paths, gone) for kind, paths in faults.items() if paths}
        return {**table, "good_dropped": len(wrongly_dropped(faults, gone)), "images": outcome.images_in}


def main() -> None:
    quick = "--quick" in sys.argv
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "cores": cores(),
            "cleaning": [cleaning(folder / str(count), count) for count in ([200] if quick else [2_000, 10_000])],
            "near_duplicates": neighbours(4_000 if quick else 40_000),
            "download": downloading(folder, 300 if quick else 5_000),
            "planted_faults": planted(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
