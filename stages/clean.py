"""Keep the usable images of build/raw in build/clean, and say in reports/clean what was wrong with the others."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from bestiary.data.cleaning import JudgeFunction, clean
from bestiary.data.findings import count_kinds, read_overrides
from bestiary.data.inspection import peak_memory_mib
from bestiary.params import Model
from bestiary.stage import stage


def judge_function(model: Model) -> JudgeFunction:
    """The judge as cleaning wants it: a plain function."""
    from bestiary.diffusion.base import device_and_dtype
    from bestiary.evaluation.judge import Judge

    judge = Judge.load(model.model, model.revision, device=str(device_and_dtype()[0]))

    def probabilities(images: Sequence[Image], texts: Sequence[str]) -> NDArray[np.float32]:
        return judge.probabilities(images, texts).numpy()

    return probabilities


def main() -> None:
    with stage("clean") as (params, run):
        started = time.perf_counter()
        outcome = clean(
            Path("build/raw"),
            Path("build/clean"),
            params.clean,
            judge=None if params.clean.off_topic == "off" else judge_function(params.judge),
            overrides=read_overrides(Path("overrides.csv")),
            report=Path("reports/clean"),
        )
        if outcome.unused_overrides:
            print(f"overrides.csv names what is not there: {', '.join(outcome.unused_overrides)}.", file=sys.stderr)
        seconds = time.perf_counter() - started
        run.report(
            {
                "images_in": outcome.images_in,
                "images_kept": len(outcome.manifest),
                "findings": count_kinds(outcome.findings),
                "unused_overrides": len(outcome.unused_overrides),
                "seconds": seconds,
                "images_per_second": outcome.images_in / seconds,
                "near_duplicates_seconds": outcome.near_duplicates_seconds,
                "peak_memory_mib": peak_memory_mib(),
            }
        )


if __name__ == "__main__":
    main()
