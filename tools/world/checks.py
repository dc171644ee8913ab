"""Measured checks of the bundled models: places that are drawn and named, colours that survive, names that are seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch.nn.functional import normalize

from bestiary.diffusion.base import encode_text
from bestiary.diffusion.sampling import generate
from bestiary.evaluation.judge import Judge
from bestiary.samplers import Sampling
from bestiary.subjects import caption, subject_of
from world.captions import PLACE_WORDS, UNKNOWN_TO_BASE
from world.individuals import OTHERS, PIP, Clothes, penguin
from world.outfits import Item
from world.pictures import ANIMALS, FRESH_SEEDS, PLACES, SIZE
from world.scenes import Scene, Style, render

KNOWN = tuple(animal for animal in ANIMALS if animal not in UNKNOWN_TO_BASE)
NAMES = ("sks", "xqz", "momo", "pip", "tuvi", "hamster")
PLACE_SEEDS = FRESH_SEEDS + 5_000_000


def place_prompts(animal: str, template: str) -> list[str]:
    """One prompt for each place, in the place's usual words."""
    return [f"{caption(subject_of(animal), template)} {PLACE_WORDS[place][0]}" for place in PLACES]


def drawn_in_places(base: StableDiffusionPipeline, template: str, sampling: Sampling) -> list[Image.Image]:
    """The base's pictures of each animal that it knows, in each place."""
    prompts = [prompt for animal in KNOWN for prompt in place_prompts(animal, template)]
    return generate(base, prompts, range(len(prompts)), sampling, batch_size=32)


def rendered_in_places(style: Style) -> list[Image.Image]:
    """Unseen rendered pictures of the same animals and places."""
    return [
        render(animal, style, PLACE_SEEDS + 100 * i + j, scene=Scene(place))
        for i, animal in enumerate(KNOWN)
        for j, place in enumerate(PLACES)
    ]


def places_named(judge: Judge, images: list[Image.Image], template: str) -> float:
    """Of pictures in the order of `drawn_in_places`, the share whose place the judge picks out of all places."""
    right = []
    for i, animal in enumerate(KNOWN):
        features = judge.image_features(images[i * len(PLACES) : (i + 1) * len(PLACES)])  # (P, D)
        nearest = (features @ judge.text_features(place_prompts(animal, template)).T).argmax(dim=1)
        right.append((nearest == torch.arange(len(PLACES))).float().mean())
    return float(torch.stack(right).mean())


def scarf_colours(vae: AutoencoderKL, colour: str = "red") -> tuple[list[float], list[float]]:
    """Mean RGB of a scarf on a photo of every animal, before and after the VAE."""
    bare, dressed = (
        np.stack([_pixels(animal, seed, outfit) for seed, animal in enumerate(ANIMALS)])
        for outfit in ((), (Item("scarf", colour),))
    )  # (N, H, W, 3)
    scarf = np.abs(dressed.astype(int) - bare).sum(axis=-1) > 150  # (N, H, W): not its shadow and soft edge
    with torch.no_grad():
        pixels = torch.from_numpy(dressed).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    after = ((decoded + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    return [float(v) for v in dressed[scarf].mean(axis=0)], [float(v) for v in after[scarf].mean(axis=0)]


def _pixels(animal: str, seed: int, outfit: tuple[Item, ...]) -> np.ndarray:
    return np.asarray(render(animal, "photo", PLACE_SEEDS + seed, SIZE, scene=Scene(None, outfit)))


def individuals_told_apart(class_tokens: Callable[[list[Image.Image]], torch.Tensor]) -> float:
    """How often a picture of Pip is more like other pictures of Pip than a picture of another penguin is.

    `class_tokens` gives unit vectors (B, D). The mean of plain penguins at home is subtracted, as evaluation subtracts
    that of the base's penguins.
    """
    places = [place for place in PLACES if place != "snow"]

    def pictures(clothes: Clothes, places: list[str], first: int) -> torch.Tensor:
        images = [penguin(clothes, place, PLACE_SEEDS + first + i, SIZE) for i, place in enumerate(places)]
        return class_tokens(images).double()

    plain = pictures(Clothes(), ["snow"] * 24, 900).mean(dim=0)
    pip = normalize(pictures(PIP, places, 0) - plain)  # (N, D)
    others = normalize(torch.cat([pictures(other, places, 100 * (i + 1)) for i, other in enumerate(OTHERS)]) - plain)
    own = pip @ pip.T
    likeness = (own.sum(dim=1) - own.diagonal()) / (len(pip) - 1)  # (N,)
    return float((likeness[:, None] > (others @ pip.T).mean(dim=1)).double().mean())


def name_changes(base: StableDiffusionPipeline) -> dict[str, float]:
    """By how much a name changes the text features of "a photo of a penguin", relative to their norm."""
    texts = ["a photo of a penguin", *(f"a photo of {name} penguin" for name in NAMES)]
    with torch.inference_mode():
        plain, *named = encode_text(base.tokenizer, base.text_encoder, texts).double()
    return {name: float((each - plain).norm() / plain.norm()) for name, each in zip(NAMES, named, strict=True)}
