"""Splitting the cleaned images into training and validation, class by class.

A group never lies on both sides, and images that are added later do not move those that are already there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pandas as pd

from bestiary.data.folder import check_classes, replacing
from bestiary.errors import BestiaryError
from bestiary.subjects import Subjects

FEW = 5  # validation images of a class below which the scores that compare with them hardly hold
TOLERANCE = 0.05  # how far a class's validation share may be from the wanted share before its threshold moves


def split(manifest: pd.DataFrame, *, val_fraction: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the manifest's rows for training and for validation.

    Every group (near-duplicates, images of one source) gets a number in [0, 1) from its name and the seed alone. Groups
    below `val_fraction` are for validation, so adding images moves no other image. If this leaves a class more than
    5 percentage points (or one image) off the wanted share, the class's own threshold moves, as little as possible.
    Every class has images on both sides.

    Raises BestiaryError when a class cannot be split.
    """
    check_classes(Counter(sorted(manifest["class"])), "after cleaning (reports/clean shows the rejected ones)")
    rows = manifest.sort_values("path", kind="stable").reset_index(drop=True)
    # A group with images of several classes counts for the class of its first image: it has one number and one side.
    groups = rows.groupby("group", sort=True).agg(home=("class", "first"), images=("path", "size"))
    groups["draw"] = [_draw(str(group), seed) for group in groups.index]
    validation_groups: set[str] = set()
    for home, members in groups.sort_values("draw", kind="stable").groupby("home", sort=True):
        if len(members) < 2:
            raise BestiaryError(
                f"All images of the class {home} are near-duplicates of each other, so none is left for validation. "
                "Add different images, or lower clean.near_duplicate_bits."
            )
        validation_groups.update(members.index[: _validation_count(members, val_fraction)])
    is_validation = rows["group"].isin(validation_groups)
    _check_sides(rows, is_validation)
    return rows[~is_validation].reset_index(drop=True), rows[is_validation].reset_index(drop=True)


def leaked_groups(train: pd.DataFrame, val: pd.DataFrame) -> int:
    """Return how many groups are on both sides.

    >>> leaked_groups(pd.DataFrame({"group": ["a", "b"]}), pd.DataFrame({"group": ["b", "c"]}))
    1
    """
    return len(set(train["group"]) & set(val["group"]))


def describe_few(val: pd.DataFrame) -> list[str]:
    """Say in a line which classes have so few validation images that the intervals of some scores mislead."""
    counts = val["class"].value_counts()
    few = counts[counts < FEW].sort_index()
    if few.empty:
        return []
    first, number = few.index[0], int(few.iloc[0])
    subject = f"{first} has {number} validation image{'s'[: number != 1]}"
    if len(few) > 1:
        subject = f"{len(few)} classes have few validation images: {subject}"
    return [
        f"{subject}, fewer than {FEW}. The validation loss and the scores that compare with real images depend on "
        "those few, and their intervals do not show how much other images would change them. Add images for figures to "
        "rely on."
    ]


def write(folder: Path, train: pd.DataFrame, val: pd.DataFrame, subjects: Subjects | None = None) -> None:
    """Write train.csv, val.csv and what `subjects` describes to `folder`, all or nothing."""
    with replacing(folder) as fresh:
        train.to_csv(fresh / "train.csv", index=False)
        val.to_csv(fresh / "val.csv", index=False)
        (subjects or Subjects()).write_to(fresh)


def _validation_count(members: pd.DataFrame, val_fraction: float) -> int:
    """Return how many of a class's groups, in the order of their numbers, are for validation."""
    images = members["images"].cumsum().to_numpy()
    total = int(images[-1])
    slack = max(TOLERANCE * total, 1.0)
    count = int((members["draw"] < val_fraction).sum())

    def excess(count: int) -> float:
        return float(images[count - 1] if count else 0) - val_fraction * total

    while count > 0 and excess(count) > slack:
        count -= 1
    while count < len(members) and excess(count) < -slack and abs(excess(count + 1)) < abs(excess(count)):
        count += 1
    return min(max(count, 1), len(members) - 1)


def _draw(group: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_sides(rows: pd.DataFrame, is_validation: pd.Series[bool]) -> None:
    for name, sides in is_validation.groupby(rows["class"]):
        if sides.nunique() < 2:
            raise BestiaryError(
                f"The class {name} has near-duplicates in other classes, so all its images are on one side of the "
                "split. Remove those near-duplicates, or add images."
            )
