"""Split build/clean into training and validation tables in build/split."""

from pathlib import Path

import pandas as pd

from bestiary.data.splitting import leaked_groups, split, write
from bestiary.stage import stage

MANIFEST, SPLIT = Path("build/clean/manifest.csv"), Path("build/split")
TEXT_COLUMNS = {"path": str, "class": str, "animal": str, "group": str, "sha256": str}


def main() -> None:
    with stage("split") as (params, run):
        manifest = pd.read_csv(MANIFEST, dtype=TEXT_COLUMNS, keep_default_na=False)
        train, val = split(manifest, val_fraction=params.split.val_fraction, seed=params.seed)
        write(SPLIT, train, val)
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
