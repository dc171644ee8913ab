"""What drawing through OpenAI's images API costs beside the command's own loop, in turns on the same machine.

Run it after `dvc repro`, on a machine that does nothing else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import httpx
import psutil
from PIL import Image

from bestiary.generation import Generator, choose_base, decisive, resolving_all
from bestiary.memory import keep_freed_memory
from bestiary.png_metadata import PictureSettings, write_png
from bestiary.project import project_base, project_params

ROOT = Path(__file__).parents[1]
APP = [sys.executable, "-c", "from bestiary.cli import main; main()", "app", "--port", "0"]
CHAMPION = "models:/bestiary@champion"
PROMPT = "a photo of a tiger"
PICTURES = 4  # of one request
TURNS = 15


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
    generator, settings = command()
    with subprocess.Popen(APP, cwd=ROOT, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        with httpx.Client(base_url=app.stdout.readline().split()[1], timeout=600) as client:
            server = psutil.Process(app.pid)
            pairs = [both(generator, settings, client, server, turn) for turn in range(1 + turns)]
        app.terminate()
    del pairs[0]  # it fills the caches
    assert all(own.pixels == served.pixels for own, served in pairs), "The API draws other pictures than the command."
    figures = {
        "pictures": PICTURES,
        "command_s": statistics.median(own.seconds for own, _ in pairs),
        "api_s": statistics.median(served.seconds for _, served in pairs),
        "overhead_share": statistics.median(served.seconds / own.seconds for own, served in pairs) - 1,
        "cpu_overhead_share": statistics.median(served.cpu_seconds / own.cpu_seconds for own, served in pairs) - 1,
    }
    for name, figure in figures.items():
        print(f"{name:32} {figure:10.4f}")
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({"benchmark": "programs", "environment": machine, "turns": turns, **figures}))


def command() -> tuple[Generator, PictureSettings]:
    """What `bestiary generate` draws with: the champion in memory, and the settings of its pictures."""
    keep_freed_memory()  # as the server and the command do
    default = project_base(project_params())
    with resolving_all([CHAMPION]) as resolved:
        adapters = resolved()
    generator = Generator()
    generator.prepare(choose_base(decisive(adapters), None, None, known=[default] if default else []), adapters)
    (adapter,), (sha256,) = adapters, generator.adapter_hashes
    assert adapter.defaults is not None
    sampling = generator.sized(adapter.defaults.sampling)
    base = generator.base
    settings = PictureSettings(PROMPT, 0, sampling, base.model, base.revision, adapter.uri, sha256)
    return generator, generator.prompted(settings, PROMPT)


def both(
    generator: Generator, settings: PictureSettings, client: httpx.Client, server: psutil.Process, turn: int
) -> tuple[Turn, Turn]:
    """The same pictures by the command's loop and by the API. Which of them is first changes with each turn."""
    if turn % 2:
        served = by_api(client, server, turn)
        return by_command(generator, settings, turn), served
    return by_command(generator, settings, turn), by_api(client, server, turn)


def by_command(generator: Generator, settings: PictureSettings, turn: int) -> Turn:
    """Draw as `bestiary generate` does, and make the PNG of each picture."""
    started, cpu, images = time.perf_counter(), time.process_time(), []
    for number in range(PICTURES):
        job = replace(settings, seed=PICTURES * turn + number)
        images.append(generator.draw(job))
        write_png(images[-1], job)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Turn([image.tobytes() for image in images], seconds, cpu)


def by_api(client: httpx.Client, server: psutil.Process, turn: int) -> Turn:
    """Let the server draw the same pictures with one request. The CPU seconds are all of the server's."""
    started, before = time.perf_counter(), server.cpu_times()
    request = {"model": CHAMPION, "prompt": PROMPT, "n": PICTURES, "seed": PICTURES * turn}
    answer = client.post("/v1/images/generations", json=request).raise_for_status().json()
    pngs = [base64.b64decode(picture["b64_json"]) for picture in answer["data"]]
    seconds, after = time.perf_counter() - started, server.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return Turn([Image.open(BytesIO(png)).tobytes() for png in pngs], seconds, cpu)


if __name__ == "__main__":
    main()
