import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from bestiary.data.duplicates import compare, groups, neighbours
from bestiary.data.hashing import thumbnail


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(thumbnail(image), np.float32)[None]


def test_neighbours_are_the_pairs_within_the_radius() -> None:
    random = np.random.default_rng(0)
    left, right = (random.integers(0, 2**63, count, dtype=np.uint64) for count in (150, 70))
    right[:20] = left[:20] ^ np.uint64(0b111)
    expected = {(i, j) for i, a in enumerate(left) for j, b in enumerate(right) if bin(int(a) ^ int(b)).count("1") <= 3}
    assert set(map(tuple, neighbours(left, right, 3).tolist())) == expected
    assert expected >= {(index, index) for index in range(20)}
    half = neighbours(left, left, 26, half=True)
    assert {tuple(pair) for pair in half.tolist()} == {(i, j) for i, j in neighbours(left, left, 26).tolist() if i < j}


def test_an_empty_set_has_no_neighbours() -> None:
    nothing = np.empty(0, np.uint64)
    assert neighbours(nothing, nothing, 5).shape == (0, 2)


def test_groups_join_images_that_pairs_connect() -> None:
    numbers = groups(np.array([[0, 1], [1, 2], [4, 5]]), 6)
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[4] == numbers[5]
    assert len(set(numbers.tolist())) == 3


@pytest.mark.parametrize("box", [(0, 0, 160, 120), (8, 0, 160, 116), (6, 7, 150, 110)])
def test_a_copy_with_cropped_edges_is_the_same_picture(
    picture: Callable[..., Image.Image], box: tuple[int, int, int, int]
) -> None:
    whole = picture(1)
    assert compare(pixels(whole), pixels(whole.crop(box))).same.all()
    assert compare(pixels(whole.crop(box)), pixels(whole)).same.all()


def test_different_pictures_are_not_the_same(picture: Callable[..., Image.Image]) -> None:
    left = np.concatenate([pixels(picture(number)) for number in range(10)])
    right = np.concatenate([pixels(picture(number + 100)) for number in range(10)])
    assert not compare(left, right).same.any()


@pytest.mark.slow
def test_40000_hashes_are_grouped_in_a_minute() -> None:
    values = np.random.default_rng(0).integers(0, 2**63, 40_000, dtype=np.uint64)
    values[20_000:21_000] = values[:1_000]
    start = time.process_time()  # not wall time: other processes run as well
    found = groups(neighbours(values, values, 6, half=True), len(values))
    assert time.process_time() - start < 60
    assert (found[20_000:21_000] == found[:1_000]).all()
