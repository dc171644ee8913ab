from dataclasses import replace

import pytest
from PIL import Image

from bestiary.errors import BestiaryError
from bestiary.grids import Axis, Grid
from bestiary.png_metadata import AppliedAdapter, Colours, PictureSettings, StartImage
from bestiary.samplers import Sampling

SETTINGS = PictureSettings(
    prompt="a tiger",
    seed=7,
    sampling=Sampling("ddim", steps=4, guidance_scale=3.0, width=64, height=64),
    base="./models/base",
    base_revision=None,
    adapter="a",
    adapter_sha256="0",
    more_adapters=(AppliedAdapter("b", "1", 1.0), AppliedAdapter("c", "2", 1.0)),
    start=StartImage("3", 0.5),
)


def grid_of(*texts: str) -> Grid:
    grid = Grid.parse(texts)
    assert grid is not None
    return grid


def colours_of(image: Image.Image) -> dict[object, int]:
    """How many pixels have each colour."""
    return {colour: count for count, colour in image.getcolors(2**20) or []}


def test_columns_and_rows_have_every_combination() -> None:
    cells = grid_of("weight=0.4,1", "seed=1,2,3").cells(SETTINGS)
    assert [[(cell.sampling.adapter_weight, cell.seed) for cell in row] for row in cells] == [
        [(0.4, 1), (1.0, 1)],
        [(0.4, 2), (1.0, 2)],
        [(0.4, 3), (1.0, 3)],
    ]


def test_what_follows_from_the_weights_of_a_cell_comes_before_the_other_axes() -> None:
    def reweighted(settings: PictureSettings) -> PictureSettings:
        steps = 2 if settings.adapters[0].weight else 25
        return replace(settings, sampling=replace(settings.sampling, steps=steps))

    for axes in (("weight=0,1", "seed=1"), ("seed=1", "weight=0,1")):
        rows = grid_of(*axes).cells(SETTINGS, reweighted)
        assert [cell.sampling.steps for row in rows for cell in row] == [25, 2]
    ((cell,),) = grid_of("steps=9", "weight=0").cells(SETTINGS, reweighted)
    assert (cell.sampling.steps, cell.sampling.adapter_weight) == (9, 0)


def test_one_text_may_hold_both_axes_and_spaces() -> None:
    assert grid_of("weight=0.4, 1  seed = 1,2,3") == grid_of("weight=0.4,1", "seed=1,2,3")
    with pytest.raises(BestiaryError, match="two axes, not 3"):
        Grid.parse(["weight=0.4 seed=1 steps=2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weight2=0.5", replace(SETTINGS, more_adapters=(AppliedAdapter("b", "1", 0.5), SETTINGS.more_adapters[1]))),
        ("steps=9", replace(SETTINGS, sampling=replace(SETTINGS.sampling, steps=9))),
        ("guidance=1.5", replace(SETTINGS, sampling=replace(SETTINGS.sampling, guidance_scale=1.5))),
        ("scheduler=euler", replace(SETTINGS, sampling=replace(SETTINGS.sampling, sampler="euler"))),
        ("denoise=0.9", replace(SETTINGS, start=StartImage("3", 0.9))),
        ("seed=0", replace(SETTINGS, seed=0)),
    ],
)
def test_an_axis_changes_its_setting_and_no_other(text: str, expected: PictureSettings) -> None:
    assert grid_of(text).cells(SETTINGS) == [[expected]]


def test_the_sheet_shows_every_picture_with_labels() -> None:
    grid = grid_of("weight=0.4,0.75", "scheduler=ddim,euler")
    assert [axis.labels for axis in grid.axes] == [["weight 0.4", "weight 0.75"], ["scheduler ddim", "scheduler euler"]]
    colours = ("red", "lime", "blue", "yellow")
    pictures = [Image.new("RGB", (200, 160), colour) for colour in colours]
    sheet = grid.sheet([pictures[:2], pictures[2:]], SETTINGS)
    counts = colours_of(sheet)
    assert [counts[colour] for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))] == [200 * 160] * 4
    assert sheet.width > 400 + 2
    assert sheet.height > 400
    dark = grid.sheet([pictures[:2], pictures[2:]], replace(SETTINGS, colours=Colours(brightness=0.5)))
    assert colours_of(dark)[(127, 0, 0)] == 200 * 160


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["size=1,2"], "'?size=1,2'? is no axis of a grid. Write one of weight, weight2, seed"),
        (["weight"], "is no axis"),
        (["weight=0.4,,1"], "--grid weight: '' is not a number from 0 to 2"),
        (["weight=3"], "'3' is not a number from 0 to 2"),
        (["seed=1.5"], "'1.5' is not a number"),
        (["steps=0"], "'0' is not a number from 1 to 1000"),
        (["guidance=nan"], "'nan' is not a number"),
        (["denoise=0"], "'0' is not a number"),
        (["scheduler=foo"], "There is no sampler 'foo'"),
        (["seed=1", "seed=2"], "--grid seed is given twice"),
        (["seed=1", "steps=2", "weight=1"], "two axes, not 3"),
        ([f"seed={','.join(map(str, range(401)))}"], "may have at most 400 pictures"),
    ],
)
def test_what_is_no_grid_is_named(texts: list[str], words: str) -> None:
    with pytest.raises(BestiaryError, match=words):
        Grid.parse(texts)


def test_an_axis_without_effect_and_a_grid_too_large_are_refused() -> None:
    plain = replace(SETTINGS, adapter=None, adapter_sha256=None, more_adapters=(), start=None)
    for text, words in (("weight=1", "needs 1 adapter"), ("weight2=1", "2 adapters"), ("denoise=1", "--image")):
        with pytest.raises(BestiaryError, match=words):
            Axis.parse(text).applied(plain, 1.0)
    large = replace(SETTINGS, sampling=replace(SETTINGS.sampling, width=4096, height=4096))
    with pytest.raises(BestiaryError, match="268 megapixels"):
        grid_of(f"seed={','.join(map(str, range(17)))}").cells(large)
