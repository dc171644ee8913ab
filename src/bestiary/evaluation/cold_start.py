"""Measure the seconds from starting Python to the first picture, in a fresh process: this module runs as a program.

python -m bestiary.evaluation.cold_start REQUEST     the request as JSON; prints the seconds of each part as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from bestiary.errors import BestiaryError
from bestiary.samplers import Sampling, StoredSampling, from_stored, to_stored


@dataclass(frozen=True)
class PartSeconds:
    """Seconds to import the libraries, to load base and adapter, and to draw the first picture."""

    import_s: float
    load_s: float
    first_picture_s: float


@dataclass(frozen=True)
class ColdStart:
    """Seconds of a whole process, and of its parts. The rest is Python's own start and exit."""

    total_s: float
    parts: PartSeconds


@dataclass(frozen=True)
class Request:
    """What the fresh process draws."""

    model: str
    revision: str | None
    adapter: str
    prompt: str
    sampling: StoredSampling


def cold_start(model: str, revision: str | None, adapter: Path, prompt: str, sampling: Sampling) -> ColdStart:
    """Draw one picture in a fresh process and return its seconds.

    Raises BestiaryError with the last line of that process's errors when it fails.
    """
    request = {
        "model": model,
        "revision": revision,
        "adapter": str(adapter),
        "prompt": prompt,
        "sampling": to_stored(sampling),
    }
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "bestiary.evaluation.cold_start", json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
    )
    total = time.perf_counter() - start
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise BestiaryError(f"A fresh process cannot draw the first picture: {reason[0]}")
    return ColdStart(total, PartSeconds(**json.loads(process.stdout.splitlines()[-1])))


def draw_first_picture(request: Request) -> PartSeconds:
    """Draw one picture and return the seconds of each part. Call it in a process that has imported nothing yet."""
    readings = [time.perf_counter()]
    import diffusers  # noqa: F401  the next lines would otherwise import these libraries lazily, while drawing
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from bestiary.diffusion.adapter import apply_adapter
    from bestiary.diffusion.base import load_pipeline
    from bestiary.diffusion.sampling import generate
    from bestiary.evaluation.profiling import synchronize

    readings.append(time.perf_counter())
    sampling = from_stored(request.sampling)
    pipeline = load_pipeline(request.model, request.revision)
    apply_adapter(pipeline, Path(request.adapter), sampling.adapter_weight)
    readings.append(time.perf_counter())
    generate(pipeline, [request.prompt], [0], sampling, batch_size=1)
    synchronize(pipeline)
    readings.append(time.perf_counter())
    return PartSeconds(*(after - before for before, after in pairwise(readings)))


def main(text: str) -> None:
    """Draw what the request, as JSON, describes and print the seconds as one line of JSON."""
    from pydantic import TypeAdapter

    print(json.dumps(asdict(draw_first_picture(TypeAdapter(Request).validate_json(text)))))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BestiaryError as error:
        raise SystemExit(str(error)) from None
