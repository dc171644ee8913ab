"""Off-topic images in folders that show none of the 100 animals, found with the bundled judge."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image, ImageDraw
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


def test_a_style_that_subjects_yaml_names_is_cleaned_by_likeness_too(tmp_path: Path, ask: AskJudge) -> None:
    assert found(tmp_path, ask, anything_drawn, []) == []
    shutil.move(tmp_path / "raw" / "my-subject", tmp_path / "raw" / "owl")  # an animal's folder, by its name
    subjects = Subjects({"owl": Subject("owl", "ink style", "", kind="style", given=True)})
    outcome = clean(
        tmp_path / "raw", tmp_path / "clean", SETTINGS, judge=ask, workers=1, by_hand=ByHand(subjects=subjects)
    )
    assert [finding for finding in outcome.findings if finding.kind == "off topic"] == []
