"""What downloading and cleaning cost, each beside the least it could cost, and what cleaning finds of planted faults.

    python benchmarks/data.py            # about 4 minutes on two cores
    python benchmarks/data.py --quick    # little of each: a try of the benchmark itself, its times mean nothing

Prints a table as it goes; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bestiary import params
from bestiary.data import duplicates
from bestiary.data.cleaning import clean
from bestiary.data.inspection import cores, peak_memory_mib
from bestiary.data.sciencedb import download

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "data"), str(ROOT / "stages")]  # the server and the faults; the judge

CLEAN = params.load_params(ROOT / "params.yaml").clean
WITHOUT_JUDGE = CLEAN.model_copy(update={"off_topic": "off"})
CONNECTIONS = 4
SPAWN = multiprocessing.get_context("spawn")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--images", type=int, nargs="*", default=[2_000, 10_000], help="JPEGs to clean, one run each")
    asked.add_argument("--files", type=int, default=5_000, help="small files to download")
    asked.add_argument("--hashes", type=int, default=40_000, help="perceptual hashes to group")
    asked.add_argument("--faults", type=float, default=0.02, help="share of each kind planted in the embedded sample")
    asked.add_argument("--runs", type=int, default=3, help="of client and bare loop, alternating; the fastest count")
    asked.add_argument("--quick", action="store_true", help="200 and 400 images, 300 files, 4,000 hashes, one run")
    options = asked.parse_args()
    if options.quick:
        options.images, options.files, options.hashes, options.runs = [200, 400], 300, 4_000, 1
    result: dict[str, Any] = {"benchmark": "data", "quick": options.quick, "cores": cores()}
    with tempfile.TemporaryDirectory() as name:
        result["cleaning"] = [cleaning(Path(name) / str(count), count) for count in options.images]
        if options.files:
            result["download"] = downloading(Path(name) / "download", options.files, options.runs)
        if options.hashes:
            result["near_duplicates"] = grouping(options.hashes)
        if options.faults:
            result["planted_faults"] = planted(Path(name) / "planted", options.faults)
    print(json.dumps(result))


def show(title: str, row: dict[str, Any]) -> dict[str, Any]:
    numbers = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    print(f"{title}: {'  '.join(numbers)}", flush=True)
    return row


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- cleaning ----


def cleaning(folder: Path, count: int) -> dict[str, Any]:
    """Seconds of cleaning without the judge beside only opening and decoding, and the memory that it takes."""
    with ProcessPoolExecutor(cores(), mp_context=SPAWN) as pool:
        list(pool.map(partial(write_jpeg, folder / "raw"), range(count), chunksize=64))
    paths = sorted((folder / "raw").glob("*/*"))
    # Forked and warm, so that the least is really the least: cleaning starts its processes within its time.
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(open_and_decode, paths[: 8 * cores()]))
        decode = timed(lambda: list(pool.map(open_and_decode, paths, chunksize=32)))
    with ProcessPoolExecutor(1, mp_context=SPAWN) as fresh:
        seconds, kept, memory_mib = fresh.submit(clean_alone, folder).result()
    shutil.rmtree(folder)
    row = {"images": count, "kept": kept, "decode_s": decode, "clean_s": seconds, "ratio": seconds / decode}
    return show("cleaning", row | {"images_per_second": count / seconds, "peak_memory_mib": memory_mib})


def write_jpeg(folder: Path, number: int) -> None:
    """A JPEG of 500 x 375 and 60 kB, with its own colours, shapes and grain."""
    random = np.random.default_rng(number)
    colours = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    top, left = random.integers(0, 1000, 2)
    grain = Image.fromarray(texture()[top : top + 375, left : left + 500]).convert("RGB")
    path = folder / ("cat", "owl")[number % 2] / f"{number:05d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(colours.resize(grain.size, Image.Resampling.BICUBIC), grain, 0.35).save(path, quality=85)


@lru_cache
def texture() -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).normal(128, 40, (1200, 1200)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(noise).resize((1500, 1500), Image.Resampling.BICUBIC))


def open_and_decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def clean_alone(folder: Path) -> tuple[float, int, float]:
    """Seconds of cleaning, images kept, and the most memory that this process and its workers may have held, in MiB."""
    start = time.perf_counter()
    outcome = clean(folder / "raw", folder / "clean", WITHOUT_JUDGE, report=folder / "report")
    seconds = time.perf_counter() - start
    return seconds, len(outcome.manifest), peak_memory_mib()


def grouping(count: int) -> dict[str, Any]:
    """Seconds of the three searches that cleaning makes over `count` hashes, and of the grouping."""
    hashes = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    hashes[count // 2 :][: count // 20] = hashes[: count // 20] ^ np.uint64(0b1011)
    numbers = np.empty(0)

    def search() -> None:
        nonlocal numbers
        bits = CLEAN.near_duplicate_bits
        found = [duplicates.neighbours(hashes, hashes, bits, half=half) for half in (True, True, False)]
        numbers = duplicates.groups(np.concatenate(found), count)

    seconds = timed(search)
    return show("near-duplicates", {"hashes": count, "seconds": seconds, "groups": len(np.unique(numbers))})


# ---- download ----


def downloading(folder: Path, count: int, runs: int) -> dict[str, Any]:
    """Seconds of the client beside a bare loop of httpx with as many connections, over small files."""
    settings = params.ScienceDB(
        dataset_id="x", version="V1", connections=CONNECTIONS, retries=2, timeout_s=30.0, allow_missing=0.0
    )
    bare, ours = [], []
    with serving_apart(count) as (url, ids, counters):
        os.environ["SCIENCEDB_API_URL"] = os.environ["SCIENCEDB_DOWNLOAD_URL"] = url
        for run in range(runs):
            bare.append(timed(partial(bare_loop, f"{url}/download", ids)))
            counters()
            ours.append(timed(partial(download, folder / "raw", settings, cache=folder / f"cache{run}")))
            most_at_once, requests = counters()
    row = {"files": count, "connections": CONNECTIONS, "bare_loop_s": min(bare), "client_s": min(ours)}
    row |= {"ratio": min(ours) / min(bare), "files_per_second": count / min(ours)}
    return show("download", row | {"requests": requests, "most_requests_at_once": most_at_once})


def bare_loop(address: str, ids: Sequence[str]) -> None:
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    with httpx.Client(follow_redirects=True, limits=limits) as client:

        def get(file_id: str) -> None:
            client.get(address, params={"fileId": file_id}).raise_for_status()

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(get, ids))


@contextmanager
def serving_apart(count: int) -> Iterator[tuple[str, list[str], Callable[[], tuple[int, int]]]]:
    """The tests' server in a process of its own: its address, its files' ids, and its counters since last asked."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(count, there), daemon=True)
    process.start()
    url, ids = here.recv()

    def counters() -> tuple[int, int]:
        here.send("counters")
        most_at_once, requests = here.recv()
        return most_at_once, requests

    try:
        yield url, ids, counters
    finally:
        here.send("end")
        process.join()


def serve(count: int, asked: Connection) -> None:
    from server import serving

    random = np.random.default_rng(0)
    names = (f"/V1/Animal/{('cat', 'owl')[number % 2]}/{number}.jpg" for number in range(count))
    with serving({name: b"\xff\xd8\xff" + random.bytes(4096) for name in names}) as server:
        asked.send((server.url, list(server.ids)))
        while asked.recv() != "end":
            with server.lock:
                asked.send((server.most_at_once, server.requests.total()))
                server.most_at_once = 0
                server.requests.clear()


# ---- planted faults ----


def planted(folder: Path, share: float) -> dict[str, Any]:
    """What cleaning with the embedded judge finds of faults planted in the embedded sample: recall of each kind,
    and precision: of what was thrown out, the share that was planted."""
    from plant import copy_sample, draw_off_topic, plant, recall

    from clean import judge_function  # the stage's

    copy_sample(folder / "raw")
    count = round(share * len(list((folder / "raw").glob("*/*"))))
    faults = plant(folder / "raw", share, off_topic=draw_off_topic(count))
    judge = judge_function(params.Model(model=str(ROOT / "models" / "judge"), revision=None))
    settings = CLEAN.model_copy(update={"off_topic": "quarantine"})
    outcome = clean(folder / "raw", folder / "clean", settings, judge=judge)
    gone = {finding.path for finding in outcome.findings if finding.action == "quarantined"}
    faulty = {path for entries in faults.values() for entry in entries for path in entry.split("|")}
    off_topic = {f.path for f in outcome.findings if f.kind == "off topic" and f.action == "quarantined"}
    rows = {kind: {"planted": len(paths), "recall": recall(paths, gone)} for kind, paths in faults.items()}
    rows["off topic"] = {
        "planted": len(faults["off topic"]),
        "recall": recall(faults["off topic"], off_topic),
        "precision": len(off_topic & set(faults["off topic"])) / max(len(off_topic), 1),
    }
    print("| planted | images | recall | precision |\n|---|---|---|---|")
    for kind, row in rows.items():
        precision = f"{row['precision']:.3f}" if "precision" in row else ""
        print(f"| {kind} | {row['planted']} | {row['recall']:.3f} | {precision} |", flush=True)
    row = {"images": outcome.images_in, "quarantined": len(gone), "good_quarantined": len(gone - faulty)}
    return show("planted", row) | {"kinds": rows}


if __name__ == "__main__":
    main()
