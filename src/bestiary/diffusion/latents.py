"""The cache that training reads: the latent distribution of each image and the text features of each caption.

`bestiary.diffusion.encoding` writes it. The cache is a folder:
- `<split>-00000.safetensors` ...: `mean` and `std` (B, V, C, h, w) of the autoencoder's posterior, unscaled, for V
  variants of images of one size
- `images.csv`: the split, path, class, sha256, width and height of each image, in the order of the shards
- `captions.safetensors`: `features` (B, T, D); `captions.csv`: the class and caption of each, the empty caption first,
  and the image's SHA-256 if captions belong to single images
- `latents.json`: what the cache was made from
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bestiary.errors import BestiaryError
from bestiary.subjects import Subjects
from bestiary.tables import read_table

if TYPE_CHECKING:
    from bestiary.diffusion.preservation import Preserved


@dataclass(frozen=True)
class LatentCache:
    """One split of a cache on disk, memory-mapped."""

    images: pd.DataFrame  # path, class, sha256, width, height
    captions: pd.DataFrame  # class, caption
    features: torch.Tensor  # (captions, T, D)
    scaling_factor: float
    base_sha256: str
    data_sha256: str  # of the images of both splits, their captions and the encode settings
    shards: list[dict[str, torch.Tensor]]  # "mean" and "std" of each file

    @classmethod
    def open(cls, folder: Path, split: str) -> LatentCache:
        """Open one split, "train" or "val". Raises BestiaryError when the cache is missing or broken."""
        try:
            facts = json.loads((folder / "latents.json").read_text(encoding="utf-8"))
            images = read_table(folder / "images.csv", {"width": int, "height": int})
            captions = read_table(folder / "captions.csv")
            features = load_file(folder / "captions.safetensors")["features"]
            shards = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
        except (OSError, ValueError, SafetensorError) as error:
            raise BestiaryError(
                f"The latents in {folder} are missing or broken ({error}). Run `dvc repro encode`."
            ) from None
        images = images[images["split"] == split].reset_index(drop=True)
        if sum(len(shard["mean"]) for shard in shards) != len(images):
            raise BestiaryError(
                f"The {split} latents in {folder} do not match {folder / 'images.csv'}. Run the encode stage again."
            )
        return cls(
            images, captions, features, facts["scaling_factor"], facts["base_sha256"], facts["data_sha256"], shards
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def variants(self) -> int:
        """The number of variants of each image: the image itself, mirrored, and augmented ones."""
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
    def channel_means(self) -> torch.Tensor:
        """The mean of all images' latents in each channel, scaled for the UNet: (C,), float32."""
        means = torch.cat([shard["mean"][:, 0].float().mean(dim=(-2, -1)) for shard in self.shards])
        return means.mean(dim=0) * self.scaling_factor

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Each image's (h, w)."""
        shapes = [tuple(shard["mean"].shape) for shard in self.shards]
        return [(shape[-2], shape[-1]) for shape in shapes for _ in range(shape[0])][: len(self)]

    @cached_property
    def _starts(self) -> list[int]:
        """The index of the first image of each shard."""
        counts = [len(shard["mean"]) for shard in self.shards]
        return [sum(counts[:number]) for number in range(len(counts))]

    def captions_of(self, class_folder: str) -> list[int]:
        """The indices into `features` of a class's captions, without those of single images."""
        return self.captions.index[(self.captions["class"] == class_folder) & (self._caption_images == "")].tolist()

    def captions_by_image(self) -> list[list[int]]:
        """For each image, the indices into `features` of its captions: its own, or else its class's."""
        own: dict[str, list[int]] = {}
        for index, sha256 in enumerate(self._caption_images):
            if sha256:
                own.setdefault(sha256, []).append(index)
        of_class = {name: self.captions_of(name) for name in set(self.images["class"])}
        return [
            own.get(sha256) or of_class[name]
            for sha256, name in zip(self.images["sha256"], self.images["class"], strict=True)
        ]

    @cached_property
    def _caption_images(self) -> pd.Series[str]:
        """For each caption, the SHA-256 of the one image that it belongs to, or ""."""
        if "image" in self.captions:
            return self.captions["image"]
        return pd.Series("", index=self.captions.index)


@dataclass(frozen=True)
class Latents:
    """Both splits of a cache: the images to train on and the images to validate with."""

    training: LatentCache
    validation: LatentCache
    subjects: Subjects = field(default_factory=Subjects)
    preserved: Preserved | None = None  # what training must not change of the base, for train.preservation

    @classmethod
    def open(cls, folder: Path) -> Latents:
        """Open both splits. Raises BestiaryError when the cache is missing or broken."""
        return cls(LatentCache.open(folder, "train"), LatentCache.open(folder, "val"), Subjects.read_from(folder))
