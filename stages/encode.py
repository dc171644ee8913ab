"""Encode the images and captions of build/split into build/latents."""

import time
from pathlib import Path

from bestiary.diffusion.encoding import encode_images
from bestiary.stage import CACHE, stage

CLEAN, SPLIT, LATENTS = Path("build/clean"), Path("build/split"), Path("build/latents")


def main() -> None:
    with stage("encode") as (params, run):
        started = time.perf_counter()
        result = encode_images(
            params.base.model,
            CLEAN,
            {"train": SPLIT / "train.csv", "val": SPLIT / "val.csv"},
            LATENTS,
            params.encode,
            revision=params.base.revision,
            unfinished=run.hold(CACHE / "encode"),  # DVC empties build/latents before each run
        )
        seconds = time.perf_counter() - started
        encoded = result.train + result.val - result.resumed_at
        costs = {"resumed_at": result.resumed_at, "images_per_second": encoded / seconds, "seconds": seconds}
        run.report({"train": result.train, "val": result.val}, costs)


if __name__ == "__main__":
    main()
