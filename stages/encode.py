"""Encode stage: every image through the autoencoder once, every caption through the text encoder once."""

import time
from pathlib import Path

from bestiary.diffusion.latents import Augmentation, encode_images
from bestiary.stage import CACHE, stage

with stage("encode") as (params, run):
    started, encode = time.perf_counter(), params.encode
    counts = encode_images(
        params.base.model,
        Path("build/clean"),
        {"train": Path("build/split/train.csv"), "val": Path("build/split/val.csv")},
        Path("build/latents"),
        resolution=encode.resolution,
        flip=encode.flip,
        batch_size=encode.batch_size,
        augmentation=Augmentation(
            encode.augmented_variants, encode.rotation_degrees, encode.shift, encode.zoom, encode.brightness
        ),
        aspect_ratio_buckets=encode.aspect_ratio_buckets,
        revision=params.base.revision,
        unfinished=run.hold(CACHE / "encode"),  # DVC empties build/latents before each run
    )
    seconds = time.perf_counter() - started
    encoded = counts["train"] + counts["val"] - counts["resumed_at"]
    run.report({**counts, "images_per_second": encoded / seconds, "seconds": seconds})
