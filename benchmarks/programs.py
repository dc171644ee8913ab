"""What drawing through OpenAI's images API costs beside the command's own loop, in turns on the same machine.

The server runs in a thread of this process: two processes that do the same work differ by several percent all the
time, because their memory lies elsewhere. A second loop of the command shows how exact the comparison is.
Run it after `dvc repro`, on a machine that does nothing else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import httpx
import uvicorn
from PIL import Image

from bestiary.app.offers import Offerings
from bestiary.app.server import create_app, serving
from bestiary.generation import Generator, choose_base, decisive, resolving_all
from bestiary.memory import keep_freed_memory
from bestiary.png_metadata import PictureSettings, write_png
from bestiary.project import drawing_defaults, project_base, project_params

ROOT = Path(__file__).parents[1]
CHAMPION = "models:/bestiary@champion"
PROMPT = "a photo of a tiger"
PICTURES = 4  # of one request
TURNS = 20


@dataclass(frozen=True)
class Turn:
    """The pixels of one turn's pictures, the seconds until their PNGs are there, and the CPU seconds that they took."""

    pixels: list[bytes]
    seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short turn, which proves that the script runs")
    turns = 1 if parser.parse_args().quick else TURNS
    os.chdir(ROOT)
    keep_freed_memory()  # as the server and the command do
    own, control = command(), command()
    with api() as served:
        rows = [one_turn((own, control, served), turn) for turn in range(1 + turns)]
    del rows[0]  # it fills the caches
    assert all(row[0].pixels == each.pixels for row in rows for each in row), "The API draws other pictures."
    figures = {
        "pictures": PICTURES,
        "command_s": statistics.median(row[0].seconds for row in rows),
        "control_s": statistics.median(row[1].seconds for row in rows),
        "api_s": statistics.median(row[2].seconds for row in rows),
        "control_share": statistics.median(row[1].seconds / row[0].seconds for row in rows) - 1,
        "overhead_share": statistics.median(2 * row[2].seconds / (row[0].seconds + row[1].seconds) for row in rows) - 1,
        "cpu_overhead_share": statistics.median(
            2 * row[2].cpu_seconds / (row[0].cpu_seconds + row[1].cpu_seconds) for row in rows
        )
        - 1,
    }
    for name, figure in figures.items():
        print(f"{name:32} {figure:10.4f}")
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({"benchmark": "programs", "environment": machine, "turns": turns, **figures}))


Draw = Callable[[int], list[bytes]]  # the PNGs of the pictures with this seed and the next ones


def command() -> Draw:
    """The loop of `bestiary generate`, with the champion in memory."""
    default = project_base(project_params())
    with resolving_all([CHAMPION]) as resolved:
        adapters = resolved()
    generator = Generator()
    generator.prepare(choose_base(decisive(adapters), None, None, known=[default] if default else []), adapters)
    (adapter,), (sha256,) = adapters, generator.adapter_hashes
    assert adapter.defaults is not None
    sampling, base = generator.sized(adapter.defaults.sampling), generator.base
    settings = PictureSettings(PROMPT, 0, sampling, base.model, base.revision, adapter.uri, sha256)
    settings = generator.prompted(settings, PROMPT)

    def draw(seed: int) -> list[bytes]:
        jobs = [replace(settings, seed=seed + number) for number in range(PICTURES)]
        return [write_png(generator.draw(job), job) for job in jobs]

    return draw


@contextmanager
def api() -> Iterator[Draw]:
    """One request to OpenAI's API, whose server runs in a thread."""
    params = project_params()
    base = project_base(params)
    assert base is not None
    offered = Offerings((base,), (str(ROOT / "models" / "adapter"),), drawing_defaults(params))
    server = uvicorn.Server(serving(create_app(offered)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=600) as client:

            def draw(seed: int) -> list[bytes]:
                request = {"model": CHAMPION, "prompt": PROMPT, "n": PICTURES, "seed": seed}
                answer = client.post("/v1/images/generations", json=request).raise_for_status().json()
                return [base64.b64decode(picture["b64_json"]) for picture in answer["data"]]

            try:
                yield draw
            finally:
                server.should_exit = True
                thread.join()


def one_turn(ways: tuple[Draw, ...], turn: int) -> list[Turn]:
    """The same pictures in each of the ways. Which of them is first changes with each turn."""
    places = [(turn + place) % len(ways) for place in range(len(ways))]
    drawn = {place: timed(ways[place], PICTURES * turn) for place in places}
    return [drawn[place] for place in range(len(ways))]


def timed(draw: Draw, seed: int) -> Turn:
    started, cpu = time.perf_counter(), time.process_time()
    pngs = draw(seed)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Turn([Image.open(BytesIO(png)).tobytes() for png in pngs], seconds, cpu)


if __name__ == "__main__":
    main()
