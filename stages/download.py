"""Download the images of `dataset.source` to build/raw."""

import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bestiary.data.listing import describe_left_out
from bestiary.data.local import take, take_others
from bestiary.files import dvc_cache
from bestiary.stage import stage
from bestiary.subjects import Subjects

RAW, OTHERS = Path("build/raw"), Path("build/others")


def main() -> None:
    with stage("download") as (params, run):
        started, dataset = time.perf_counter(), params.dataset
        data = Path(dataset.folder)
        subjects = Subjects.read(data.with_name("subjects.yaml"))
        if dataset.source == "folder" or dataset.sciencedb is None:
            taken = take(data, RAW, dataset.classes, dataset.images_per_class, dvc_cache, subjects)
            others = take_others(data, OTHERS, subjects, dvc_cache)
            for line in describe_left_out(taken.left_out):
                print(f"download: {line}", file=sys.stderr)
            if taken.renamed:
                print(f"download: {taken.renamed} files got names in {RAW} that suit every system.", file=sys.stderr)
            if taken.captioned:
                print(
                    f"download: captions from files: {taken.captioned} of {sum(taken.per_class.values())} images.",
                    file=sys.stderr,
                )
            per_class = taken.per_class
            found: dict[str, object] = {
                "renamed_files": taken.renamed,
                "left_out": dict(sorted(Counter(each.kind for each in taken.left_out).items())),
            }
        else:
            from bestiary.data.sciencedb import download  # its HTTP client is not needed for a folder

            subjects.check_without_others()
            downloaded = download(
                RAW,
                dataset.sciencedb,
                classes=dataset.classes,
                images_per_class=dataset.images_per_class,
                tell=lambda line: tqdm.write(f"download: {line}", file=sys.stderr),
            )
            for line in describe_left_out(downloaded.left_out):
                print(f"download: {line}", file=sys.stderr)
            per_class = downloaded.per_class
            subjects.check_known(per_class)
            subjects.write_to(RAW)
            others = take_others(data, OTHERS, subjects)  # writes the empty folder that DVC expects
            found = {key: value for key, value in asdict(downloaded).items() if key != "per_class"}
            found["left_out"] = dict(sorted(Counter(each.kind for each in downloaded.left_out).items()))
        seconds, images = time.perf_counter() - started, sum(per_class.values())
        fetched = {key: found.pop(key) for key in ("fetched_files",) if key in found}  # the others were in the cache
        results = {"source": dataset.source, "images": images, "classes": len(per_class)}
        costs = {"seconds": seconds, "images_per_second": images / seconds, **fetched}
        run.report(
            {**results, **found, "per_class": per_class, "others": others}, costs, headlines=("images", "classes")
        )


if __name__ == "__main__":
    main()
