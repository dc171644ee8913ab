"""Encode images with the autoencoder and captions with the text encoder, once, into the cache that training reads.

`bestiary.diffusion.latents` describes the files. An interrupted run resumes at the first missing shard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import save
from tqdm import tqdm

from bestiary.data import images as image_reading
from bestiary.data.images import open_rgb
from bestiary.diffusion import base as base_loading
from bestiary.diffusion.base import (
    base_sha256,
    device_and_dtype,
    encode_text,
    load_text,
    load_vae,
    processes,
    size_factors,
)
from bestiary.diffusion.full_memory import Halving
from bestiary.diffusion.waiting import waiting_bar
from bestiary.errors import BestiaryError
from bestiary.files import discard, write_atomically
from bestiary.subjects import Subjects, caption, templates_of
from bestiary.tables import read_table

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from bestiary.params import Encode

SHARD_IMAGES = 256
SPLITS = ("train", "val")
MAX_ASPECT_RATIO = 2.0  # of a bucket; longer pictures are cropped at their ends
CAPTION_BATCH = 64
READERS = max(4, os.cpu_count() or 4)  # threads that decode images
COMPILE_SECONDS = 15.0
# The modules that decide a shard's content.
CODE = (Path(__file__), Path(image_reading.__file__), Path(base_loading.__file__))


@dataclass(frozen=True)
class Augmentation:
    """How many augmented variants each image gets, and the largest change of each kind. Part of `latents.json`."""

    variants: int
    rotation_degrees: float
    shift: float  # as a fraction of the side
    zoom: float  # as a fraction of the side, inwards only
    brightness: float  # as a fraction of the brightness

    @staticmethod
    def of(settings: Encode) -> Augmentation:
        """The augmentation that the encode settings ask for."""
        return Augmentation(
            variants=settings.augmented_variants,
            rotation_degrees=settings.rotation_degrees,
            shift=settings.shift,
            zoom=settings.zoom,
            brightness=settings.brightness,
        )


@dataclass(frozen=True)
class EncodingResult:
    """The number of images in each split, and how many of both an interrupted run had encoded already."""

    train: int
    val: int
    resumed_at: int


def encode_images(
    base: str | Path,
    clean: Path,
    manifests: Mapping[str, Path],
    out: Path,
    settings: Encode,
    *,
    revision: str | None = None,
    unfinished: Path | None = None,
) -> EncodingResult:
    """Encode the images and captions of both splits into `out`.

    `manifests` has the tables of "train" and "val": path relative to `clean`, class, sha256, and with aspect ratio
    buckets also width and height. Each image is cropped to its centre square, or with buckets to the centre of the
    bucket that is nearest to its shape. Under `accelerate launch` the processes share the shards. Files stay in
    `unfinished` until all of them are there, so a run that was killed resumes when images, base, settings, precision
    and code are unchanged.

    Raises BestiaryError when a class has no training image, a caption is too long, an image or the base does not load,
    or the disk is full.
    """
    state = processes()
    _, dtype = device_and_dtype()
    tables = {split: read_table(manifests[split], {"width": int, "height": int}) for split in SPLITS}
    _check(tables)
    vae = load_vae(base, revision, dtype=dtype).to(state.device, memory_format=torch.channels_last)
    sizes = _picture_sizes(settings, *size_factors(base, revision))
    images = pd.concat(_in_buckets(table, sizes).assign(split=split) for split, table in tables.items())
    subjects = Subjects.read_from(clean)
    of_classes = _captions(sorted(set(tables["train"]["class"])), subjects)
    captions = pd.concat([of_classes, *_own_captions(tables.values(), settings)], ignore_index=True).fillna("")
    facts = _facts(settings, images, captions, base_sha256(base, revision), vae.config.scaling_factor)
    folder = (unfinished or out.with_name(f".{out.name}")) / _resume_key(facts, images, dtype)
    shards = {folder / name: rows for name, rows in _shards(images)}
    done = {path for path in shards if path.exists()}
    state.wait_for_everyone()  # all processes must see the same shards as done
    if state.is_main_process:  # before the images, so that a caption that is too long fails at once
        _write_captions(load_text(base, revision, dtype=dtype), state.device, captions, folder)
    todo = {path: shards[path] for path in list(shards)[state.process_index :: state.num_processes] if path not in done}
    count = sum(len(rows) for rows in todo.values())
    encoder = VaeEncoder(vae, compiled=settings.compile)
    fitting = Halving("Encoding", "encode.batch_size")
    with tqdm(total=count, desc="encode images", unit="image", disable=not state.is_local_main_process) as bar:
        for path, rows in todo.items():
            batches = (pixels.to(state.device) for pixels in _pixel_batches(clean, rows, settings))
            write_atomically(path, _encode_shard(encoder, fitting, batches, bar.update))
    state.wait_for_everyone()
    if state.is_main_process:
        write_atomically(folder / "images.csv", _csv(images))
        subjects.write_to(folder)
        write_atomically(folder / "latents.json", f"{facts}\n".encode())
        _move_files(folder, out)
    state.wait_for_everyone()
    resumed_at = sum(len(shards[path]) for path in done)
    return EncodingResult(train=len(tables["train"]), val=len(tables["val"]), resumed_at=resumed_at)


def prepare(image: Image.Image, width: int, height: int) -> Image.Image:
    """Crop a picture to the centre that has this shape, and scale it to `width` x `height` pixels.

    >>> prepare(Image.new("RGB", (640, 480)), 512, 512).size
    (512, 512)
    """
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def augment(image: Image.Image, augmentation: Augmentation, random: np.random.Generator) -> Image.Image:
    """Rotate, shift, zoom, brighten and perhaps mirror a picture at random; pixels beyond its edges are reflected.

    >>> augmentation = Augmentation(variants=1, rotation_degrees=10, shift=0.05, zoom=0.1, brightness=0.1)
    >>> augment(Image.new("RGB", (64, 48)), augmentation, np.random.default_rng(0)).size
    (64, 48)
    """
    width, height = image.size
    angle, right, down, closer, light = random.uniform(-1, 1, 5)
    beside, above = width // 2, height // 2
    wide = Image.fromarray(np.pad(np.asarray(image), ((above, above), (beside, beside), (0, 0)), mode="reflect"))
    shift = (right * augmentation.shift * width, down * augmentation.shift * height)
    rotated = wide.rotate(angle * augmentation.rotation_degrees, Image.Resampling.BICUBIC, translate=shift)
    visible = 1 - augmentation.zoom * abs(closer)
    x, y, half_width, half_height = wide.width / 2, wide.height / 2, width / 2 * visible, height / 2 * visible
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    zoomed = rotated.resize((width, height), Image.Resampling.LANCZOS, box=box)
    lit = ImageEnhance.Brightness(zoomed).enhance(1 + light * augmentation.brightness)
    return ImageOps.mirror(lit) if random.random() < 0.5 else lit


def aspect_ratio_sizes(resolution: int, factor: int) -> list[tuple[int, int]]:
    """The (width, height) of each aspect ratio bucket, in multiples of `factor` pixels.

    For each width this is the largest height that holds no more pixels than the square of `resolution`, up to
    MAX_ASPECT_RATIO, as NovelAI trained Stable Diffusion in 2022.

    >>> aspect_ratio_sizes(512, 64)
    [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]
    """
    sizes = [(width, resolution**2 // width // factor * factor) for width in range(factor, 2 * resolution, factor)]
    return [size for size in sizes if min(size) * MAX_ASPECT_RATIO >= max(size)]


def _check(tables: Mapping[str, pd.DataFrame]) -> None:
    for split, table in tables.items():
        if table.empty:
            raise BestiaryError(
                f"There is no image in the {split} split, so there is nothing to encode. Add images, or change "
                "split.val_fraction."
            )
    untaught = sorted(set(tables["val"]["class"]) - set(tables["train"]["class"]))
    if untaught:
        raise BestiaryError(f"The class {untaught[0]} has no image to train on. Add images to it, or leave it out.")


def _picture_sizes(settings: Encode, vae_factor: int, unet_factor: int) -> list[tuple[int, int]]:
    """The (width, height) that pictures may be encoded at: the square alone, or all buckets."""
    factor = unet_factor if settings.aspect_ratio_buckets else vae_factor
    if settings.resolution % factor:
        raise BestiaryError(
            f"encode.resolution is {settings.resolution}, which this base cannot encode. Choose a multiple of {factor}."
        )
    if settings.aspect_ratio_buckets:
        return aspect_ratio_sizes(settings.resolution, factor)
    return [(settings.resolution, settings.resolution)]


def _in_buckets(table: pd.DataFrame, buckets: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The images with the width and height that they are encoded at, sorted by size."""
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


def _captions(classes: Sequence[str], subjects: Subjects) -> pd.DataFrame:
    """The empty caption, which belongs to no class, and the captions of each class."""
    rows = [("", "")]
    for name in classes:
        subject = subjects.of(name)
        rows += [(name, caption(subject, template)) for template in templates_of([subject])]
    return pd.DataFrame(rows, columns=["class", "caption"])


def _own_captions(tables: Iterable[pd.DataFrame], settings: Encode) -> Iterator[pd.DataFrame]:
    """The captions that belong to single images: class, caption, and the image's SHA-256."""
    for table in tables:
        if "caption" in table and any(table["caption"]):
            rows = [
                (name, text, sha256)
                for name, own, sha256 in zip(table["class"], table["caption"], table["sha256"], strict=True)
                if own
                for text in caption_versions(own, sha256, settings)
            ]
            yield pd.DataFrame(rows, columns=["class", "caption", "image"])


def caption_versions(text: str, sha256: str, settings: Encode) -> list[str]:
    """The versions of an image's own caption: itself, or `caption_variants` with shuffled and dropped tags.

    The image's hash seeds them, so other images change nothing.
    """
    if not settings.shuffle_tags and not settings.tag_dropout:
        return [text]
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    first, others = tags[: settings.keep_tags], tags[settings.keep_tags :]
    versions = []
    for number in range(settings.caption_variants):
        seed = int.from_bytes(hashlib.blake2b(f"{sha256}/tags/{number}".encode(), digest_size=8).digest())
        random = np.random.default_rng(seed)
        order = random.permutation(len(others)) if settings.shuffle_tags else range(len(others))
        draws = zip(order, random.random(len(others)), strict=True)
        kept = [others[place] for place, draw in draws if draw >= settings.tag_dropout]
        versions.append(", ".join([*first, *kept]) or text)
    return versions


def _facts(
    settings: Encode, images: pd.DataFrame, captions: pd.DataFrame, base_sha256: str, scaling_factor: float
) -> str:
    """The content of `latents.json`: what the cache is made from."""
    made_with = {
        "resolution": settings.resolution,
        "flip": settings.flip,
        "augmentation": asdict(Augmentation.of(settings)),
    }
    data = json.dumps(made_with).encode() + _csv(images.drop(columns="path")) + _csv(captions)
    hashes = {"base_sha256": base_sha256, "data_sha256": hashlib.sha256(data).hexdigest()}
    return json.dumps({**hashes, "scaling_factor": scaling_factor, **made_with}, indent=2)


def _resume_key(facts: str, images: pd.DataFrame, dtype: torch.dtype) -> str:
    """Names the folder of unfinished files: it changes with images, base, settings, precision and code."""
    code = b"".join(path.read_bytes() for path in CODE)
    return hashlib.sha256(f"{facts} {dtype}".encode() + _csv(images) + code).hexdigest()[:16]


def _shards(images: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each shard's file name and images: at most SHARD_IMAGES of one split and one size."""
    for split in SPLITS:
        chunks = [
            same_size.iloc[start : start + SHARD_IMAGES]
            for _, same_size in images[images["split"] == split].groupby(["width", "height"])
            for start in range(0, len(same_size), SHARD_IMAGES)
        ]
        for number, rows in enumerate(chunks):
            yield f"{split}-{number:05}.safetensors", rows


def _pixel_batches(clean: Path, rows: pd.DataFrame, settings: Encode) -> Iterator[torch.Tensor]:
    """Pixels (0 to 255) of each image's V variants: (B, V, 3, H, W). The next batch is read while one is used."""
    augmentation = Augmentation.of(settings)
    width, height = (int(side) for side in rows[["width", "height"]].iloc[0])

    def read(file: tuple[str, str]) -> np.ndarray[Any, Any]:
        path, sha256 = file
        plain = prepare(open_rgb(clean / path), width, height)
        variants = [plain, ImageOps.mirror(plain)] if settings.flip else [plain]
        for number in range(augmentation.variants):
            # Seeded by the image's content, so adding or removing other images does not change its variants.
            seed = int.from_bytes(hashlib.blake2b(f"{sha256}/{number}".encode(), digest_size=8).digest())
            variants.append(augment(plain, augmentation, np.random.default_rng(seed)))
        return np.stack([np.asarray(variant) for variant in variants])  # (V, H, W, 3)

    files = list(zip(rows["path"], rows["sha256"], strict=True))
    batches = [files[start : start + settings.batch_size] for start in range(0, len(files), settings.batch_size)]
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        ahead = pool.map(read, batches[0])
        for following in [*batches[1:], []]:
            pixels = torch.from_numpy(np.stack(list(ahead)))
            ahead = pool.map(read, following)
            yield pixels.permute(0, 1, 4, 2, 3)


class VaeEncoder:
    """The autoencoder's encoder: pixels (N, 3, H, W), 0 to 255, to the mean and the deviation, (N, C, h, w) each.

    With `compiled`, it compiles for the first shape that it sees. Batches of other shapes are encoded without it.
    """

    def __init__(self, vae: AutoencoderKL, *, compiled: bool) -> None:
        self.vae = vae
        self.fast = torch.compile(self._moments, dynamic=False) if compiled else None
        self.shape: torch.Size | None = None

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = (pixels / 127.5 - 1).to(self.vae.dtype).contiguous(memory_format=torch.channels_last)
        if self.fast is None:
            return self._moments(values)
        if self.shape is None:
            self.shape = pixels.shape
            try:
                with waiting_bar(COMPILE_SECONDS):
                    return self.fast(values)
            except Exception as error:  # whatever a compiler and its backends raise
                tqdm.write(f"Encoding continues without torch.compile, which failed ({type(error).__name__}).")
                self.fast = None
        return self.fast(values) if self.fast and pixels.shape == self.shape else self._moments(values)

    def _moments(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(values).latent_dist
        return posterior.mean, posterior.std


@torch.inference_mode()
def _encode_shard(
    encode: VaeEncoder, fitting: Halving, batches: Iterable[torch.Tensor], count: Callable[[int], object]
) -> bytes:
    """The content of a shard's file from batches of pixels (B, V, 3, H, W); counts the images that are encoded."""
    means, stds = [], []
    for pixels in batches:
        parts = fitting.parts(encode, pixels.flatten(0, 1))
        mean, std = (torch.cat(moments) for moments in zip(*parts, strict=True))
        means.append(mean.unflatten(0, pixels.shape[:2]))  # (B, V, C, h, w)
        stds.append(std.unflatten(0, pixels.shape[:2]))
        count(len(pixels))
    return save({"mean": torch.cat(means).cpu().contiguous(), "std": torch.cat(stds).cpu().contiguous()})


def _write_captions(
    text: tuple[CLIPTokenizer, CLIPTextModel], device: torch.device, captions: pd.DataFrame, folder: Path
) -> None:
    tokenizer, text_encoder = text[0], text[1].to(device)
    texts = captions["caption"].tolist()
    features = [
        encode_text(tokenizer, text_encoder, texts[start : start + CAPTION_BATCH])
        for start in range(0, len(texts), CAPTION_BATCH)
    ]
    write_atomically(folder / "captions.safetensors", save({"features": torch.cat(features).cpu().contiguous()}))
    write_atomically(folder / "captions.csv", _csv(captions))


def _move_files(folder: Path, out: Path) -> None:
    """Move the finished files to `out`; temporary files that a killed run left behind are deleted.

    On another file system they are copied. If its disk is full, `folder` still has all of them.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        (out / name).unlink(missing_ok=True)
        try:
            (out / name).hardlink_to(folder / name)
        except OSError:
            shutil.copyfile(folder / name, out / name)
    discard(folder)


def _csv(table: pd.DataFrame) -> bytes:
    text = StringIO()
    table.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue().encode()
