import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bestiary.errors import BestiaryError
from bestiary.settings import Settings, Usual, as_a1111, finish, read_settings

SETTINGS = Settings(
    prompt="a photo of a tiger, 老虎",
    seed=7,
    steps=15,
    guidance_scale=3.0,
    scheduler="dpmsolver++",
    resolution=64,
    base="./models/base",
    base_revision=None,
    adapter="models:/bestiary/3",
    adapter_sha256="0123456789abcdef",
)


def test_a_picture_carries_its_settings_and_gives_them_back(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    path.write_bytes(finish(Image.new("RGB", (64, 64)), SETTINGS))
    assert read_settings(path) == SETTINGS


def test_other_tools_find_the_settings_where_a1111_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    path.write_bytes(finish(Image.new("RGB", (64, 64)), SETTINGS))
    with Image.open(path) as image:
        assert image.info["parameters"] == as_a1111(SETTINGS)
    assert as_a1111(SETTINGS).startswith(
        "a photo of a tiger, 老虎\nSteps: 15, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 64x64, Model: base, "
        'Adapter: "models:/bestiary/3", Lora hashes: "bestiary: 0123456789ab", '
    )


def test_an_interval_of_guidance_is_told_and_given_back(tmp_path: Path) -> None:
    path, settings = tmp_path / "tiger.png", replace(SETTINGS, guidance_interval=(0.28, 5.42))
    path.write_bytes(finish(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert "CFG scale: 3, CFG interval: 0.28 to 5.42, Seed: 7" in as_a1111(settings)


def test_how_an_adapter_is_usually_drawn_survives_being_text_and_nonsense_does_not() -> None:
    usual = Usual("a {}", 5, 3, (0.5, 2), "ddim", 64)
    assert Usual.from_json(usual.to_json()) == usual
    for text in ("", "[]", '{"steps": "many"}', '{"scheduler": "magic"}', '{"template": "a photo"}'):
        with pytest.raises(ValueError):  # noqa: PT011
            Usual.from_json(text)


@pytest.mark.parametrize("control", ["contrast", "saturation", "brightness"])
def test_colour_controls_change_the_picture_and_one_leaves_it(tmp_path: Path, control: str) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    image.paste((200, 40, 40), (0, 0, 100, 100))
    plain, changed = tmp_path / "plain.png", tmp_path / "changed.png"
    plain.write_bytes(finish(image, SETTINGS))
    changed.write_bytes(finish(image, Settings(**{**vars(SETTINGS), control: 2.0})))
    with Image.open(plain) as left, Image.open(changed) as right:
        assert left.tobytes() == image.tobytes() != right.tobytes()


@pytest.mark.parametrize(
    ("content", "words"), [(b"no picture", "is no readable picture"), (None, "There is no picture"), (b"", "readable")]
)
def test_a_file_without_settings_is_said(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BestiaryError, match=words):
        read_settings(path)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"steps": 1', json.dumps(vars(SETTINGS) | {"steps": "many"})])
def test_settings_that_somebody_tampered_with_are_said(tmp_path: Path, text: str) -> None:
    about = PngInfo()
    about.add_text("bestiary", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=about)
    with pytest.raises(BestiaryError, match="does not carry the settings"):
        read_settings(tmp_path / "x.png")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -5},
        {"seed": 2**70},
        {"guidance_scale": math.inf},
        {"contrast": 1e308},
        {"resolution": 0},
        {"guidance_interval": (5.0, 1.0)},
    ],
)
def test_settings_that_nothing_could_draw_are_said(tmp_path: Path, change: dict[str, Any]) -> None:
    about = PngInfo()
    about.add_text("bestiary", json.dumps(asdict(SETTINGS) | change))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=about)
    with pytest.raises(BestiaryError, match="carries settings that cannot be drawn"):
        read_settings(tmp_path / "x.png")


def test_a_picture_from_elsewhere_is_said(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(BestiaryError, match="does not carry the settings"):
        read_settings(tmp_path / "x.png")
