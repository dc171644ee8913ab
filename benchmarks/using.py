"""Seconds from a command to its first picture, and how the page's memory grows over 50 generations.

Run it after `dvc repro`, on a machine that does nothing else. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

BESTIARY = [sys.executable, "-c", "from bestiary.cli import main; main()"]
IMPORTS = [sys.executable, "-c", "import peft; from diffusers import StableDiffusionPipeline"]
REPEATS = 3
ROOT = Path(__file__).parents[1]
ORDER = {"animal": "tiger", "steps": 2, "guidance_scale": 5.0, "scheduler": "dpmsolver++"}
WARM_UP, GENERATIONS = 10, 50


def main() -> None:
    with TemporaryDirectory() as folder:
        figures = {
            "help_s": seconds([*BESTIARY, "--help"]),
            "import_s": seconds(IMPORTS),
            "generate_s": seconds([*BESTIARY, "generate", "tiger", "--out", folder]),
        }
    figures |= page_memory()
    for name, figure in figures.items():
        print(f"{name:32} {figure:10.3f}")
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({"benchmark": "using", "environment": machine, **figures}))


def seconds(command: list[str]) -> float:
    """The median wall time of a command in a fresh process, after one run that fills the disk cache."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def page_memory() -> dict[str, float]:
    """The resident memory of `bestiary app` before and after many generations, alternately with and without adapter."""
    with subprocess.Popen([*BESTIARY, "app", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        with httpx.Client(base_url=app.stdout.readline().split()[1], timeout=600) as client:
            adapter = client.get("/api/catalog").json()["adapter"]

            def draw(number: int) -> None:
                order = {**ORDER, "seed": number, "adapter": (adapter, "none")[number % 2], "compare": True}
                assert '"picture"' in client.post("/api/draw", json=order).raise_for_status().text

            def resident_mib() -> float:
                return float(psutil.Process(app.pid).memory_info().rss / 2**20)

            for number in range(WARM_UP):
                draw(number)
            before = resident_mib()
            for number in range(GENERATIONS):
                draw(number)
            after = resident_mib()
        app.terminate()
    return {"page_memory_before_mib": before, "page_memory_after_mib": after, "page_growth": after / before - 1}


if __name__ == "__main__":
    main()
