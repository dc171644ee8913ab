"""Clean build/raw into build/clean, and report in reports/clean what was wrong with the other images."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from bestiary.data.cleaning import ByHand, clean
from bestiary.data.findings import count_kinds, read_overrides
from bestiary.data.names import printable
from bestiary.data.off_topic import AskJudge
from bestiary.memory import peak_memory
from bestiary.params import Model
from bestiary.stage import stage
from bestiary.subjects import Subjects
from bestiary.worker_processes import cores

RAW, CLEAN, REPORT = Path("build/raw"), Path("build/clean"), Path("reports/clean")
OVERRIDES = Path("overrides.csv")


def load_judge(model: Model) -> AskJudge:
    """Load the judge as plain functions. Only now is torch imported: without a judge, cleaning does not need it."""
    from bestiary.diffusion.base import device_and_dtype
    from bestiary.evaluation.judge import Judge

    judge = Judge.load(model.model, model.revision, device=device_and_dtype()[0].type)

    def probabilities(images: Sequence[Image], texts: Sequence[str]) -> NDArray[np.float32]:
        return judge.probabilities(images, texts).numpy()

    def features(images: Sequence[Image]) -> NDArray[np.float32]:
        return judge.image_features(images).numpy()

    return AskJudge(probabilities, features)


def tell(line: str) -> None:
    """Print a line about the images that are left out, below the progress bars."""
    print(f"clean: {line}", file=sys.stderr)


def main() -> None:
    with stage("clean") as (params, run):
        started = time.perf_counter()
        judge = None if params.clean.off_topic == "off" else load_judge(params.judge)
        by_hand = ByHand(read_overrides(OVERRIDES), Subjects.read_from(RAW))
        outcome = clean(RAW, CLEAN, params.clean, judge=judge, by_hand=by_hand, report=REPORT, tell=tell)
        kept = len(outcome.manifest)
        tell(f"{kept} of {outcome.images_in} images are kept. {REPORT}/findings.csv lists what was found.")
        if outcome.unused_overrides:
            print(
                f"{OVERRIDES} names images that do not exist: {printable(', '.join(outcome.unused_overrides))}",
                file=sys.stderr,
            )
        seconds = time.perf_counter() - started
        run.report(
            {
                "images_in": outcome.images_in,
                "images_kept": kept,
                "findings": count_kinds(outcome.findings),
                "unused_overrides": len(outcome.unused_overrides),
            },
            costs={
                "seconds": seconds,
                "images_per_second": outcome.images_in / seconds,
                "near_duplicates_seconds": outcome.near_duplicates_seconds,
                "peak_memory_mib": peak_memory(child_processes=cores() - 1).process_mib,
            },
            headlines=("images_in", "images_kept"),
        )


if __name__ == "__main__":
    main()
