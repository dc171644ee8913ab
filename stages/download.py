"""Bring the images that `dataset.source` names to build/raw."""

import time
from pathlib import Path
from typing import Any

from bestiary import params
from bestiary.data.folder import take
from bestiary.stage import stage

DATA, RAW = Path("data"), Path("build/raw")


def bring(dataset: params.Dataset) -> dict[str, Any]:
    """What the source gave, for the report."""
    if dataset.sciencedb is None or dataset.source == "folder":
        return {"per_class": take(DATA, RAW, dataset.classes, dataset.images_per_class)}
    from bestiary.data.sciencedb import download

    brought = download(RAW, dataset.sciencedb, classes=dataset.classes, images_per_class=dataset.images_per_class)
    return {
        "per_class": brought.per_class,
        "fetched_files": brought.fetched_files,
        "missing_files": brought.missing_files,
        "missing_classes": brought.missing_classes,
        "unknown_classes": brought.unknown_classes,
        "refused": brought.refused,
    }


def main() -> None:
    with stage("download") as (params, run):
        started = time.perf_counter()
        brought = bring(params.dataset)
        seconds = time.perf_counter() - started
        counts = brought.pop("per_class")
        images = sum(counts.values())
        result = {"source": params.dataset.source, "images": images, "classes": len(counts), **brought}
        run.report({**result, "seconds": seconds, "images_per_second": images / seconds, "per_class": counts})


if __name__ == "__main__":
    main()
