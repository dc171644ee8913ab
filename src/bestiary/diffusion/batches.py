"""What each step trains on and each validation measures with.

Every random draw is a function of the seed and of the image's position in the run, never of a generator that lives on.
So a run that was interrupted, or is shared by several processes, trains on exactly what one process does in one go.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch.utils.data import Dataset

from bestiary.diffusion.latents import LatentCache

Batch = dict[str, torch.Tensor]  # latents, noise (B, C, h, w); timesteps, captions (B,), place (B,) as `collate` says


class TrainingStream(Dataset[Batch]):
    """The images of a whole run in order, `length` of them.

    Position p is image p % N of epoch p // N's own permutation: every image is seen exactly once an epoch, and a step
    may reach over the end of one. Where images differ in size, the permutation keeps those of one size together in
    batches of `batch_size`, but for those at a size's or an epoch's end. `timestep_weights` (timesteps,) says how often
    each timestep is drawn; `stratified` spreads the draws of an epoch evenly, one for each N-th part.
    """

    def __init__(
        self,
        cache: LatentCache,
        length: int,
        *,
        batch_size: int,
        seed: int,
        caption_dropout: float,
        noise_offset: float,
        timestep_weights: torch.Tensor,
        stratified: bool,
    ) -> None:
        self.cache = cache
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.noise_offset = noise_offset
        self.cumulative = timestep_weights.double().cumsum(0) / timestep_weights.double().sum()
        self.stratified = stratified
        self.captions = {name: cache.captions_of(name) for name in set(cache.images["class"])}
        self.classes = cache.images["class"].tolist()
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        return self.length

    def image_at(self, position: int) -> int:
        """Which image stands at a position of the run."""
        return self._shuffled("images", position)

    def __getitem__(self, position: int) -> Batch:
        image = self.image_at(position)
        generator = seeded_generator(self.seed, "image", position)
        variant, caption, dropped, quantile = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        if self.stratified:
            quantile = (self._shuffled("timesteps", position) + quantile) / len(self.cache)
        mean, std = self.cache.posterior(image, int(variant * self.cache.variants))
        draws = torch.randn(2, *mean.shape, generator=generator)
        noise = draws[1]
        if self.noise_offset:  # lets the adapter learn pictures that are darker or lighter as a whole
            noise = noise + self.noise_offset * torch.randn(len(mean), 1, 1, generator=generator)
        captions = self.captions[self.classes[image]]
        return {
            "latents": mean + std * draws[0],  # (C, h, w), a fresh sample of the posterior
            "noise": noise,
            "timesteps": torch.searchsorted(self.cumulative, quantile, right=True).clamp(max=len(self.cumulative) - 1),
            "captions": torch.tensor(0 if dropped < self.caption_dropout else captions[int(caption * len(captions))]),
        }

    def _shuffled(self, what: str, position: int) -> int:
        epoch, index = divmod(position, len(self.cache))
        if self._orders.get(what, (-1, []))[0] != epoch:
            order = torch.randperm(len(self.cache), generator=seeded_generator(self.seed, what, epoch)).tolist()
            several = what == "images" and len(set(self.cache.sizes)) > 1
            self._orders[what] = (epoch, self._of_one_size_together(order, epoch) if several else order)
        return self._orders[what][1][index]

    def _of_one_size_together(self, order: list[int], epoch: int) -> list[int]:
        """The images of an epoch so that its batches have one size each, and come in random order."""
        generator = seeded_generator(self.seed, "sizes", epoch)
        sizes = sorted(set(self.cache.sizes))
        rank = dict(zip(sizes, torch.randperm(len(sizes), generator=generator).tolist(), strict=True))
        images = sorted(order, key=lambda image: rank[self.cache.sizes[image]])
        begun = -epoch * len(order) % self.batch_size  # so many complete the last batch of the epoch before
        whole = (len(images) - begun) // self.batch_size
        batches = [
            images[begun + number * self.batch_size :][: self.batch_size]
            for number in torch.randperm(max(0, whole), generator=generator).tolist()
        ]
        return [*images[:begun], *chain.from_iterable(batches), *images[begun + max(0, whole) * self.batch_size :]]


class ValidationGrid(Dataset[Batch]):
    """Each validation image once, with noise, caption and timestep that are the same for every run on these images.

    The timesteps follow the golden ratio's sequence, which covers the schedule evenly in every stretch of the images,
    so in each class too.
    """

    def __init__(self, cache: LatentCache, timesteps: int) -> None:
        self.cache = cache
        self.timesteps = [int((index + 0.5) * (math.sqrt(5) - 1) / 2 % 1 * timesteps) for index in range(len(cache))]
        self.captions = {name: cache.captions_of(name) for name in set(cache.images["class"])}
        self.classes = cache.images["class"].tolist()

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, image: int) -> Batch:
        mean, _ = self.cache.posterior(image, 0)
        captions = self.captions[self.classes[image]]
        return {
            "latents": mean,
            "noise": torch.randn(mean.shape, generator=seeded_generator("validation", image)),
            "timesteps": torch.tensor(self.timesteps[image]),
            "captions": torch.tensor(captions[image % len(captions)]),
        }


def collate(samples: Sequence[Batch]) -> list[Batch]:
    """Samples stacked into batches, one for each size of latents; `place` (B,) says where among them each stood."""
    groups: dict[torch.Size, list[Batch]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample["latents"].shape, []).append(sample | {"place": torch.tensor(place)})
    return [{name: torch.stack([sample[name] for sample in group]) for name in group[0]} for group in groups.values()]


def seeded_number(*parts: object) -> int:
    """A number of 32 bits that depends on all parts; torch's CPU generator uses no more of its seed."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator whose stream depends on all parts."""
    return torch.Generator("cpu").manual_seed(seeded_number(*parts))
