from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.data.splitting import TOLERANCE, describe_few, leaked_groups, split, write
from bestiary.errors import BestiaryError


def manifest(groups: dict[str, list[str]]) -> pd.DataFrame:
    """Make a manifest: for each class, the groups of its images."""
    rows = [
        {
            "path": f"{name}/{number} {group}.jpg",
            "class": name,
            "animal": name,
            "group": group,
            "width": 64,
            "height": 64,
        }
        for name, members in groups.items()
        for number, group in enumerate(members)
    ]
    return pd.DataFrame(rows).assign(sha256="0" * 64)


def singles(count: int, classes: int = 3) -> pd.DataFrame:
    return manifest({f"class{c}": [f"{c}-{n}" for n in range(count)] for c in range(classes)})


def sides(table: pd.DataFrame, seed: int = 0, val_fraction: float = 0.2) -> dict[str, str]:
    train, val = split(table, val_fraction=val_fraction, seed=seed)
    return {path: side for side, rows in (("train", train), ("val", val)) for path in rows["path"]}


classes = st.dictionaries(
    st.sampled_from(["cat", "dog", "owl", "pig"]),
    st.lists(st.integers(0, 60).map(str), min_size=2, max_size=80),
    min_size=2,
)


@settings(max_examples=60, deadline=None)
@given(groups=classes, val_fraction=st.floats(0.05, 0.6), seed=st.integers(0, 5))
def test_every_image_and_every_group_is_on_exactly_one_side(
    groups: dict[str, list[str]], val_fraction: float, seed: int
) -> None:
    table = manifest(groups)
    try:
        train, val = split(table, val_fraction=val_fraction, seed=seed)
    except BestiaryError:
        return  # no split keeps the groups whole
    assert sorted([*train["path"], *val["path"]]) == sorted(table["path"])
    assert leaked_groups(train, val) == 0
    assert set(train["class"]) == set(val["class"]) == set(table["class"])
    assert list(train.columns) == list(table.columns)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(10, 200), val_fraction=st.sampled_from([0.1, 0.2, 0.5]), seed=st.integers(0, 9))
def test_every_class_gets_its_validation_share(count: int, val_fraction: float, seed: int) -> None:
    _, val = split(singles(count), val_fraction=val_fraction, seed=seed)
    for number in val["class"].value_counts():
        assert abs(number - val_fraction * count) <= max(TOLERANCE * count, 1) + 1


@settings(max_examples=20, deadline=None)
@given(order=st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order_of_the_rows(order: object) -> None:
    table = singles(40)
    shuffled = table.sample(frac=1, random_state=order.randrange(2**31))  # type: ignore[attr-defined]
    assert sides(table) == sides(shuffled)


def test_the_seed_decides_the_split() -> None:
    table = singles(40)
    assert sides(table, seed=1) == sides(table, seed=1)
    assert sides(table, seed=1) != sides(table, seed=2)


@pytest.mark.parametrize("seed", range(5))
def test_no_image_changes_sides_when_images_and_classes_are_added(seed: int) -> None:
    before = sides(singles(400), seed)
    after = sides(singles(600, classes=5), seed)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("seed", range(5))
def test_in_small_classes_at_most_one_percent_of_images_change_sides(seed: int) -> None:
    before = sides(singles(40, classes=20), seed)
    after = sides(singles(45, classes=20), seed)
    assert sum(after[path] != side for path, side in before.items()) <= 0.01 * len(before)


def test_a_group_across_classes_stays_on_one_side() -> None:
    table = manifest({"cat": ["x", *map(str, range(20))], "owl": ["x", *map(str, range(30, 50))]})
    train, val = split(table, val_fraction=0.2, seed=0)
    assert leaked_groups(train, val) == 0


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"cat": ["a", "b"], "owl": ["c"]}, "owl has only one image"),
        ({"cat": ["a", "b", "c"]}, "cat has only 3 images after cleaning.*at least 4"),
        ({"cat": ["a"]}, "cat has only one image after cleaning.*at least 4"),
        ({"cat": ["a", "b"], "owl": ["c", "c", "c"]}, "class owl are near-duplicates"),
        ({}, "no images after cleaning"),
    ],
)
def test_a_class_that_cannot_be_split_is_named(groups: dict[str, list[str]], message: str) -> None:
    table = manifest(groups) if groups else singles(1).iloc[:0]
    with pytest.raises(BestiaryError, match=message):
        split(table, val_fraction=0.2, seed=0)


@pytest.mark.parametrize("groups", [["a", "b", "c", "d"], ["a", "a", "a", "b"], ["a", "b", "b", "b", "c", "c"]])
@pytest.mark.parametrize("seed", range(5))
def test_one_class_alone_keeps_an_image_for_validation_and_its_groups_whole(groups: list[str], seed: int) -> None:
    train, val = split(manifest({"my-cat": groups}), val_fraction=0.2, seed=seed)
    assert len(train) + len(val) == len(groups)
    assert len(train) >= 1
    assert len(val) >= 1
    assert leaked_groups(train, val) == 0


def test_few_validation_images_are_named_with_what_they_mean() -> None:
    assert describe_few(pd.DataFrame({"class": ["owl"] * 5})) == []
    (line,) = describe_few(pd.DataFrame({"class": ["owl"]}))
    assert line.startswith("owl has 1 validation image, fewer than 5. ")
    (line,) = describe_few(pd.DataFrame({"class": ["owl", "cat", "cat", *["pig"] * 9]}))
    assert line.startswith("2 classes have few validation images: cat has 2 validation images, fewer than 5. ")


def test_both_tables_are_written_with_all_columns(tmp_path: Path) -> None:
    table = singles(20)
    train, val = split(table, val_fraction=0.2, seed=0)
    write(tmp_path / "split", train, val)
    back = pd.concat(
        [pd.read_csv(tmp_path / "split" / f"{side}.csv", dtype={"sha256": str}) for side in ("train", "val")]
    )
    assert sorted(back["path"]) == sorted(table["path"])
    assert list(back.columns) == ["path", "class", "animal", "group", "width", "height", "sha256"]
