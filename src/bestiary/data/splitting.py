"""The images into training and validation: by class, groups never on both sides, nobody moves when images are added."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pandas as pd

from bestiary.data.folder import check_classes, replacing
from bestiary.errors import BestiaryError

TOLERANCE = 0.05  # how far a class's share may lie from the wanted one before its border moves


def split(manifest: pd.DataFrame, *, val_fraction: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The manifest's rows for training and for validation.

    A group (near-duplicates, images of one source) is drawn a number in [0, 1) from its name and the seed alone, and
    validates where that lies under `val_fraction`: so adding images moves nobody. Where that leaves a class more than
    5 points (or one image) off the wanted share, the class's own border moves, only as far as needed; and both sides
    of a class always get something.

    Raises BestiaryError where a class has nothing to divide.
    """
    check_classes(Counter(sorted(manifest["class"])), "the cleaned images")
    rows = manifest.sort_values("path", kind="stable").reset_index(drop=True)
    # A group that spans classes counts for the class of its first image: it has one number, and one side.
    groups = rows.groupby("group", sort=True).agg(home=("class", "first"), images=("path", "size"))
    groups["draw"] = [_draw(str(group), seed) for group in groups.index]
    validating: set[str] = set()
    for home, members in groups.sort_values("draw", kind="stable").groupby("home", sort=True):
        if len(members) < 2:
            raise BestiaryError(
                f"All images of {home} are near-duplicates of each other: none is left to validate with."
            )
        validating.update(members.index[: _border(members, val_fraction)])
    is_validation = rows["group"].isin(validating)
    _check_sides(rows, is_validation)
    return rows[~is_validation].reset_index(drop=True), rows[is_validation].reset_index(drop=True)


def _border(members: pd.DataFrame, val_fraction: float) -> int:
    """How many of the groups, in the order of their draws, validate."""
    images = members["images"].cumsum().to_numpy()
    total = int(images[-1])
    slack = max(TOLERANCE * total, 1.0)
    count = int((members["draw"] < val_fraction).sum())

    def off(count: int) -> float:
        return float(images[count - 1] if count else 0) - val_fraction * total

    while count > 0 and off(count) > slack:
        count -= 1
    while count < len(members) and off(count) < -slack and abs(off(count + 1)) < abs(off(count)):
        count += 1
    return min(max(count, 1), len(members) - 1)


def _draw(group: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_sides(rows: pd.DataFrame, is_validation: pd.Series[bool]) -> None:
    for name, sides in is_validation.groupby(rows["class"]):
        if sides.nunique() < 2:
            raise BestiaryError(
                f"The near-duplicates of {name} in other classes leave it on one side of the split only."
            )


def leaked_groups(train: pd.DataFrame, val: pd.DataFrame) -> int:
    """How many groups stand on both sides."""
    return len(set(train["group"]) & set(val["group"]))


def write(folder: Path, train: pd.DataFrame, val: pd.DataFrame) -> None:
    """Write train.csv and val.csv into `folder`, together or not at all."""
    with replacing(folder) as fresh:
        train.to_csv(fresh / "train.csv", index=False)
        val.to_csv(fresh / "val.csv", index=False)
