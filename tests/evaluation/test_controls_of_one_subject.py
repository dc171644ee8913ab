"""Adapters of one subject that must not pass, on the bundled judge. Real pictures stand in for what they would draw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from support.registry import RULES, one_subject

from bestiary.data.images import open_rgb
from bestiary.evaluation.fidelity import SubjectPhotos, in_context
from bestiary.evaluation.judge import Judge
from bestiary.evaluation.scoring import Array, unit
from bestiary.registry.gate import decide

ROOT = Path(__file__).parents[2]
PIP = sorted((ROOT / "examples" / "pip" / "photos" / "pip").glob("*.jpg"))  # 16 photos
OTHERS = sorted((ROOT / "examples" / "pip" / "photos" / "other-penguins").glob("*.jpg"))  # 12 photos
PLAIN = sorted((ROOT / "samples" / "penguin").iterdir())  # without clothes
CONTEXTS: NDArray[np.int64] = np.repeat([0, 1], 4)  # a photo by night, a photo in the sun


def seen(judge: Judge, paths: Sequence[Path], brightness: Sequence[float] = ()) -> Array:
    """The judge's class tokens of the photos, each as bright as asked."""
    images: list[Image.Image] = [open_rgb(path).resize((64, 64)) for path in paths]
    if brightness:
        images = [ImageEnhance.Brightness(image).enhance(by) for image, by in zip(images, brightness, strict=True)]
    return unit(judge.class_tokens(images).double().numpy())


@pytest.fixture(scope="module")
def photos(judge: Judge) -> SubjectPhotos:
    return SubjectPhotos(
        training=seen(judge, PIP[:4]),
        held_out=seen(judge, PIP[4:8]),
        others=seen(judge, OTHERS[:6]),
        base_class=seen(judge, PLAIN[:8]),
    )


def gain(judge: Judge, photos: SubjectPhotos, drawn: Sequence[Path]) -> tuple[float, float]:
    """The gain in contexts of an adapter that draws `drawn` there, over a base that draws penguins without clothes."""
    light = [0.5] * 4 + [1.4] * 4
    adapter, plain, centre = (seen(judge, paths, light) for paths in (drawn, PLAIN[8:16], PLAIN[16:24]))
    found = in_context(adapter, plain, centre, CONTEXTS, photos, resamples=1000, seed=0).gain
    return 100 * found.ci95[0], 100 * found.ci95[1]


def reasons(gain: tuple[float, float]) -> list[str]:
    """Why the gate refuses an adapter that passes every other rule and follows prompts perfectly."""
    decision = decide(one_subject(in_context=gain, prompt=(0.0, 1.0)), RULES, None)
    return decision.reasons if decision.alias == "challenger" else []


def test_an_adapter_that_ignores_the_name_follows_prompts_and_is_caught_by_fidelity_in_context(
    judge: Judge, photos: SubjectPhotos
) -> None:
    shows_pip, ignores_the_name = (gain(judge, photos, drawn) for drawn in (PIP[8:16], PLAIN[24:32]))
    assert shows_pip[0] > 10
    assert reasons(shows_pip) == []
    assert ignores_the_name[0] < 0
    (reason,) = reasons(ignores_the_name)
    assert reason.startswith("It may ignore the name in new contexts")


def test_an_adapter_that_draws_exactly_what_the_base_draws_gains_nothing(judge: Judge, photos: SubjectPhotos) -> None:
    assert gain(judge, photos, PLAIN[8:16]) == (0, 0)
    assert len(reasons((0.0, 0.0))) == 1
