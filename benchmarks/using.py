"""Using the adapter: seconds from a command to its first picture, and the page's memory over 50 generations.

Run after `dvc repro`, on a machine that does nothing else. The last line is JSON.
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
from typing import Any

import httpx
import psutil

BESTIARY = [sys.executable, "-c", "from bestiary.cli import main; main()"]
IMPORTS = [sys.executable, "-c", "import peft; from diffusers import StableDiffusionPipeline"]
REPEATS = 3
ROOT = Path(__file__).parents[1]
ORDER = {"animal": "tiger", "steps": 2, "guidance_scale": 5.0, "scheduler": "dpmsolver++", "seed": 0}
WARM_UP, GENERATIONS = 10, 50


def main() -> None:
    """Measure, print a line for each figure, and one line of JSON."""
    with TemporaryDirectory() as folder:
        result: dict[str, Any] = {
            "benchmark": "using",
            "environment": {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
            "help_s": seconds([*BESTIARY, "--help"]),
            "import_s": seconds(IMPORTS),
            "generate_s": seconds([*BESTIARY, "generate", "tiger", "--out", folder]),
        }
    result |= page_memory()
    for name, figure in result.items():
        if isinstance(figure, float):
            print(f"{name:32} {figure:10.3f}")
    print(json.dumps(result))


def seconds(command: list[str]) -> float:
    """The median wall time of a command in a process of its own; a first run fills the disk cache."""
    laps = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        laps.append(time.perf_counter() - started)
    return statistics.median(laps[1:])


def page_memory() -> dict[str, float]:
    """Resident memory of `bestiary app` before and after many generations, by turns with the adapter and without."""
    with subprocess.Popen([*BESTIARY, "app", "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        with httpx.Client(base_url=app.stdout.readline().split()[1], timeout=600) as client:
            adapter = client.get("/api/catalog").json()["adapter"]

            def draw(number: int) -> None:
                order = ORDER | {"seed": number, "adapter": (adapter, "none")[number % 2], "compare": True}
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
