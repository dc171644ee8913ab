"""One folder of images alone, from the folder to a trained adapter."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.settings import encode_settings
from support.training import run_training

from bestiary import params
from bestiary.data.cleaning import clean
from bestiary.data.local import take
from bestiary.data.splitting import split, write
from bestiary.diffusion.encoding import encode_images
from bestiary.diffusion.latents import Latents
from bestiary.subjects import Subject, Subjects

CLEAN = params.Clean(
    min_side=32,
    max_aspect_ratio=4.0,
    near_duplicate_bits=12,
    blank="quarantine",
    blurred="off",
    exposure="off",
    off_topic="off",
    off_topic_threshold=0.0,
)


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
    kept = clean(tmp_path / "raw", tmp_path / "clean", CLEAN, workers=1, subjects=subjects).manifest
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
