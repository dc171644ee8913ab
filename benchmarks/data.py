"""What downloading and cleaning cost beside the least they could cost, and which planted faults cleaning finds.

    python benchmarks/data.py            # about 4 minutes on two cores
    python benchmarks/data.py --quick    # a small trial of the benchmark itself: its times mean nothing

Prints a table while it runs; the last line is JSON.
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
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bestiary import params
from bestiary.data import duplicates
from bestiary.data.cleaning import clean
from bestiary.data.hashing import VIEWS
from bestiary.data.off_topic import AskJudge
from bestiary.data.sciencedb import download
from bestiary.data.versions import MIRRORED_VIEWS
from bestiary.memory import peak_memory
from bestiary.worker_processes import cores

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # for support: the server and the planted faults

CLEAN = params.load_params(ROOT / "params.yaml").clean
WITHOUT_JUDGE = CLEAN.model_copy(update={"off_topic": "off"})
CONNECTIONS = 4
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Cleaning:
    """Cleaning without the judge beside opening and decoding only."""

    images: int
    kept: int
    decode_s: float
    clean_s: float
    ratio: float
    images_per_second: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Download:
    """The client beside a bare loop of httpx with as many connections, over small files."""

    files: int
    connections: int
    bare_loop_s: float
    client_s: float
    ratio: float
    files_per_second: float
    requests: int
    most_requests_at_once: int


@dataclass(frozen=True)
class NearDuplicates:
    """The searches that cleaning makes over hashes, and the grouping."""

    hashes: int
    seconds: float
    groups: int


@dataclass(frozen=True)
class Copies:
    """What cleaning finds of altered copies of photograph-like pictures, and the search beside decoding."""

    images: int
    decode_s: float
    search_s: float
    ratio: float
    precision: float
    kinds: dict[str, dict[str, float]]  # of each kind: planted, recall, originals_lost


@dataclass(frozen=True)
class PlantedFaults:
    """What cleaning with the bundled judge finds of faults planted in the bundled sample."""

    images: int
    quarantined: int
    good_quarantined: int
    kinds: dict[str, dict[str, float]]  # of each kind: planted, recall; and precision for off-topic images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[2_000, 10_000], help="JPEGs to clean, one run each")
    parser.add_argument("--files", type=int, default=5_000, help="small files to download")
    parser.add_argument("--hashes", type=int, default=40_000, help="perceptual hashes to group")
    parser.add_argument("--copies", type=int, default=24, help="pictures of each kind of altered copies")
    parser.add_argument("--faults", type=float, default=0.02, help="share of each kind planted in the bundled sample")
    parser.add_argument("--runs", type=int, default=3, help="of client and bare loop in turn; the fastest counts")
    parser.add_argument(
        "--quick", action="store_true", help="200 and 400 images, 300 files, 4,000 hashes, 1 copy, one run"
    )
    options = parser.parse_args()
    if options.quick:
        options.images, options.files, options.hashes, options.runs = [200, 400], 300, 4_000, 1
        options.copies = 1
    result: dict[str, object] = {"benchmark": "data", "quick": options.quick, "cores": cores()}  # the JSON at the end
    with tempfile.TemporaryDirectory() as name:
        result["cleaning"] = [asdict(measure_cleaning(Path(name) / str(count), count)) for count in options.images]
        if options.files:
            result["download"] = asdict(measure_download(Path(name) / "download", options.files, options.runs))
        if options.hashes:
            result["near_duplicates"] = asdict(measure_near_duplicates(options.hashes))
        if options.copies:
            result["copies"] = asdict(find_copies(Path(name) / "copies", options.copies))
        if options.faults:
            result["planted_faults"] = asdict(find_planted_faults(Path(name) / "planted", options.faults))
    print(json.dumps(result))


def show(title: str, row: Cleaning | Download | NearDuplicates | Copies | PlantedFaults) -> None:
    numbers = {key: value for key, value in asdict(row).items() if key != "kinds"}
    texts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items())
    print(f"{title}: {'  '.join(texts)}", flush=True)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- cleaning ----


def measure_cleaning(folder: Path, count: int) -> Cleaning:
    """Measure seconds and memory of cleaning `count` JPEGs."""
    with ProcessPoolExecutor(cores(), mp_context=SPAWN) as pool:
        list(pool.map(partial(write_jpeg, folder / "raw"), range(count), chunksize=64))
    paths = sorted((folder / "raw").glob("*/*"))
    # Forked and warm, for a true lower bound. Cleaning has to start its processes within the measured time.
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(open_and_decode, paths[: 8 * cores()]))
        decode = timed(lambda: list(pool.map(open_and_decode, paths, chunksize=32)))
    with ProcessPoolExecutor(1, mp_context=SPAWN) as fresh:
        seconds, kept, memory_mib = fresh.submit(clean_in_this_process, folder).result()
    shutil.rmtree(folder)
    row = Cleaning(count, kept, decode, seconds, seconds / decode, count / seconds, memory_mib)
    show("cleaning", row)
    return row


def write_jpeg(folder: Path, number: int) -> None:
    """Write a JPEG of 500 x 375 pixels and 60 kB with its own colours, shapes and grain."""
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


def clean_in_this_process(folder: Path) -> tuple[float, int, float]:
    """Return the seconds of cleaning, the number of images kept, and the peak memory with the workers' in MiB."""
    start = time.perf_counter()
    outcome = clean(folder / "raw", folder / "clean", WITHOUT_JUDGE, report=folder / "report")
    seconds = time.perf_counter() - start
    return seconds, len(outcome.manifest), peak_memory(child_processes=cores() - 1).process_mib


def measure_near_duplicates(count: int) -> NearDuplicates:
    """Measure the searches and the grouping over `count` hashes."""
    hashes = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    hashes[count // 2 :][: count // 20] = hashes[: count // 20] ^ np.uint64(0b1011)
    bits = CLEAN.near_duplicate_bits
    start = time.perf_counter()
    searches = [True, True] + [False] * (len(VIEWS) + MIRRORED_VIEWS)  # half of the pairs suffice without a view
    found = [duplicates.neighbours(hashes, hashes, bits, half=half) for half in searches]
    numbers = duplicates.groups(np.concatenate(found), count)
    row = NearDuplicates(count, time.perf_counter() - start, len(np.unique(numbers)))
    show("near-duplicates", row)
    return row


def find_copies(folder: Path, count: int) -> Copies:
    """Clean `count` pictures of each kind of altered copies, with a copy each."""
    from support.copies import plant_copies, score_copies

    planted = plant_copies(folder / "raw" / "scenes", count)
    paths = sorted((folder / "raw").glob("*/*"))
    with ThreadPoolExecutor(cores()) as pool:
        decode_s = timed(lambda: list(pool.map(open_and_decode, paths)))
    outcome = clean(folder / "raw", folder / "clean", WITHOUT_JUDGE)
    taken = [
        (Path(finding.path).name, Path(finding.other).name)
        for finding in outcome.findings
        if finding.action == "quarantined" and finding.other
    ]
    found, precision = score_copies(planted, taken)
    print("| copy | planted | recall | originals lost |\n|---|---|---|---|")
    for kind, row in found.items():
        print(f"| {kind} | {row.planted} | {row.recall:.2f} | {row.originals_lost} |", flush=True)
    search_s = outcome.near_duplicates_seconds
    kinds = {kind: asdict(row) for kind, row in found.items()}
    copies = Copies(len(paths), decode_s, search_s, search_s / decode_s, precision, kinds)
    show("copies", copies)
    return copies


# ---- download ----


def measure_download(folder: Path, count: int, runs: int) -> Download:
    """Measure client and bare loop in turn over `count` files, `runs` times; the fastest run of each counts."""
    settings = params.ScienceDB(
        dataset_id="x", version="V1", connections=CONNECTIONS, retries=2, timeout_s=30.0, allow_missing=0.0
    )
    bare, ours = [], []
    with serve_in_another_process(count) as (url, ids, counters):
        os.environ["SCIENCEDB_API_URL"] = os.environ["SCIENCEDB_DOWNLOAD_URL"] = url
        for run in range(runs):
            bare.append(timed(partial(bare_loop, f"{url}/download", ids)))
            counters()
            ours.append(timed(partial(download, folder / "raw", settings, cache=folder / f"cache{run}")))
            max_at_once, requests = counters()
    client_s, bare_s = min(ours), min(bare)
    row = Download(count, CONNECTIONS, bare_s, client_s, client_s / bare_s, count / client_s, requests, max_at_once)
    show("download", row)
    return row


def bare_loop(address: str, ids: Sequence[str]) -> None:
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    with httpx.Client(follow_redirects=True, limits=limits) as client:

        def get(file_id: str) -> None:
            client.get(address, params={"fileId": file_id}).raise_for_status()

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(get, ids))


@contextmanager
def serve_in_another_process(count: int) -> Iterator[tuple[str, list[str], Callable[[], tuple[int, int]]]]:
    """Run the tests' server in another process.

    Gives its address, its files' ids, and a function that returns and resets (most requests at once, requests).
    """
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(count, there), daemon=True)
    process.start()
    url, ids = here.recv()

    def counters() -> tuple[int, int]:
        here.send("counters")
        max_at_once, requests = here.recv()
        return max_at_once, requests

    try:
        yield url, ids, counters
    finally:
        here.send("end")
        process.join()


def serve(count: int, commands: Connection) -> None:
    from support.sciencedb_server import serving

    random = np.random.default_rng(0)
    names = (f"/V1/Animal/{('cat', 'owl')[number % 2]}/{number}.jpg" for number in range(count))
    with serving({name: b"\xff\xd8\xff" + random.bytes(4096) for name in names}) as server:
        commands.send((server.url, list(server.ids)))
        while commands.recv() != "end":
            with server.lock:
                commands.send((server.max_at_once, server.requests.total()))
                server.max_at_once = 0
                server.requests.clear()


# ---- planted faults ----


def find_planted_faults(folder: Path, share: float) -> PlantedFaults:
    """Plant `share` of each kind of fault in the bundled sample, and clean it.

    Recall is the share of the planted images that were quarantined, precision the share of the images quarantined as
    off topic that were planted as such.
    """
    from support.planted_faults import copy_sample, draw_off_topic, faulty_paths, plant, recall

    from bestiary.diffusion.base import device_and_dtype
    from bestiary.evaluation.judge import Judge

    copy_sample(folder / "raw")
    count = round(share * len(list((folder / "raw").glob("*/*"))))
    faults = plant(folder / "raw", share, off_topic=draw_off_topic(count))
    judge = Judge.load(str(ROOT / "models" / "judge"), device=device_and_dtype()[0].type)
    outcome = clean(
        folder / "raw",
        folder / "clean",
        CLEAN.model_copy(update={"off_topic": "quarantine"}),
        judge=AskJudge(
            lambda images, texts: judge.probabilities(images, texts).numpy(),
            lambda images: judge.image_features(images).numpy(),
        ),
    )
    quarantined = {finding.path for finding in outcome.findings if finding.action == "quarantined"}
    off_topic = {f.path for f in outcome.findings if f.kind == "off topic" and f.action == "quarantined"}
    kinds = {kind: {"planted": len(paths), "recall": recall(paths, quarantined)} for kind, paths in faults.items()}
    kinds["off topic"] = {
        "planted": len(faults["off topic"]),
        "recall": recall(faults["off topic"], off_topic),
        "precision": len(off_topic & set(faults["off topic"])) / max(len(off_topic), 1),
    }
    print("| planted | images | recall | precision |\n|---|---|---|---|")
    for kind, numbers in kinds.items():
        precision = f"{numbers['precision']:.3f}" if "precision" in numbers else ""
        print(f"| {kind} | {numbers['planted']} | {numbers['recall']:.3f} | {precision} |", flush=True)
    good = quarantined - faulty_paths(faults)
    row = PlantedFaults(outcome.images_in, len(quarantined), len(good), kinds)
    show("planted", row)
    return row


if __name__ == "__main__":
    main()
