import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bestiary.errors import BestiaryError
from bestiary.png_metadata import (
    AppliedAdapter,
    Colours,
    PictureSettings,
    StartImage,
    as_a1111,
    read_settings,
    write_png,
)
from bestiary.samplers import Sampling

SETTINGS = PictureSettings(
    prompt="a photo of a tiger, 老虎",
    seed=7,
    sampling=Sampling("dpmsolver++", steps=15, guidance_scale=3.0, width=64, height=64),
    base="./models/base",
    base_revision=None,
    adapter="models:/bestiary/3",
    adapter_sha256="0123456789abcdef",
)


def test_a_picture_carries_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), SETTINGS))
    assert read_settings(path) == SETTINGS


def test_the_settings_are_where_a1111_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), SETTINGS))
    with Image.open(path) as image:
        assert image.info["parameters"] == as_a1111(SETTINGS)
    assert as_a1111(SETTINGS).startswith(
        "a photo of a tiger, 老虎\nSteps: 15, Sampler: DPM++ 2M, CFG scale: 3, Seed: 7, Size: 64x64, Model: base, "
        'Adapter: "models:/bestiary/3", Lora hashes: "bestiary: 0123456789ab", '
    )


def test_a_guidance_interval_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    settings = replace(SETTINGS, sampling=replace(SETTINGS.sampling, guidance_interval=(0.28, 5.42)))
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert "CFG scale: 3, CFG interval: 0.28 to 5.42, Seed: 7" in as_a1111(settings)


def test_a_picture_that_is_not_square_gives_its_size_back(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    settings = replace(SETTINGS, sampling=replace(SETTINGS.sampling, width=96, adapter_weight=0.8))
    path.write_bytes(write_png(Image.new("RGB", (96, 64)), settings))
    assert read_settings(path) == settings
    assert "Size: 96x64" in as_a1111(settings)


def test_a_negative_prompt_has_its_own_line_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    settings = replace(SETTINGS, sampling=replace(SETTINGS.sampling, negative_prompt="blurry, 模糊"))
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert as_a1111(settings).startswith("a photo of a tiger, 老虎\nNegative prompt: blurry, 模糊\nSteps: 15, ")
    assert "negative_prompt" not in SETTINGS.to_dict()  # so that earlier pictures are drawn again to the byte


def test_a_weight_is_written_as_other_programs_read_it_and_1_is_not(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    settings = replace(SETTINGS, sampling=replace(SETTINGS.sampling, adapter_weight=0.8))
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert as_a1111(settings).startswith("a photo of a tiger, 老虎 <lora:bestiary:0.8>\nSteps: 15, ")
    assert 'Lora hashes: "bestiary: 0123456789ab"' in as_a1111(settings)
    assert "<lora:" not in as_a1111(SETTINGS)
    assert "adapter_weight" not in SETTINGS.to_dict()


def test_several_adapters_are_written_with_their_hashes_and_weights(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    stripes = AppliedAdapter("lora/stripes.safetensors", "fedcba9876543210", 0.5)
    twin = AppliedAdapter("other/stripes.safetensors", "00000000000000001", 1.0)
    settings = replace(SETTINGS, more_adapters=(stripes, twin))
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert settings.adapters == (AppliedAdapter("models:/bestiary/3", "0123456789abcdef", 1.0), stripes, twin)
    text = as_a1111(settings)
    assert text.startswith("a photo of a tiger, 老虎 <lora:bestiary-3:1> <lora:stripes:0.5> <lora:stripes-3:1>\n")
    assert 'Adapter: "models:/bestiary/3", Adapter 2: "lora/stripes.safetensors", Adapter 3: ' in text
    assert 'Lora hashes: "bestiary-3: 0123456789ab, stripes: fedcba987654, stripes-3: 000000000000"' in text


def test_the_image_that_a_picture_starts_from_is_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    settings = replace(SETTINGS, start=StartImage("89abcdef", 0.5))
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert ", Denoising strength: 0.5, " in as_a1111(settings)
    assert settings.to_dict() == SETTINGS.to_dict() | {"image_sha256": "89abcdef", "denoise": 0.5}
    assert (settings.drawn_steps, SETTINGS.drawn_steps) == (7, 15)


def test_how_the_prompt_was_read_is_written_only_where_it_matters(tmp_path: Path) -> None:
    path = tmp_path / "tiger.png"
    settings = replace(SETTINGS, prompt="a (tiger:1.3)", a1111_prompt=True)
    path.write_bytes(write_png(Image.new("RGB", (64, 64)), settings))
    assert read_settings(path) == settings
    assert settings.to_dict()["a1111_prompt"] is True
    assert "a1111_prompt" not in SETTINGS.to_dict()


def test_a_picture_written_by_the_first_version_can_still_be_read(tmp_path: Path) -> None:
    written = {
        "prompt": "a photo of a tiger",
        "seed": 7,
        "steps": 13,
        "guidance_scale": 7.0,
        "scheduler": "dpmsolver++sde",
        "resolution": 64,
        "base": "./models/base",
        "base_revision": None,
        "adapter": "models:/bestiary/1",
        "adapter_sha256": "0f01765d39dc6a24",
        "contrast": 1.0,
        "saturation": 1.0,
        "brightness": 1.0,
        "guidance_interval": [2.0, 1000.0],
    }
    metadata = PngInfo()
    metadata.add_text("bestiary", json.dumps(written))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=metadata)
    settings = read_settings(tmp_path / "x.png")
    assert settings.sampling == Sampling("dpmsolver++sde", 13, 7.0, (2.0, 1000.0), 64, 64)
    assert settings.to_dict() == written | {"guidance_interval": (2.0, 1000.0)}


@pytest.mark.parametrize("control", ["contrast", "saturation", "brightness"])
def test_a_colour_factor_changes_the_picture_and_1_leaves_it_alone(tmp_path: Path, control: str) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    image.paste((200, 40, 40), (0, 0, 100, 100))
    plain, changed = tmp_path / "plain.png", tmp_path / "changed.png"
    plain.write_bytes(write_png(image, SETTINGS))
    changed.write_bytes(write_png(image, replace(SETTINGS, colours=Colours(**{control: 2.0}))))
    with Image.open(plain) as left, Image.open(changed) as right:
        assert left.tobytes() == image.tobytes() != right.tobytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "not a readable PNG, JPEG or WebP"),
        (None, "does not exist"),
        (b"", "not a readable PNG, JPEG or WebP"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n",
            "not a readable PNG, JPEG or WebP",
        ),
    ],
)
def test_a_file_that_is_not_a_picture_is_refused_by_name(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BestiaryError, match=words) as error:
        read_settings(path)
    assert "x.png" in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        '{"steps": 1',
        json.dumps(SETTINGS.to_dict() | {"steps": "many"}),
        json.dumps(
            SETTINGS.to_dict() | {"more_adapters": [{"adapter": "x", "adapter_sha256": "0", "weight": 1.0, "rank": 4}]}
        ),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, text: str) -> None:
    metadata = PngInfo()
    metadata.add_text("bestiary", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=metadata)
    with pytest.raises(BestiaryError, match=r"x\.png contains no settings"):
        read_settings(tmp_path / "x.png")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -5},
        {"seed": 2**70},
        {"guidance_scale": math.inf},
        {"contrast": 1e308},
        {"resolution": 0},
        {"adapter_weight": -1.0},
        {"more_adapters": [{"adapter": "x", "adapter_sha256": "0", "weight": -1.0}]},
        {"more_adapters": [{"adapter": "x", "adapter_sha256": "0", "weight": 1.0}] * 8},
        {"guidance_interval": (5.0, 1.0)},
        {"image_sha256": "0"},
        {"denoise": 0.5},
        {"image_sha256": "0", "denoise": 0.0},
        {"image_sha256": "0", "denoise": 1.5},
    ],
)
def test_settings_outside_the_possible_ranges_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    metadata = PngInfo()
    metadata.add_text("bestiary", json.dumps(SETTINGS.to_dict() | change))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=metadata)
    with pytest.raises(BestiaryError, match=r"x\.png carries"):
        read_settings(tmp_path / "x.png")


def test_a_picture_without_settings_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(BestiaryError, match=r"x\.png contains no settings"):
        read_settings(tmp_path / "x.png")
