"""Captions that a captioning model writes, with a tiny random model of BLIP's kind."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from support.captioners import build_blip
from support.settings import clean_settings

from bestiary import captioning
from bestiary.captioning import BEAMS, MAX_TOKENS, Captioner, find_uncaptioned, write_captions
from bestiary.cli import cli
from bestiary.data.cleaning import clean
from bestiary.data.listing import list_images
from bestiary.data.local import take
from bestiary.errors import BestiaryError
from bestiary.params import load_params

ROOT = Path(__file__).parents[1]
HUB_ID, COMMIT = "Salesforce/blip-image-captioning-base", "82a37760796d32b1411fe092ab5d4e227313294b"


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip(tmp_path_factory.mktemp("captioner") / "blip")


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.NEAREST)


def photos(folder: Path, names: Sequence[str]) -> Path:
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        picture(seed).save(folder / name)
    return folder


def colour(images: Sequence[Image.Image]) -> list[str]:
    """A description that a test can foretell."""
    return [f"red {np.asarray(image)[0, 0, 0]}" for image in images]


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def uncaptioned(data: Path) -> list[str]:
    listing = list_images(data)
    return [image.name for image in find_uncaptioned(listing, listing.images).images]


def test_images_are_described_as_transformers_describes_each_alone(blip: Path) -> None:
    from transformers import BertTokenizerFast, BlipForConditionalGeneration
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    pictures = [picture(seed) for seed in range(5)]
    model, tokenizer = BlipForConditionalGeneration.from_pretrained(blip), BertTokenizerFast.from_pretrained(blip)
    processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    expected = []
    for image in pictures:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixel_values=pixels, num_beams=BEAMS, max_new_tokens=MAX_TOKENS)
        expected.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    assert len(set(expected)) == 5
    assert Captioner.load(blip).describe(pictures) == expected


def test_each_image_without_a_caption_gets_a_file_and_none_is_overwritten(tmp_path: Path) -> None:
    data = photos(tmp_path / "data" / "猫 🐈", ["1.png", "2.png", "3.png", "4.png", "5.png", "5.jpg", "a.b.png"]).parent
    (data / "猫 🐈" / "1.txt").write_text("mine")
    (data / "猫 🐈" / "2.caption").write_text("mine too")
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "猫 🐈/3.png", "text": "mine, three"}))
    assert uncaptioned(data) == ["4.png", "5.jpg", "a.b.png"]
    images = find_uncaptioned(list_images(data), list_images(data).images).images
    written = dict(write_captions(images, colour))
    assert {path.name: text for path, text in written.items()} == {
        name: colour([Image.open(data / "猫 🐈" / image)])[0]
        for name, image in (("4.txt", "4.png"), ("5.txt", "5.jpg"), ("a.b.txt", "a.b.png"))
    }
    assert texts(data) == {
        "猫 🐈/1.txt": "mine",
        **{path.relative_to(data).as_posix(): f"{text}\n" for path, text in written.items()},
    }
    assert uncaptioned(data) == []  # 5.png shares 5.txt with 5.jpg


def test_an_image_without_a_place_for_its_caption_is_named(tmp_path: Path) -> None:
    data = photos(tmp_path / "data" / "cat", ["1.png", "1.jpg", "2.png"]).parent
    (data / "cat" / "metadata.csv").write_text("file_name,text\n1.jpg,a cat\n")  # 1.txt would give it a second caption
    (data / "cat" / "2.png").rename(data / "cat" / "photo.txt")  # known as an image by its first bytes
    listing = list_images(data)
    found = find_uncaptioned(listing, listing.images)
    assert found.images == []
    assert [image.name for image in found.without_place] == ["1.png", "photo.txt"]


def test_an_interrupted_run_leaves_whole_files_and_describes_only_the_others_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captioning, "BATCH_SIZE", 2)
    data = photos(tmp_path / "data" / "cat", [f"{number}.png" for number in range(5)]).parent
    described: list[int] = []

    def describe(images: Sequence[Image.Image]) -> list[str]:
        if len(described) == 1:
            described.append(0)
            raise KeyboardInterrupt
        described.append(len(images))
        return colour(images)

    images = list_images(data).images["cat"]
    with pytest.raises(KeyboardInterrupt):
        list(write_captions(images, describe))
    assert list(texts(data)) == ["cat/0.txt", "cat/1.txt"]
    assert uncaptioned(data) == ["2.png", "3.png", "4.png"]
    list(write_captions([data / "cat" / name for name in uncaptioned(data)], describe))
    assert described == [2, 0, 2, 1]
    assert texts(data) == {f"cat/{number}.txt": f"{colour([picture(number)])[0]}\n" for number in range(5)}


def test_an_image_that_gets_no_caption_is_named_and_the_others_get_theirs(tmp_path: Path) -> None:
    data = photos(tmp_path / "data" / "cat", ["0.png", "1.png", "2.png"]).parent
    (data / "cat" / "0.png").write_bytes(b"no image")

    def describe(images: Sequence[Image.Image]) -> list[str]:
        (data / "cat" / "2.txt").write_text("mine")
        return ["", "red"]

    told = {path.name: text for path, text in write_captions(list_images(data).images["cat"], describe)}
    assert "the image cannot be read" in told["0.png"]
    assert "found no words" in told["1.png"]
    assert told["2.txt"].startswith("not overwritten")
    assert texts(data) == {"cat/2.txt": "mine"}


@pytest.fixture
def photo_project(blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose captioning model is the tiny one, with photos of one subject in data/."""
    root = tmp_path / "project"
    photos(root / "data" / "my-cat", [f"{number}.png" for number in range(4)])
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content["profiles"]["sample"]["captioner"] = {"model": "models/blip", "revision": None}
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    (root / "models").mkdir()
    (root / "models" / "blip").symlink_to(blip)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    return root


def captions(*options: str) -> list[str]:
    return CliRunner().invoke(cli, ["captions", *options], catch_exceptions=False).stdout.splitlines()


def test_the_command_writes_captions_that_cleaning_puts_the_name_in(photo_project: Path, blip: Path) -> None:
    (photo_project / "data" / "my-cat" / "0.txt").write_text("my cat, asleep")
    told = captions("--write")
    expected = Captioner.load(blip).describe([picture(seed) for seed in range(1, 4)])
    assert told[:3] == [f"project/data/my-cat/{number}.txt  {text}" for number, text in enumerate(expected, start=1)]
    assert "Cleaning puts them in front (clean.caption_without_name)" in told[3]
    assert "`dvc add data`" in told[4]
    (photo_project / "data" / "my-cat" / "1.txt").write_text("my cat in the snow")  # edited by hand
    assert captions("--write") == ["No image in project/data lacks a caption."]
    take(photo_project / "data", photo_project / "raw", None, None)
    manifest = clean(photo_project / "raw", photo_project / "clean", clean_settings(), workers=1).manifest
    assert dict(zip(manifest["path"], manifest["caption"], strict=True)) == {
        "my-cat/0.png": "my cat, asleep",
        "my-cat/1.png": "my cat in the snow",
        "my-cat/2.png": f"my cat, {expected[1]}",
        "my-cat/3.png": f"my cat, {expected[2]}",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captioner": None}, r"profiles\.sample\.captioner in params\.yaml is empty"),
        ({"captioner": {"model": "models/none", "revision": None}}, r"models/none does not exist"),
        ({"captioner": {"model": HUB_ID, "revision": None}}, r"base is not pinned.*captioner\.revision"),
        ({"captioner": {"model": HUB_ID, "revision": "main"}}, r"base is not pinned.*captioner\.revision"),
        ({"dataset": {"source": "sciencedb"}}, r"dataset\.source is sciencedb"),
    ],
)
def test_what_the_command_cannot_work_with_is_named_and_nothing_is_written(
    photo_project: Path, changes: dict[str, object], message: str
) -> None:
    content = yaml.safe_load((photo_project / "params.yaml").read_text())
    content["profiles"]["sample"].update(changes)
    if "dataset" in changes:
        content["profiles"]["sample"]["dataset"] = content["profiles"]["sciencedb"]["dataset"]
    (photo_project / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(BestiaryError, match=message):
        captions("--write")
    assert texts(photo_project / "data") == {}


def test_captions_are_not_written_where_dvc_would_delete_them(photo_project: Path) -> None:
    shutil.copyfile(ROOT / "data.dvc", photo_project / "data.dvc")
    with pytest.raises(BestiaryError, match=r"is an import \(data\.dvc\).*rm data\.dvc && dvc add data"):
        captions("--write")
    assert texts(photo_project / "data") == {}


def test_the_command_loads_no_model_if_captions_cannot_be_written(
    photo_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (photo_project / "models" / "blip").unlink()
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(BestiaryError, match=r"my-cat cannot be written .* writable disk"):
        captions("--write")


def test_a_model_that_cannot_caption_or_is_damaged_is_named(blip: Path, judge_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"judge is of the kind clip\. Choose one of the kind blip or git"):
        Captioner.load(judge_folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BestiaryError, match="empty cannot be loaded"):
        Captioner.load(tmp_path / "empty")
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(blip, tmp_path / "broken"))
    weights = load_file(blip / "model.safetensors")
    del weights["vision_model.post_layernorm.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(BestiaryError, match=r"is incomplete: it has no vision_model\.post_layernorm\.weight"):
        Captioner.load(broken)


def test_a_model_on_the_hub_is_loaded_at_its_commit_from_either_kind_of_weights(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from safetensors.torch import load_file

    snapshot = Path(shutil.copytree(blip, tmp_path / "snapshot"))
    (snapshot / "model.safetensors").unlink()  # the hub's BLIP has only pytorch_model.bin
    asked: list[tuple[str, str, str]] = []

    def download(model: str, *, revision: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise FileNotFoundError
        asked.append((model, revision, allow_patterns[-1]))
        if allow_patterns[-1] == "pytorch_model*.bin":
            torch.save(load_file(blip / "model.safetensors"), snapshot / "pytorch_model.bin")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Captioner.load(HUB_ID, COMMIT).describe([picture(0)]) == Captioner.load(blip).describe([picture(0)])
    assert asked == [(HUB_ID, COMMIT, "model*.safetensors"), (HUB_ID, COMMIT, "pytorch_model*.bin")]

    def fail(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BestiaryError, match="cannot be downloaded"):
        Captioner.load(HUB_ID, COMMIT)


def test_the_real_profile_has_a_pinned_captioner_and_the_sample_none(tmp_path: Path) -> None:
    assert load_params(ROOT / "params.yaml").captioner is None
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("profile: sample", "profile: sciencedb", 1)
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    captioner = load_params(tmp_path / "params.yaml").captioner
    assert captioner
    assert (captioner.model, captioner.revision) == (HUB_ID, COMMIT)
