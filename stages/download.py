"""Download the images of `dataset.source` to build/raw."""

import time
from dataclasses import asdict
from pathlib import Path

from bestiary.data.folder import take
from bestiary.stage import stage

DATA, RAW = Path("data"), Path("build/raw")


def main() -> None:
    with stage("download") as (params, run):
        started, dataset = time.perf_counter(), params.dataset
        if dataset.source == "folder" or dataset.sciencedb is None:
            found = {"per_class": take(DATA, RAW, dataset.classes, dataset.images_per_class)}
        else:
            from bestiary.data.sciencedb import download  # its HTTP client is not needed for a folder

            downloaded = download(
                RAW, dataset.sciencedb, classes=dataset.classes, images_per_class=dataset.images_per_class
            )
            found = asdict(downloaded)
        per_class = found.pop("per_class")
        seconds, images = time.perf_counter() - started, sum(per_class.values())
        fetched = {key: found.pop(key) for key in ("fetched_files",) if key in found}  # the others were in the cache
        results = {"source": dataset.source, "images": images, "classes": len(per_class)}
        costs = {"seconds": seconds, "images_per_second": images / seconds, **fetched}
        run.report({**results, **found, "per_class": per_class}, costs, headlines=("images", "classes"))


if __name__ == "__main__":
    main()
