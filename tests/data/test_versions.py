from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from support.copies import KINDS, Found, photograph, plant_copies, score_copies

from bestiary.data.inspection import inspect_all
from bestiary.data.versions import VersionPair, find_versions

BITS = 12


def versions(raw: Path) -> tuple[list[str], list[VersionPair]]:
    paths = sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*"))
    return paths, find_versions(raw, inspect_all(raw, paths, workers=1), BITS)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Found], float]:
    raw = tmp_path_factory.mktemp("raw")
    planted = plant_copies(raw / "scenes", 2)
    paths, pairs = versions(raw)
    names = [Path(path).name for path in paths]
    taken = []
    for pair in pairs:
        worse = pair.second if pair.worse is None else pair.worse
        taken.append((names[worse], names[pair.first + pair.second - worse]))
    return score_copies(planted, taken)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_each_kind_are_found(found: tuple[Mapping[str, Found], float], kind: str) -> None:
    assert found[0][kind].planted == 2
    assert found[0][kind].recall >= KINDS[kind].recall


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.worse])
def test_no_original_is_worse_than_its_copy(found: tuple[Mapping[str, Found], float], kind: str) -> None:
    assert found[0][kind].originals_lost == 0


def test_no_picture_is_taken_for_another(found: tuple[Mapping[str, Found], float]) -> None:
    assert found[1] == 1.0


def test_a_small_version_does_not_win_because_the_large_one_has_a_frame(tmp_path: Path) -> None:
    image = photograph(3)
    (tmp_path / "scenes").mkdir()
    framed = Image.new("RGB", (image.width + 30, image.height + 30), "white")
    framed.paste(image, (15, 15))
    framed.save(tmp_path / "scenes" / "framed.jpg", quality=92)
    image.resize((image.width // 3, image.height // 3)).save(tmp_path / "scenes" / "small.jpg", quality=92)
    _, pairs = versions(tmp_path)
    assert [pair.worse for pair in pairs] == [1]


def test_a_crop_does_not_win_because_the_whole_has_a_flat_sky(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    image = photograph(5)
    image.paste("white", (0, 0, image.width, image.height // 10))
    image.save(tmp_path / "scenes" / "whole.jpg", quality=92)
    crop = image.crop((30, image.height // 10, image.width - 30, image.height - 10))
    crop.save(tmp_path / "scenes" / "crop.jpg", quality=92)
    _, pairs = versions(tmp_path)
    assert [pair.worse for pair in pairs] == [0]


def test_a_version_that_shows_more_is_better_than_a_sharper_crop(tmp_path: Path) -> None:
    image = photograph(4)
    (tmp_path / "scenes").mkdir()
    image.crop((20, 20, image.width - 20, image.height - 20)).save(tmp_path / "scenes" / "a.png")
    whole = image.resize((int(0.8 * image.width), int(0.8 * image.height)), Image.Resampling.LANCZOS)
    whole.save(tmp_path / "scenes" / "b.jpg", quality=90)
    _, pairs = versions(tmp_path)
    assert [pair.worse for pair in pairs] == [0]
