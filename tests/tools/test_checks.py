"""The checks in the bundled models' card tell good models from bad ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from bestiary.diffusion.base import load_pipeline
from bestiary.evaluation.judge import Judge
from world import checks
from world.pictures import PLACES

ROOT = Path(__file__).parents[2]


class Reader:
    """A judge of pictures whose red value is the number of the place; texts come in the order of the places."""

    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        reds = [cast(tuple[int, int, int], image.getpixel((0, 0)))[0] for image in images]
        return torch.eye(len(PLACES))[torch.tensor(reds)]

    def text_features(self, texts: list[str]) -> torch.Tensor:
        assert len(texts) == len(PLACES)
        return torch.eye(len(PLACES))


def flat(red: int) -> Image.Image:
    return Image.new("RGB", (1, 1), (red, 0, 0))


def test_places_named_is_the_share_of_right_places() -> None:
    judge = cast(Judge, Reader())
    right = [flat(i) for _ in checks.KNOWN for i in range(len(PLACES))]
    assert checks.places_named(judge, right, "a photo of {}") == pytest.approx(1.0)
    always_first = [flat(0) for _ in right]
    assert checks.places_named(judge, always_first, "a photo of {}") == pytest.approx(1 / len(PLACES))


def test_a_place_prompt_names_animal_and_place() -> None:
    prompts = checks.place_prompts("ladybugs", "a drawing of {}")
    assert prompts[PLACES.index("snow")] == "a drawing of a ladybug in the snow"
    assert len(set(prompts)) == len(PLACES)


def test_a_faithful_vae_keeps_the_scarfs_colour() -> None:
    class Faithful:
        def encode(self, pixels: torch.Tensor) -> Any:
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))

        def decode(self, latents: torch.Tensor) -> Any:
            return SimpleNamespace(sample=latents)

    before, after = checks.scarf_colours(cast(Any, Faithful()))
    assert after == pytest.approx(before, abs=0.01)
    assert before[0] > 180
    assert max(before[1:]) < 60


def test_an_invented_name_changes_the_bundled_bases_text_features() -> None:
    changes = checks.name_changes(load_pipeline(str(ROOT / "models" / "base")))
    assert set(changes) == set(checks.NAMES)
    assert 0.2 < changes["sks"] < 1
