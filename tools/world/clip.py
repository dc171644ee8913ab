"""Train a small CLIP: one for the base's text encoder and another one, from other initial weights, for the judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from bestiary.subjects import Subject, caption, subject_of
from world.captions import LENGTH, VAGUE_CAPTIONS, clear_caption
from world.pictures import ANIMALS, PLACES, SIZE, STYLES, THINGS, Pictures
from world.schedule import Average, Clock, descend, load_checkpoint, rank, save_checkpoint, say

WIDTH = 128
# The share of batches with three animals. With half of them a judge hardly kept animals apart.
FEW_ANIMALS = {"text": 0.5, "judge": 0.1, "image_judge": 0.0}
# The largest logit scale in training. A large one lets cosines that hardly differ tell captions apart: with 100, the
# judge's right animals were only 9 points (of cosines, x 100) above the best wrong ones, and its scores said little.
LARGEST_SCALE = {"text": 100.0, "judge": 16.0, "image_judge": 100.0}
# Whose captions name places, clothes and individuals. Features that were trained without are of the animal alone.
SEES_SCENES = {"text": True, "judge": True, "image_judge": False}
ANCHORED = 3.0  # weight of the agreement with a trained text encoder


def build(tokenizer: CLIPTokenizer, width: int) -> CLIPModel:
    """The architecture with random weights: 64 patches of 8 x 8 pixels, texts of 24 tokens."""
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // 32}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        num_hidden_layers=3,
        projection_dim=64,
        **special,
        **shape,
    )
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, num_hidden_layers=4, projection_dim=64, **shape)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids padded to the full length as Stable Diffusion pads them, (B, T)."""
    encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


@dataclass(frozen=True)
class Texts:
    """Captions, and the index of what each one says (B,): -1 stands for any animal or place, "" for nothing said."""

    captions: list[str]
    animals: NDArray[np.int64]
    styles: NDArray[np.int64]
    places: NDArray[np.int64]
    clothes: NDArray[np.str_]
    names: NDArray[np.str_]


def write_captions(
    pictures: Pictures, chosen: NDArray[np.int64], rng: np.random.Generator, scenes: bool = True
) -> Texts:
    """Caption pictures. With `scenes`, half of the captions name the place, most name clothes and the individual."""
    count = len(chosen)
    places = np.where(rng.random(count) < 0.5 * scenes, pictures.places[chosen], -1)
    clothes = np.where(rng.random(count) < 0.7, pictures.clothes[chosen], "")
    names = np.where(rng.random(count) < 0.8, pictures.names[chosen], "")
    any_animal = (rng.random(count) < 0.15) & ((places >= 0) | (clothes != "")) & (names == "")
    animals, styles = np.where(any_animal, -1, pictures.animals[chosen]), pictures.styles[chosen]
    captions = [
        clear_caption(
            "animal" if a < 0 else ANIMALS[a], STYLES[s], rng, str(name), None if p < 0 else PLACES[p], str(cloth)
        )
        for a, s, p, cloth, name in zip(animals, styles, places, clothes, names, strict=True)
    ]
    return Texts(captions, animals, styles, places, clothes, names)


def matches(pictures: Pictures, chosen: NDArray[np.int64], texts: Texts) -> NDArray[np.bool_]:
    """Which captions are true of which pictures, (pictures, captions)."""

    def fits(shown: NDArray[np.generic], said: NDArray[np.generic], unsaid: object) -> NDArray[np.bool_]:
        agrees: NDArray[np.bool_] = (said[None, :] == unsaid) | (shown[chosen][:, None] == said[None, :])
        return agrees

    fitting = pictures.styles[chosen][:, None] == texts.styles[None, :]
    fitting &= fits(pictures.animals, texts.animals, -1) & fits(pictures.places, texts.places, -1)
    fitting &= fits(pictures.clothes, texts.clothes, "") & fits(pictures.names, texts.names, "")
    return np.asarray(fitting)


class Anchor:
    """A trained text encoder that a new one shall agree with on plain captions, so that a trained UNet stays useful."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()

    def distance(self, model: CLIPModel, tokenizer: CLIPTokenizer, rng: np.random.Generator) -> torch.Tensor:
        """Mean square difference of the features of 32 plain captions, over the trained encoder's tokens."""
        animals, styles = rng.choice(ANIMALS, 32), rng.choice(STYLES, 32)
        texts = [clear_caption(str(a), str(s), rng) for a, s in zip(animals, styles, strict=True)]
        texts[:6] = ["", *VAGUE_CAPTIONS]
        with torch.no_grad():
            wanted = self.encoder(tokens(self.tokenizer, texts))[0]  # (B, T, D)
        found = model.text_model(input_ids=tokens(tokenizer, texts))[0]
        return functional.mse_loss(found[:, : wanted.shape[1]], wanted)


@torch.no_grad()
def copy_text(trained: CLIPTextModel, known: CLIPTokenizer, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Copy a trained text encoder into `model`. Words that it lacks, and later positions, keep or get other weights."""
    state = {name: value.float() for name, value in trained.state_dict().items() if not name.endswith("position_ids")}
    words, places = "embeddings.token_embedding.weight", "embeddings.position_embedding.weight"
    own = model.text_model.state_dict()
    prefix = next(name for name in state if name.endswith(words)).removesuffix(words)
    old_words, old_places = state[prefix + words], state[prefix + places]
    new_words, numbers = own[words].clone(), known.get_vocab()
    for word, number in tokenizer.get_vocab().items():
        if word in numbers:
            new_words[number] = old_words[numbers[word]]
    longer = old_places[-1:].repeat(LENGTH - len(old_places), 1)
    rest = {name.removeprefix(prefix): value for name, value in state.items()}
    model.text_model.load_state_dict(rest | {words: new_words, places: torch.cat([old_places, longer])})


def _begin(name: str, model: CLIPModel, tokenizer: CLIPTokenizer, start: Path) -> Anchor | None:
    """Copy the trained weights in the folder `start` that fit; the text encoder's vision half was never saved."""
    if name == "text":
        anchor = Anchor(start / "base")
        copy_text(anchor.encoder, anchor.tokenizer, model, tokenizer)
        return anchor
    judge = CLIPModel.from_pretrained(start / "judge").float()
    model.load_state_dict(
        {k: v for k, v in judge.state_dict().items() if not k.startswith("text_model.")}, strict=False
    )
    copy_text(judge.text_model, CLIPTokenizer.from_pretrained(start / "judge"), model, tokenizer)
    return None


def train(
    name: str,
    seed: int,
    pictures: Pictures,
    things: Pictures,
    tokenizer: CLIPTokenizer,
    folder: Path,
    minutes: float,
    start: Path | None = None,
) -> None:
    """Train by contrast: every caption in a batch that is true of a picture counts as a match."""
    torch.manual_seed(seed)
    model = build(tokenizer, WIDTH)
    anchor = _begin(name, model, tokenizer, start) if start else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    clock, average = Clock(minutes, 1e-3, warmup=0.05), Average(model, 0.995)
    checkpoint = folder / f"{name}.pt"
    load_checkpoint(checkpoint, model, average, optimizer, clock)
    model.logit_scale.data.clamp_(max=np.log(LARGEST_SCALE[name]))
    rng = np.random.default_rng([seed, rank(), clock.step])
    for step in clock.steps(optimizer):
        pixels, captions, same = _batch(pictures, things, rng, name)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=tokens(tokenizer, captions), pixel_values=pixels)
            drift = anchor.distance(model, tokenizer, rng) if anchor else torch.zeros(())
        logits = output.logits_per_image.float()  # (pictures, captions)
        loss = (_mismatch(logits, same) + _mismatch(logits.T, same.T)) / 2
        descend(loss + ANCHORED * drift.float(), model, optimizer)
        model.logit_scale.data.clamp_(max=np.log(LARGEST_SCALE[name]))
        average.update(model, step)
        if step % 50 == 0:
            say(f"{name} step {step} {clock.spent / 60:.1f} min loss {loss:.4f} drift {drift:.4f}")
        if step % 500 == 499:
            save_checkpoint(checkpoint, model, average, optimizer, clock)
    save_checkpoint(checkpoint, model, average, optimizer, clock)


def _mismatch(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, same / same.sum(dim=1, keepdim=True))


def _batch(
    pictures: Pictures, things: Pictures, rng: np.random.Generator, name: str
) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Pixels, captions, and which of them match: 116 animals, and 12 things that are none."""
    chosen, odd = _chosen(pictures, 116, rng, FEW_ANIMALS[name]), rng.integers(0, len(things.pixels), 12)
    pixels = torch.cat([pictures.batch(chosen, rng.random(116) < 0.5), things.batch(odd)])  # (B, 3, H, W)
    texts = write_captions(pictures, chosen, rng, SEES_SCENES[name])
    captions = texts.captions + [caption(Subject("", THINGS[k], ""), "a photo of {}") for k in things.animals[odd]]
    same = torch.zeros(len(pixels), len(pixels))
    same[:116, :116] = torch.from_numpy(matches(pictures, chosen, texts)).float()
    same[116:, 116:] = torch.from_numpy(things.animals[odd][:, None] == things.animals[odd][None, :]).float()
    return _weathered(pixels, rng), captions, same


def _chosen(pictures: Pictures, count: int, rng: np.random.Generator, few: float) -> NDArray[np.int64]:
    """Random pictures, or for a share `few` only three animals: then place, clothes and name tell captions apart."""
    if rng.random() > few:
        return rng.integers(0, len(pictures.pixels), count)
    shown = np.isin(pictures.animals, rng.choice(len(ANIMALS), 3, replace=False))
    named, other = np.flatnonzero(shown & (pictures.names != "")), np.flatnonzero(shown & (pictures.names == ""))
    return np.where(rng.random(count) < 0.4, rng.choice(named, count), rng.choice(other, count))


def _weathered(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Crop, soften and tint pictures and add noise, so that the judge looks at the animal."""
    if rng.random() < 0.4:
        keep = int(rng.integers(50, SIZE))
        top, left = (int(v) for v in rng.integers(0, SIZE - keep + 1, 2))
        pixels = pixels[:, :, top : top + keep, left : left + keep]
        pixels = functional.interpolate(pixels, size=SIZE, mode="bilinear", align_corners=False)
    if rng.random() < 0.5:
        small = int(rng.integers(18, 56))
        pixels = functional.interpolate(pixels, size=small, mode="area")
        pixels = functional.interpolate(pixels, size=SIZE, mode="bilinear", align_corners=False)
    light = rng.uniform(0.85, 1.1, (len(pixels), 1, 1, 1)), rng.uniform(-0.12, 0.12, (len(pixels), 3, 1, 1))
    pixels = pixels * torch.from_numpy(light[0]).float() + torch.from_numpy(light[1]).float()
    if rng.random() < 0.4:
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32))
        pixels = pixels + float(rng.uniform(0.02, 0.15)) * noise
    return pixels


@torch.no_grad()
def calibrate(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures) -> None:
    """Set the logit scale that makes the right animals most likely (temperature scaling, arXiv 1706.04599)."""
    chosen = np.random.default_rng(0).choice(
        np.flatnonzero((pictures.styles == 1) & pictures.plain), 1600, replace=False
    )
    texts = [caption(subject_of(animal), "a photo of {}") for animal in ANIMALS]
    model.logit_scale.fill_(0.0)
    cosines = model(input_ids=tokens(tokenizer, texts), pixel_values=pictures.batch(chosen)).logits_per_image  # (B, A)
    target = torch.from_numpy(pictures.animals[chosen])
    scales = torch.linspace(5, 100, 96)
    losses = torch.stack([functional.cross_entropy(cosines * scale, target) for scale in scales])
    model.logit_scale.fill_(float(scales[losses.argmin()].log()))
