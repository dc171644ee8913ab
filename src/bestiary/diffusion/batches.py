"""The samples that training steps and validations use.

Every random draw is a function of the seed and of the image's position in the run, not of a generator's state. So a
resumed run, and a run shared by several processes, trains on exactly the same samples as one process does in one go.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import chain
from typing import Literal, Protocol, TypedDict

import torch
from torch.utils.data import Dataset

from bestiary.diffusion.latents import LatentCache


class StreamSettings(Protocol):
    """The settings that decide which samples a run uses, such as params.Train."""

    @property
    def steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def caption_dropout(self) -> float: ...

    @property
    def noise_offset(self) -> float: ...

    @property
    def timestep_sampling(self) -> Literal["uniform", "stratified", "importance"]: ...


class Sample(TypedDict):
    """One image as training uses it."""

    latents: torch.Tensor  # (C, h, w)
    noise: torch.Tensor  # (C, h, w)
    timesteps: torch.Tensor  # ()
    captions: torch.Tensor  # (), an index into the cache's features


class Batch(TypedDict):
    """Samples of one size."""

    latents: torch.Tensor  # (B, C, h, w)
    noise: torch.Tensor  # (B, C, h, w)
    timesteps: torch.Tensor  # (B,)
    captions: torch.Tensor  # (B,)
    place: torch.Tensor  # (B,), each sample's index among those that `collate` was given


class TrainingStream(Dataset[Sample]):
    """The images of a whole run in order.

    Position p is image p % N of the permutation of epoch p // N, for N training images: every image is seen exactly
    once an epoch, and a step may span the end of one. If images differ in size, the permutation groups images of one
    size into batches, except at the end of a size or an epoch. `timestep_weights` (timesteps,) says how often each
    timestep is drawn; stratified sampling draws one timestep from each N-th of the schedule in every epoch.
    """

    def __init__(
        self, cache: LatentCache, settings: StreamSettings, *, seed: int, timestep_weights: torch.Tensor
    ) -> None:
        self.cache = cache
        self.settings = settings
        self.seed = seed
        self.cumulative = timestep_weights.double().cumsum(0) / timestep_weights.double().sum()
        self.captions = cache.captions_by_image()
        self._orders: dict[str, tuple[int, list[int]]] = {}  # "images" or "timesteps": an epoch and its permutation

    def __len__(self) -> int:
        return self.settings.steps * self.settings.batch_size

    def image_at(self, position: int) -> int:
        """The index of the image at a position of the run."""
        return self._shuffled("images", position)

    def __getitem__(self, position: int) -> Sample:
        image = self.image_at(position)
        generator = seeded_generator(self.seed, "image", position)
        variant, caption, dropped, quantile = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        if self.settings.timestep_sampling == "stratified":
            quantile = (self._shuffled("timesteps", position) + quantile) / len(self.cache)
        mean, std = self.cache.posterior(image, int(variant * self.cache.variants))
        draws = torch.randn(2, *mean.shape, generator=generator)
        noise = draws[1]
        if self.settings.noise_offset:  # lets the adapter learn pictures that are darker or lighter as a whole
            noise = noise + self.settings.noise_offset * torch.randn(len(mean), 1, 1, generator=generator)
        captions = self.captions[image]
        empty = dropped < self.settings.caption_dropout
        return {
            "latents": mean + std * draws[0],  # a fresh sample of the posterior
            "noise": noise,
            "timesteps": torch.searchsorted(self.cumulative, quantile, right=True).clamp(max=len(self.cumulative) - 1),
            "captions": torch.tensor(0 if empty else captions[int(caption * len(captions))]),
        }

    def _shuffled(self, what: str, position: int) -> int:
        epoch, index = divmod(position, len(self.cache))
        if self._orders.get(what, (-1, []))[0] != epoch:
            order = torch.randperm(len(self.cache), generator=seeded_generator(self.seed, what, epoch)).tolist()
            several_sizes = what == "images" and len(set(self.cache.sizes)) > 1
            self._orders[what] = (epoch, self._grouped_by_size(order, epoch) if several_sizes else order)
        return self._orders[what][1][index]

    def _grouped_by_size(self, order: list[int], epoch: int) -> list[int]:
        """Reorder an epoch's images so that each batch has one size, and the batches come in random order."""
        generator = seeded_generator(self.seed, "sizes", epoch)
        batch_size = self.settings.batch_size
        sizes = sorted(set(self.cache.sizes))
        rank = dict(zip(sizes, torch.randperm(len(sizes), generator=generator).tolist(), strict=True))
        images = sorted(order, key=lambda image: rank[self.cache.sizes[image]])
        first = -epoch * len(order) % batch_size  # images that complete the last batch of the previous epoch
        full = max(0, (len(images) - first) // batch_size)  # batches
        batches = [
            images[first + number * batch_size :][:batch_size]
            for number in torch.randperm(full, generator=generator).tolist()
        ]
        return [*images[:first], *chain.from_iterable(batches), *images[first + full * batch_size :]]


class ValidationGrid(Dataset[Sample]):
    """Each validation image once, with noise, caption and timestep that are the same for every run on these images.

    The timesteps follow the golden ratio sequence, which covers the schedule evenly over any stretch of the images and
    so for each class.
    """

    def __init__(self, cache: LatentCache, timesteps: int) -> None:
        self.cache = cache
        self.timesteps = [int((index + 0.5) * (math.sqrt(5) - 1) / 2 % 1 * timesteps) for index in range(len(cache))]
        self.captions = cache.captions_by_image()
        self.classes = cache.images["class"].tolist()

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, image: int) -> Sample:
        mean, _ = self.cache.posterior(image, 0)
        captions = self.captions[image]
        return {
            "latents": mean,
            "noise": torch.randn(mean.shape, generator=seeded_generator("validation", image)),
            "timesteps": torch.tensor(self.timesteps[image]),
            "captions": torch.tensor(captions[image % len(captions)]),
        }


def collate(samples: Sequence[Sample]) -> list[Batch]:
    """Stack samples into one batch for each size of latents."""
    groups: dict[torch.Size, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample["latents"].shape, []).append(place)
    return [
        {
            "latents": torch.stack([samples[place]["latents"] for place in places]),
            "noise": torch.stack([samples[place]["noise"] for place in places]),
            "timesteps": torch.stack([samples[place]["timesteps"] for place in places]),
            "captions": torch.stack([samples[place]["captions"] for place in places]),
            "place": torch.tensor(places),
        }
        for places in groups.values()
    ]


def seeded_number(*parts: object) -> int:
    """A 32-bit number that depends on all parts. torch's CPU generator uses no more than 32 bits of its seed.

    >>> seeded_number(0, "image", 7) == seeded_number(0, "image", 7), seeded_number(0, "image", 7) < 2**32
    (True, True)
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def seeded_generator(*parts: object) -> torch.Generator:
    """A CPU generator whose stream depends on all parts.

    >>> torch.equal(torch.rand(2, generator=seeded_generator(0)), torch.rand(2, generator=seeded_generator(0)))
    True
    """
    return torch.Generator("cpu").manual_seed(seeded_number(*parts))
