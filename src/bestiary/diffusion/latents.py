"""What training reads: each image's latent distribution and each caption's features, computed once and kept on disk.

The cache is a folder:
- `<split>-00000.safetensors` ...: `mean` and `std` (B, V, C, h, w) of the autoencoder's posterior, unscaled, for V
  variants of images of one size
- `images.csv`: the split, path, class, sha256, width and height of each image, in the order of the shards
- `captions.safetensors`: `features` (B, T, D); `captions.csv`: the class and caption of each, the empty caption first
- `latents.json`: what it was made from
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageEnhance, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

from bestiary.data.images import open_rgb
from bestiary.diffusion.base import (
    base_sha256,
    device_and_dtype,
    encode_text,
    load_text,
    load_vae,
    processes,
    size_factors,
)
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically
from bestiary.subjects import CAPTION_TEMPLATES, caption, subject_of

SHARD_IMAGES = 256
IMAGES = Path(__file__).parents[1] / "data" / "images.py"
SPLITS = ("train", "val")
MAX_ASPECT_RATIO = 2.0  # of a bucket; longer pictures lose their ends


@dataclass(frozen=True)
class Augmentation:
    """How far the changed variants of an image go, each by chance up to these bounds."""

    variants: int
    rotation_degrees: float
    shift: float  # of the side
    zoom: float  # of the side, inwards
    brightness: float  # of the brightness


NO_AUGMENTATION = Augmentation(variants=0, rotation_degrees=0, shift=0, zoom=0, brightness=0)


@dataclass(frozen=True)
class LatentCache:
    """One split of a cache on disk, memory-mapped."""

    images: pd.DataFrame  # path, class, sha256, width, height
    captions: pd.DataFrame  # class, caption
    features: torch.Tensor  # (captions, T, D)
    scaling_factor: float
    base_sha256: str
    data_sha256: str  # over the images of both splits, their captions and how they were encoded
    shards: list[dict[str, torch.Tensor]]

    @classmethod
    def open(cls, folder: Path, split: str) -> LatentCache:
        """Open what `encode_images` wrote. Raises BestiaryError when it is missing or broken."""
        try:
            facts = json.loads((folder / "latents.json").read_text(encoding="utf-8"))
            images = pd.read_csv(folder / "images.csv", keep_default_na=False)
            captions = pd.read_csv(folder / "captions.csv", keep_default_na=False)
            features = load_file(folder / "captions.safetensors")["features"]
            shards = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
        except (OSError, ValueError, SafetensorError) as error:
            raise BestiaryError(
                f"The latents in {folder} are missing or broken ({error}): run the encode stage."
            ) from None
        images = images[images["split"] == split].reset_index(drop=True)
        if sum(len(shard["mean"]) for shard in shards) != len(images):
            raise BestiaryError(
                f"The latents in {folder} are not those of its {split} images: run the encode stage again."
            )
        return cls(
            images, captions, features, facts["scaling_factor"], facts["base_sha256"], facts["data_sha256"], shards
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def variants(self) -> int:
        """How many variants of each image there are: plain, mirrored, changed."""
        return int(self.shards[0]["mean"].shape[1])

    def posterior(self, image: int, variant: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and standard deviation of an image's latents, scaled for the UNet: (C, h, w) each, float32."""
        number = bisect_right(self._starts, image) - 1
        shard, row = self.shards[number], image - self._starts[number]
        return (
            shard["mean"][row, variant].float() * self.scaling_factor,
            shard["std"][row, variant].float() * self.scaling_factor,
        )

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Each image's (h, w)."""
        shapes = [tuple(shard["mean"].shape) for shard in self.shards]
        return [(shape[-2], shape[-1]) for shape in shapes for _ in range(shape[0])][: len(self)]

    @cached_property
    def _starts(self) -> list[int]:
        """The first image of each shard."""
        counts = [len(shard["mean"]) for shard in self.shards]
        return [sum(counts[:number]) for number in range(len(counts))]

    def captions_of(self, class_folder: str) -> list[int]:
        """The rows of `features` that speak of a class."""
        return self.captions.index[self.captions["class"] == class_folder].tolist()


def encode_images(
    base: str | Path,
    clean: Path,
    manifests: dict[str, Path],
    out: Path,
    *,
    resolution: int,
    flip: bool,
    batch_size: int,
    augmentation: Augmentation = NO_AUGMENTATION,
    aspect_ratio_buckets: bool = False,
    revision: str | None = None,
    unfinished: Path | None = None,
) -> dict[str, int]:
    """Encode the images and captions of both splits into `out`; returns the number of images in each, and of those that
    were encoded before ("resumed_at").

    `manifests` are the tables of "train" and "val" (path relative to `clean`, class, sha256, width, height). Each image
    gives its centre square, or with `aspect_ratio_buckets` the centre in the bucket nearest to its own shape. With
    `flip`, each image has a mirrored variant too, and as many changed ones as `augmentation` says. Under
    `accelerate launch` the processes share the shards. All stays in `unfinished` until it is there, so that an encoding
    that was killed goes on where it was.

    Raises BestiaryError when a class has no training image, a caption is too long, an image or the base does not load,
    or the disk is full.
    """
    state = processes()
    _, dtype = device_and_dtype()
    tables = {split: pd.read_csv(manifests[split], keep_default_na=False) for split in SPLITS}
    _check(tables)
    vae = load_vae(base, revision, dtype=dtype).to(state.device, memory_format=torch.channels_last)
    vae_factor, factor = size_factors(base, revision)
    if resolution % (needed := factor if aspect_ratio_buckets else vae_factor):
        raise BestiaryError(f"encode.resolution is {resolution}; the base needs a multiple of {needed}.")
    buckets = aspect_ratio_sizes(resolution, factor) if aspect_ratio_buckets else [(resolution, resolution)]
    images = pd.concat(_in_buckets(table, buckets).assign(split=split) for split, table in tables.items())
    captions = _captions(sorted(set(tables["train"]["class"])))
    settings = {"resolution": resolution, "flip": flip, "augmentation": asdict(augmentation)}
    data = json.dumps(settings).encode() + _csv(images.drop(columns="path")) + _csv(captions)
    facts = {
        "base_sha256": base_sha256(base, revision),
        "data_sha256": hashlib.sha256(data).hexdigest(),
        "scaling_factor": vae.config.scaling_factor,
        **settings,
    }
    # Only what was begun with the same images, base, settings, precision and code can be gone on with.
    code = Path(__file__).read_bytes() + IMAGES.read_bytes()
    key = hashlib.sha256(json.dumps([facts, str(dtype)]).encode() + _csv(images) + code).hexdigest()[:16]
    folder = (unfinished or out.with_name(f".{out.name}")) / key
    shards = {folder / name: rows for name, rows in _shards(images)}
    there = {path for path in shards if path.exists()}
    state.wait_for_everyone()  # before anybody adds to them
    if state.is_main_process:  # first, since a caption may be too long
        _write_captions(base, revision, captions, state.device, dtype, folder)
    mine = [path for path in list(shards)[state.process_index :: state.num_processes] if path not in there]
    count = sum(len(shards[path]) for path in mine)
    with tqdm(total=count, desc="encode", unit="image", disable=not state.is_local_main_process) as bar:
        for path in mine:
            batches = _pixel_batches(clean, shards[path], flip, augmentation, batch_size)
            moments = [_posterior(vae, pixels.to(state.device, dtype), bar.update) for pixels in batches]
            mean, std = (torch.cat(part).cpu().contiguous() for part in zip(*moments, strict=True))  # (B, V, C, h, w)
            write_atomically(path, save({"mean": mean, "std": std}))
    state.wait_for_everyone()
    if state.is_main_process:
        write_atomically(folder / "images.csv", _csv(images))
        write_atomically(folder / "latents.json", f"{json.dumps(facts, indent=2)}\n".encode())
        out.mkdir(parents=True, exist_ok=True)
        for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            shutil.move(folder / name, out / name)
        shutil.rmtree(folder)
    state.wait_for_everyone()
    return {split: len(table) for split, table in tables.items()} | {
        "resumed_at": sum(len(shards[path]) for path in there)
    }


def prepare(image: Image.Image, width: int, height: int) -> Image.Image:
    """The centre of a picture, as much of it as has this shape, at `width` x `height` pixels."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def augment(image: Image.Image, augmentation: Augmentation, random: np.random.Generator) -> Image.Image:
    """A picture turned, shifted, zoomed into, lit and perhaps mirrored at random; its edges are reflected."""
    width, height = image.size
    angle, right, down, closer, light = random.uniform(-1, 1, 5)
    beside, above = width // 2, height // 2
    wide = Image.fromarray(np.pad(np.asarray(image), ((above, above), (beside, beside), (0, 0)), mode="reflect"))
    shift = (right * augmentation.shift * width, down * augmentation.shift * height)
    turned = wide.rotate(angle * augmentation.rotation_degrees, Image.Resampling.BICUBIC, translate=shift)
    seen_share = 1 - augmentation.zoom * abs(closer)
    x, y, half_width, half_height = wide.width / 2, wide.height / 2, width / 2 * seen_share, height / 2 * seen_share
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    seen = turned.resize((width, height), Image.Resampling.LANCZOS, box=box)
    lit = ImageEnhance.Brightness(seen).enhance(1 + light * augmentation.brightness)
    return ImageOps.mirror(lit) if random.random() < 0.5 else lit


def aspect_ratio_sizes(resolution: int, factor: int) -> list[tuple[int, int]]:
    """The (width, height) that pictures may have in place of a square, in multiples of `factor` pixels.

    For each width the largest height of no more pixels than the square, up to MAX_ASPECT_RATIO, as NovelAI trained
    Stable Diffusion in 2022.
    """
    sizes = [(width, resolution**2 // width // factor * factor) for width in range(factor, 2 * resolution, factor)]
    return [size for size in sizes if min(size) * MAX_ASPECT_RATIO >= max(size)]


def _in_buckets(table: pd.DataFrame, buckets: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The images with the width and height they will be encoded at, those of one size side by side."""
    images = table[["path", "class", "sha256"]]
    if len(buckets) == 1:
        return images.assign(width=buckets[0][0], height=buckets[0][1])
    shapes = np.log([width / height for width, height in buckets])
    nearest = [
        int(np.abs(shapes - math.log(width / height)).argmin())
        for width, height in zip(table["width"], table["height"], strict=True)
    ]
    widths, heights = zip(*(buckets[number] for number in nearest), strict=True)
    return images.assign(width=widths, height=heights).sort_values(["width", "height"], kind="stable")


def _shards(images: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each shard's name and images: up to SHARD_IMAGES of one split and one size."""
    for split in SPLITS:
        chunks = [
            same_size.iloc[start : start + SHARD_IMAGES]
            for _, same_size in images[images["split"] == split].groupby(["width", "height"])
            for start in range(0, len(same_size), SHARD_IMAGES)
        ]
        for number, rows in enumerate(chunks):
            yield f"{split}-{number:05}.safetensors", rows


def _check(tables: dict[str, pd.DataFrame]) -> None:
    for split, table in tables.items():
        if table.empty:
            raise BestiaryError(f"There is no image in the {split} split: nothing can be encoded.")
    untaught = sorted(set(tables["val"]["class"]) - set(tables["train"]["class"]))
    if untaught:
        raise BestiaryError(f"The class {untaught[0]} has no image to train on.")


def _pixel_batches(
    clean: Path, rows: pd.DataFrame, flip: bool, augmentation: Augmentation, batch_size: int
) -> Iterator[torch.Tensor]:
    """Pixels in [-1, 1] of each image's variants: (B, V, 3, H, W); the next batch is read while this one is used."""

    def read(row: tuple[str, str]) -> np.ndarray[Any, Any]:
        path, sha256 = row
        plain = prepare(open_rgb(clean / path), width, height)
        variants = [plain, ImageOps.mirror(plain)] if flip else [plain]
        for number in range(augmentation.variants):
            # From the image's content, so that its variants stay the same when other images come or go.
            seed = int.from_bytes(hashlib.blake2b(f"{sha256}/{number}".encode(), digest_size=8).digest())
            variants.append(augment(plain, augmentation, np.random.default_rng(seed)))
        return np.stack([np.asarray(variant) for variant in variants])  # (V, H, W, 3)

    width, height = (int(side) for side in rows[["width", "height"]].iloc[0])
    files = list(zip(rows["path"], rows["sha256"], strict=True))
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        ahead = pool.map(read, batches[0])
        for following in [*batches[1:], []]:
            pixels = torch.from_numpy(np.stack(list(ahead)))
            ahead = pool.map(read, following)
            yield pixels.permute(0, 1, 4, 2, 3) / 127.5 - 1


@torch.inference_mode()
def _posterior(vae: Any, pixels: torch.Tensor, count: Callable[[int], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, V, 3, H, W) -> the posterior's mean and standard deviation, (B, V, C, h, w) each."""
    flat = pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(flat).latent_dist
    count(len(pixels))
    return posterior.mean.unflatten(0, pixels.shape[:2]), posterior.std.unflatten(0, pixels.shape[:2])


def _captions(classes: Sequence[str]) -> pd.DataFrame:
    """The empty caption, which no class has, and each class's own."""
    return pd.DataFrame(
        [
            ("", ""),
            *((name, caption(subject_of(name), template)) for name in classes for template in CAPTION_TEMPLATES),
        ],
        columns=["class", "caption"],
    )


def _write_captions(
    base: str | Path, revision: str | None, captions: pd.DataFrame, device: torch.device, dtype: torch.dtype, out: Path
) -> None:
    tokenizer, text_encoder = load_text(base, revision, dtype=dtype)
    text_encoder = text_encoder.to(device)
    texts = captions["caption"].tolist()
    features = [encode_text(tokenizer, text_encoder, texts[start : start + 64]) for start in range(0, len(texts), 64)]
    write_atomically(out / "captions.safetensors", save({"features": torch.cat(features).cpu().contiguous()}))
    write_atomically(out / "captions.csv", _csv(captions))


def _csv(table: pd.DataFrame) -> bytes:
    text = StringIO()
    table.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue().encode()
