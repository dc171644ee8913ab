import errno
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageOps
from support.settings import encode_settings
from support.tiny import CLASSES, manifests

from bestiary.data.images import open_rgb
from bestiary.diffusion.base import encode_text, load_text, load_vae
from bestiary.diffusion.encoding import (
    Augmentation,
    EncodingResult,
    aspect_ratio_sizes,
    augment,
    encode_images,
    prepare,
)
from bestiary.diffusion.latents import LatentCache
from bestiary.errors import BestiaryError
from bestiary.subjects import CAPTION_TEMPLATES


def pixels(path: Path) -> torch.Tensor:
    array = np.asarray(prepare(Image.open(path).convert("RGB"), 32, 32), dtype=np.float32)
    return torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_each_image_has_the_mean_and_deviation_that_the_autoencoder_gives(
    base: Path, pictures: Path, latents_folder: Path, split: str
) -> None:
    vae = load_vae(base)
    cache = LatentCache.open(latents_folder, split)
    assert cache.images["path"].tolist() == pd.read_csv(manifests(pictures)[split])["path"].tolist()
    for image, path in enumerate(cache.images["path"]):
        for variant, picture in enumerate([pixels(pictures / path), pixels(pictures / path).flip(3)]):
            posterior = vae.encode(picture).latent_dist
            mean, std = cache.posterior(image, variant)
            torch.testing.assert_close(mean, posterior.mean[0] * 0.18215, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std, posterior.std[0] * 0.18215, rtol=1e-4, atol=1e-5)


def test_an_oblong_picture_is_cropped_to_its_centre_square() -> None:
    picture = Image.new("RGB", (120, 60), "red")
    picture.paste("blue", (30, 0, 90, 60))
    assert (np.asarray(prepare(picture, 30, 30))[..., 2] > 200).all()


def test_every_caption_is_encoded_once_and_the_first_is_empty(base: Path, latents_folder: Path) -> None:
    cache = LatentCache.open(latents_folder, "train")
    assert cache.captions["caption"].tolist()[0] == ""
    assert "a photo of an antelope" in cache.captions["caption"].tolist()
    assert len(cache.features) == 1 + len(CLASSES) * len(CAPTION_TEMPLATES)
    assert all(len(cache.captions_of(name)) == len(CAPTION_TEMPLATES) for name in CLASSES)
    expected = encode_text(*load_text(base), cache.captions["caption"].tolist())
    torch.testing.assert_close(cache.features, expected)


def test_without_flip_there_is_one_variant(base: Path, pictures: Path, tmp_path: Path) -> None:
    encode_images(base, pictures, manifests(pictures), tmp_path, encode_settings(flip=False))
    assert LatentCache.open(tmp_path, "train").variants == 1


def test_encoding_again_gives_the_same_bytes(base: Path, pictures: Path, latents_folder: Path, tmp_path: Path) -> None:
    encode_images(base, pictures, manifests(pictures), tmp_path, encode_settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in latents_folder.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (latents_folder / path.name).read_bytes()


def test_other_captions_change_the_data_hash(
    base: Path, pictures: Path, latents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bestiary.subjects.CAPTION_TEMPLATES", (*CAPTION_TEMPLATES[1:], "an oil painting of {}"))
    encode_images(base, pictures, manifests(pictures), tmp_path, encode_settings())
    assert LatentCache.open(tmp_path, "train").data_sha256 != LatentCache.open(latents_folder, "train").data_sha256


def test_more_images_than_one_shard_holds_are_split_over_several(
    base: Path, pictures: Path, latents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bestiary.diffusion.encoding.SHARD_IMAGES", 4)
    encode_images(base, pictures, manifests(pictures), tmp_path, encode_settings())
    cache, whole = LatentCache.open(tmp_path, "train"), LatentCache.open(latents_folder, "train")
    assert [len(shard["mean"]) for shard in cache.shards] == [4, 4, 4, 3]
    for image in range(15):
        expected = whole.posterior(image, 1)[0]
        torch.testing.assert_close(cache.posterior(image, 1)[0], expected, rtol=1e-4, atol=1e-5)


def test_an_encoding_that_was_killed_resumes(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bestiary.diffusion.encoding.SHARD_IMAGES", 4)
    opened: list[Path] = []

    def open_some(path: Path) -> Image.Image:
        opened.append(path)
        if len(opened) == 10:
            raise KeyboardInterrupt
        return open_rgb(path)

    def encode(out: Path) -> EncodingResult:
        unfinished = tmp_path / "unfinished"
        return encode_images(base, pictures, manifests(pictures), out, encode_settings(), unfinished=unfinished)

    monkeypatch.setattr("bestiary.diffusion.encoding.open_rgb", open_some)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = len(opened)
    result = encode(tmp_path / "out")
    assert (result.train, result.val) == (15, 6)
    assert len(opened) - before == 21 - result.resumed_at < 21
    assert not list((tmp_path / "unfinished").iterdir())
    encode(tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_full_disk_behind_another_file_system_loses_no_encoded_image(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Path] = []

    def other_file_system(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def copy_some(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write_bytes(source.read_bytes())

    def encode() -> EncodingResult:
        out, unfinished = tmp_path / "out", tmp_path / "unfinished"
        return encode_images(base, pictures, manifests(pictures), out, encode_settings(), unfinished=unfinished)

    monkeypatch.setattr(Path, "hardlink_to", other_file_system)
    monkeypatch.setattr("shutil.copyfile", copy_some)
    with pytest.raises(OSError, match="No space left"):
        encode()
    result = encode()
    assert result.resumed_at == 21
    assert not list((tmp_path / "unfinished").iterdir())  # a copy takes the space twice
    assert len(list((tmp_path / "out").iterdir())) == len(copied) - 6


def test_augmented_variants_differ_and_stay_the_same_for_the_same_image(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    settings = encode_settings(augmented_variants=2, rotation_degrees=10, shift=0.05, zoom=0.1, brightness=0.1)
    for folder in ("first", "second"):
        encode_images(base, pictures, manifests(pictures), tmp_path / folder, settings)
    first, second = (LatentCache.open(tmp_path / folder, "train") for folder in ("first", "second"))
    assert first.variants == 4
    means = [first.posterior(0, variant)[0] for variant in range(4)]
    assert len({mean.numpy().tobytes() for mean in means}) == 4
    assert torch.equal(first.posterior(3, 3)[0], second.posterior(3, 3)[0])


def test_augmentation_with_limits_of_zero_only_mirrors(pictures: Path) -> None:
    picture = prepare(Image.open(pictures / "zebra" / "0.png"), 32, 32)
    unchanged = Augmentation(variants=1, rotation_degrees=0, shift=0, zoom=0, brightness=0)
    seen = {augment(picture, unchanged, np.random.default_rng(seed)).tobytes() for seed in range(8)}
    assert seen == {picture.tobytes(), ImageOps.mirror(picture).tobytes()}


def test_an_augmentation_moves_and_lights_the_picture() -> None:
    picture = Image.new("RGB", (64, 64), (100, 100, 100))
    lit = Augmentation(variants=1, rotation_degrees=0, shift=0, zoom=0, brightness=0.5)
    levels = [np.asarray(augment(picture, lit, np.random.default_rng(seed)))[5, 5, 0] for seed in range(20)]
    assert 50 <= min(levels) < 90
    assert 110 < max(levels) <= 150
    picture.paste((255, 0, 0), (28, 28, 36, 36))
    moved = Augmentation(variants=1, rotation_degrees=20, shift=0.2, zoom=0.3, brightness=0)
    result = np.asarray(augment(picture, moved, np.random.default_rng(1)))
    assert result.shape == (64, 64, 3)
    assert (result != np.asarray(picture)).any()


def test_buckets_hold_no_more_pixels_than_the_square() -> None:
    sizes = aspect_ratio_sizes(512, 64)
    assert sizes == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    assert all(width * height <= 768**2 for width, height in aspect_ratio_sizes(768, 64))


def test_with_buckets_an_oblong_picture_keeps_its_shape(base: Path, pictures: Path, tmp_path: Path) -> None:
    encode_images(base, pictures, manifests(pictures), tmp_path, encode_settings(aspect_ratio_buckets=True, flip=False))
    cache, vae = LatentCache.open(tmp_path, "train"), load_vae(base)
    assert sorted(cache.images["path"]) == sorted(pd.read_csv(pictures / "train.csv")["path"])
    assert set(cache.sizes) == {(8, 8), (6, 10)}  # 48 x 48 and 64 x 48 pixels at 32 x 32 and 40 x 24
    for image, path in enumerate(cache.images["path"]):
        shape = (40, 24) if int(Path(path).stem) % 2 else (32, 32)
        assert tuple(cache.images.loc[image, ["width", "height"]]) == shape
        array = np.asarray(prepare(open_rgb(pictures / path), *shape), dtype=np.float32)
        posterior = vae.encode(torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
        torch.testing.assert_close(cache.posterior(image, 0)[0], posterior.mean[0] * 0.18215, rtol=1e-4, atol=1e-5)


def test_an_oblong_picture_is_augmented_in_its_own_shape() -> None:
    picture = Image.new("RGB", (40, 24), (100, 100, 100))
    changed = augment(picture, Augmentation(1, 10, 0.05, 0.1, 0.0), np.random.default_rng(0))
    assert changed.size == (40, 24)
    assert np.asarray(changed).min() > 90  # edges are reflected, not black


@pytest.mark.parametrize(
    ("split", "kept", "named"),
    [
        ("train", [], "train split"),
        ("val", [], "val split"),
        ("train", ["zebra", "antelope"], "class ladybugs"),
    ],
)
def test_an_empty_split_or_class_is_named(
    base: Path, pictures: Path, tmp_path: Path, split: str, kept: list[str], named: str
) -> None:
    table = pd.read_csv(pictures / f"{split}.csv")
    table[table["class"].isin(kept)].to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(BestiaryError, match=named):
        encode_images(
            base, pictures, manifests(pictures) | {split: tmp_path / "less.csv"}, tmp_path / "out", encode_settings()
        )
    assert not (tmp_path / "out").exists()


def test_a_caption_that_is_too_long_is_rejected_before_any_image_is_read(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_csv(pictures / "train.csv")
    table.loc[table["class"] == "zebra", "class"] = "z" * 80
    table.to_csv(tmp_path / "train.csv", index=False)
    validation = pd.read_csv(pictures / "val.csv")
    validation[validation["class"] != "zebra"].to_csv(tmp_path / "val.csv", index=False)
    monkeypatch.setattr("bestiary.diffusion.encoding.open_rgb", lambda path: pytest.fail("an image was opened"))
    tables = {"train": tmp_path / "train.csv", "val": tmp_path / "val.csv"}
    with pytest.raises(BestiaryError, match=r"77: .*zzz"):
        encode_images(base, pictures, tables, tmp_path / "out", encode_settings())
    assert not (tmp_path / "out").exists()


def test_a_resolution_that_the_base_cannot_encode_is_rejected(base: Path, pictures: Path, tmp_path: Path) -> None:
    settings = encode_settings().model_copy(update={"resolution": 30})  # params.yaml itself takes multiples of 8 only
    with pytest.raises(BestiaryError, match=r"encode\.resolution is 30.* multiple of 4"):
        encode_images(base, pictures, manifests(pictures), tmp_path, settings)
