"""Off-topic images in folders that show none of the 100 animals, found with the bundled judge."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from support.settings import clean_settings

from bestiary.data.cleaning import ByHand, clean
from bestiary.data.findings import Finding
from bestiary.data.off_topic import AskJudge
from bestiary.evaluation.judge import Judge
from bestiary.subjects import Subject, Subjects

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

SETTINGS = clean_settings(
    near_duplicate_bits=0, off_topic="auto", off_topic_threshold=0.003, caption_without_name="keep"
)


@pytest.fixture(scope="module")
def ask(judge_folder: Path) -> AskJudge:
    judge = Judge.load(str(judge_folder))
    return AskJudge(
        lambda images, texts: judge.probabilities(images, texts).numpy(),
        lambda images: judge.image_features(images).numpy(),
    )


def thing(name: str) -> Callable[[int], Image.Image]:
    from world.things import render_thing

    return lambda seed: render_thing(name, seed, size=96)


def animal(name: str, style: Literal["drawing", "photo"] = "photo") -> Callable[[int], Image.Image]:
    from world.scenes import render

    return lambda seed: render(name, style, seed, size=96)


def anything_drawn(seed: int) -> Image.Image:
    """A drawing of any animal: a folder of one style has little else in common."""
    return animal(("owl", "shark", "bee", "zebra", "crab", "lion", "penguin")[seed % 7], "drawing")(seed)


def person(seed: int) -> Image.Image:
    """A figure like a person's, in another place, size and clothes each time."""
    dice = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), tuple(dice.integers(120, 255, 3).tolist()))
    pen, x, top, unit = ImageDraw.Draw(image), dice.uniform(30, 66), dice.uniform(8, 25), dice.uniform(9, 15)
    skin = tuple(dice.integers(90, 230, 3).tolist())
    pen.ellipse((x - unit, top, x + unit, top + 2 * unit), fill=skin)
    pen.rectangle((x - 1.3 * unit, top + 2 * unit, x + 1.3 * unit, 96), fill=tuple(dice.integers(0, 255, 3).tolist()))
    return image


def stick_figure(seed: int) -> Image.Image:
    """A person drawn in ink on paper, in another pose each time."""
    dice = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), (250, 248, 240))
    pen, x, top, head = ImageDraw.Draw(image), dice.uniform(36, 60), dice.uniform(8, 16), dice.uniform(8, 11)
    neck, hip = top + 2 * head, top + 2 * head + dice.uniform(24, 30)
    pen.ellipse((x - head, top, x + head, neck), outline="black", width=3)
    pen.line((x, neck, x, hip), fill="black", width=3)
    for side in (-1, 1):
        hand = (x + side * dice.uniform(14, 22), neck + dice.uniform(0, 22))
        foot = (x + side * dice.uniform(8, 16), hip + dice.uniform(20, 28))
        pen.line((x, neck + 6, *hand), fill="black", width=3)
        pen.line((x, hip, *foot), fill="black", width=3)
    return image


def outlines(seed: int) -> Image.Image:
    """Any animal in the style of a colouring book: the outlines of its drawing."""
    edges = ImageOps.grayscale(anything_drawn(seed)).filter(ImageFilter.FIND_EDGES)
    return ImageOps.invert(edges.point([0] * 41 + [255] * 215)).convert("RGB")


def found(
    tmp_path: Path, ask: AskJudge, draw: Callable[[int], Image.Image], others: list[Image.Image], policy: str = "auto"
) -> list[Finding]:
    """The off-topic findings in the folder my-subject of 12 pictures and `others`."""
    folder = tmp_path / "raw" / "my-subject"
    folder.mkdir(parents=True)
    for seed in range(12):
        draw(seed).save(folder / f"{seed:02}.png")
    for number, image in enumerate(others):
        image.save(folder / f"other{number}.png")
    settings = SETTINGS.model_copy(update={"off_topic": policy})
    return [
        finding
        for finding in clean(tmp_path / "raw", tmp_path / "clean", settings, judge=ask, workers=1).findings
        if finding.kind == "off topic"
    ]


@pytest.mark.parametrize(
    "draw",
    [thing("car"), thing("house"), thing("page of text"), person, animal("penguin"), anything_drawn],
    ids=["cars", "houses", "pages", "persons", "my penguin", "a style"],
)
def test_a_folder_of_one_kind_of_thing_loses_nothing(
    draw: Callable[[int], Image.Image], tmp_path: Path, ask: AskJudge
) -> None:
    assert found(tmp_path, ask, draw, [], "quarantine") == []


@pytest.mark.parametrize(
    ("draw", "other"),
    [(thing("car"), animal("owl")), (animal("penguin"), thing("house")), (thing("house"), animal("zebra"))],
    ids=["an owl among cars", "a house among penguins", "a zebra among houses"],
)
def test_an_outlier_is_found_by_its_likeness_to_the_folder_and_flagged(
    draw: Callable[[int], Image.Image], other: Callable[[int], Image.Image], tmp_path: Path, ask: AskJudge
) -> None:
    (finding,) = found(tmp_path, ask, draw, [other(99)])
    assert (finding.path, finding.action) == ("my-subject/other0.png", "flagged")
    assert finding.detail.startswith("likeness to its folder ")
    assert finding.score is not None
    assert 0.1 < finding.score <= 1


@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize(
    ("draw", "other"),
    [
        (thing("car"), animal("owl")),
        (thing("house"), thing("page of text")),
        (stick_figure, thing("car")),
        (outlines, thing("landscape")),
    ],
    ids=["objects", "more objects", "people-like drawings", "a style"],
)
def test_a_folder_loses_its_real_outlier_and_no_other_image(
    draw: Callable[[int], Image.Image],
    other: Callable[[int], Image.Image],
    count: int,
    tmp_path: Path,
    ask: AskJudge,
) -> None:
    folder = tmp_path / "raw" / "my-subject"
    folder.mkdir(parents=True)
    for number in range(count):
        draw(number).save(folder / f"{number:02}.png")
    other(99).save(folder / "other.png")
    settings = SETTINGS.model_copy(update={"off_topic": "quarantine"})
    outcome = clean(tmp_path / "raw", tmp_path / "clean", settings, judge=ask, workers=1)
    assert [(each.kind, each.path, each.action) for each in outcome.findings] == [
        ("off topic", "my-subject/other.png", "quarantined")
    ]
    assert len(outcome.manifest) == count


def test_a_style_that_subjects_yaml_names_is_cleaned_by_likeness_too(tmp_path: Path, ask: AskJudge) -> None:
    assert found(tmp_path, ask, anything_drawn, []) == []
    shutil.move(tmp_path / "raw" / "my-subject", tmp_path / "raw" / "owl")  # an animal's folder, by its name
    subjects = Subjects({"owl": Subject("owl", "ink style", "", kind="style", given=True)})
    outcome = clean(
        tmp_path / "raw", tmp_path / "clean", SETTINGS, judge=ask, workers=1, by_hand=ByHand(subjects=subjects)
    )
    assert [finding for finding in outcome.findings if finding.kind == "off topic"] == []
