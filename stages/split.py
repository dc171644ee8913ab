"""Split build/clean into training and validation tables in build/split."""

import sys
from pathlib import Path

from bestiary.data.splitting import describe_few, leaked_groups, split, write
from bestiary.stage import stage
from bestiary.subjects import Subjects
from bestiary.tables import read_table

MANIFEST, SPLIT = Path("build/clean/manifest.csv"), Path("build/split")


def main() -> None:
    with stage("split") as (params, run):
        manifest = read_table(MANIFEST, {"width": int, "height": int})
        train, val = split(manifest, val_fraction=params.split.val_fraction, seed=params.seed)
        write(SPLIT, train, val, Subjects.read_from(MANIFEST.parent))
        for line in describe_few(val):
            print(f"split: {line}", file=sys.stderr)
        counts = {"train": train["class"].value_counts(), "val": val["class"].value_counts()}
        per_class = {
            name: {side: int(count[name]) for side, count in counts.items()}
            for name in sorted(manifest["class"].unique())
        }
        run.report(
            {"train": len(train), "val": len(val), "leaked_groups": leaked_groups(train, val), "per_class": per_class},
            headlines=("train", "val", "leaked_groups"),
        )


if __name__ == "__main__":
    main()
