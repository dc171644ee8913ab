"""One folder of images alone, from the folder to a trained adapter."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.settings import clean_settings, encode_settings, train_settings
from support.training import run_training

from bestiary.data.cleaning import ByHand, clean
from bestiary.data.local import take
from bestiary.data.splitting import split, write
from bestiary.diffusion.batches import TrainingStream
from bestiary.diffusion.encoding import caption_versions, encode_images
from bestiary.diffusion.latents import Latents
from bestiary.errors import BestiaryError
from bestiary.subjects import THING_TEMPLATES, Subject, Subjects, caption, subject_of

CLEAN = clean_settings(blank="quarantine")


def photos(folder: Path, count: int) -> None:
    """Random pictures that are no near-duplicates of each other."""
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{number}.png")


@pytest.mark.parametrize("count", [4, 12])
def test_one_folder_alone_is_taken_cleaned_split_encoded_and_trained(count: int, base: Path, tmp_path: Path) -> None:
    photos(tmp_path / "data" / "my-cat", count)
    subjects = Subjects({"my-cat": Subject("my-cat", "sks cat", "", class_word="cat", given=True)})
    assert take(tmp_path / "data", tmp_path / "raw", None, None).per_class == {"my-cat": count}
    kept = clean(tmp_path / "raw", tmp_path / "clean", CLEAN, workers=1, by_hand=ByHand(subjects=subjects)).manifest
    train, val = split(kept, val_fraction=0.2, seed=0)
    assert (len(kept), len(val)) == (count, {4: 1, 12: 2}[count])
    write(tmp_path / "split", train, val)
    tables = {side: tmp_path / "split" / f"{side}.csv" for side in ("train", "val")}
    encode_images(base, tmp_path / "clean", tables, tmp_path / "latents", encode_settings())
    latents = Latents.open(tmp_path / "latents")
    assert latents.training.captions["caption"].tolist()[:2] == ["", "a photo of sks cat"]
    assert latents.subjects == subjects
    result, _ = run_training(base, latents)
    assert result.steps == 8
    assert result.val_loss < float("inf")


def captioned(base: Path, tmp_path: Path, **changes: object) -> Latents:
    """Encode a folder of four photos, of which three have captions of tags."""
    photos(tmp_path / "data" / "my-cat", 4)
    for number in range(3):
        (tmp_path / "data" / "my-cat" / f"{number}.txt").write_text(f"my cat, {number}, a, b, c, d")
    take(tmp_path / "data", tmp_path / "raw", None, None)
    train, val = split(clean(tmp_path / "raw", tmp_path / "clean", CLEAN, workers=1).manifest, val_fraction=0.2, seed=0)
    write(tmp_path / "split", train, val)
    tables = {side: tmp_path / "split" / f"{side}.csv" for side in ("train", "val")}
    encode_images(base, tmp_path / "clean", tables, tmp_path / "latents", encode_settings(**changes))
    return Latents.open(tmp_path / "latents")


def captions_by_path(latents: Latents) -> dict[str, list[str]]:
    return {
        path: cache.captions["caption"][captions].tolist()
        for cache in (latents.training, latents.validation)
        for path, captions in zip(cache.images["path"], cache.captions_by_image(), strict=True)
    }


def test_a_caption_from_a_file_wins_over_the_templates(base: Path, tmp_path: Path) -> None:
    latents = captioned(base, tmp_path)
    shown = captions_by_path(latents)
    assert [shown[f"my-cat/{number}.png"] for number in range(3)] == [
        [f"my cat, {number}, a, b, c, d"] for number in range(3)
    ]
    assert shown["my-cat/3.png"] == [caption(subject_of("my-cat"), template) for template in THING_TEMPLATES]
    stream = TrainingStream(
        latents.training, train_settings(caption_dropout=0.0), seed=0, timestep_weights=torch.ones(1000)
    )
    for position in range(12):
        used = latents.training.captions["caption"][int(stream[position]["captions"])]
        assert used in shown[latents.training.images["path"][stream.image_at(position)]]


def test_tags_are_shuffled_and_dropped_but_for_the_first_ones(base: Path, tmp_path: Path) -> None:
    latents = captioned(base, tmp_path, shuffle_tags=True, keep_tags=2, tag_dropout=0.3, caption_variants=20)
    versions = captions_by_path(latents)["my-cat/1.png"]
    assert len(versions) == 20
    assert len(set(versions)) > 10
    for version in versions:
        first, second, *others = version.split(", ")
        assert (first, second) == ("my cat", "1")
        assert set(others) <= set("abcd")
        assert len(set(others)) == len(others)
    assert sum(len(version.split(", ")) - 2 for version in versions) / 80 == pytest.approx(0.7, abs=0.15)


def test_shuffling_alone_keeps_all_tags_and_dropping_alone_their_order() -> None:
    shuffled = caption_versions("a, b, c, d", "0", encode_settings(shuffle_tags=True, keep_tags=0))
    assert {tuple(sorted(version.split(", "))) for version in shuffled} == {("a", "b", "c", "d")}
    dropped = caption_versions("a, b, c, d", "0", encode_settings(tag_dropout=0.5))
    assert all(version.split(", ") == sorted(version.split(", ")) for version in dropped)
    assert caption_versions("a, b", "0", encode_settings()) == ["a, b"]
    assert caption_versions("", "0", encode_settings(tag_dropout=0.5)) == [""] * 8


def test_images_that_are_all_the_same_are_named_before_training(tmp_path: Path) -> None:
    photos(tmp_path / "raw" / "my-cat", 1)
    for number in range(1, 6):
        shutil.copyfile(tmp_path / "raw" / "my-cat" / "0.png", tmp_path / "raw" / "my-cat" / f"{number}.png")
    said: list[str] = []
    manifest = clean(tmp_path / "raw", tmp_path / "clean", CLEAN, workers=1, tell=said.append).manifest
    assert said[0].startswith("my-cat lost 5 of 6 images (5 exact duplicates)")
    with pytest.raises(BestiaryError, match=r"my-cat has only one image after cleaning.* at least 4"):
        split(manifest, val_fraction=0.2, seed=0)


def test_a_name_that_the_base_cannot_read_is_refused_before_any_image_is_encoded(base: Path, tmp_path: Path) -> None:
    photos(tmp_path / "clean" / "mug", 4)
    subjects = Subjects({"mug": Subject("mug", "sks" * 33, "", given=True)})  # a token for each letter here
    subjects.write_to(tmp_path / "clean")
    rows = pd.DataFrame([{"path": "mug/0.png", "class": "mug", "sha256": "0", "width": 64, "height": 64}])
    rows.to_csv(tmp_path / "all.csv", index=False)
    with pytest.raises(BestiaryError, match=r"tokens and the base reads 77.*sks"):
        encode_images(
            base,
            tmp_path / "clean",
            {"train": tmp_path / "all.csv", "val": tmp_path / "all.csv"},
            tmp_path / "latents",
            encode_settings(),
        )
    assert not (tmp_path / "latents").exists()
