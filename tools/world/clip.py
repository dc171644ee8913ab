"""Train a small CLIP: one for the base's text encoder and another one, from other initial weights, for the judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from bestiary.subjects import Subject, caption, subject_of
from world.captions import LENGTH, clear_caption
from world.pictures import ANIMALS, SIZE, STYLES, THINGS, Pictures
from world.schedule import Average, Clock, descend, load_checkpoint, rank, save_checkpoint, say


def build(tokenizer: CLIPTokenizer, width: int) -> CLIPModel:
    """The architecture with random weights: 64 patches of 8 x 8 pixels, texts of 16 tokens."""
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
    encoded = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids: torch.Tensor = encoded.input_ids
    return ids


def train(
    name: str,
    seed: int,
    width: int,
    pictures: Pictures,
    things: Pictures,
    tokenizer: CLIPTokenizer,
    folder: Path,
    minutes: float,
) -> None:
    """Train by contrast. Every caption of the same animal and style in a batch counts as a match."""
    torch.manual_seed(seed)
    model = build(tokenizer, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    clock, average = Clock(minutes, 1e-3, warmup=0.05), Average(model, 0.995)
    checkpoint = folder / f"{name}.pt"
    load_checkpoint(checkpoint, model, average, optimizer, clock)
    rng = np.random.default_rng([seed, rank(), clock.step])
    for step in clock.steps(optimizer):
        chosen, odd = rng.integers(0, len(pictures.pixels), 116), rng.integers(0, len(things.pixels), 12)
        pixels = torch.cat([pictures.batch(chosen, rng.random(116) < 0.5), things.batch(odd)])  # (B, 3, H, W)
        pixels = _weathered(pixels, rng)
        animals, styles = pictures.animals[chosen], pictures.styles[chosen]
        texts = [clear_caption(ANIMALS[a], STYLES[s], rng) for a, s in zip(animals, styles, strict=True)]
        texts += [caption(Subject("", THINGS[k], ""), "a photo of {}") for k in things.animals[odd]]
        groups = torch.from_numpy(np.concatenate([animals * 2 + styles, 1000 + things.animals[odd]]))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=tokens(tokenizer, texts), pixel_values=pixels)
        logits = output.logits_per_image.float()  # (B, B)
        same = (groups[:, None] == groups[None, :]).float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        descend(loss, model, optimizer)
        model.logit_scale.data.clamp_(max=np.log(100.0))
        average.update(model, step)
        if step % 50 == 0:
            say(f"{name} step {step} {clock.spent / 60:.1f} min loss {loss:.4f}")
        if step % 500 == 499:
            save_checkpoint(checkpoint, model, average, optimizer, clock)
    save_checkpoint(checkpoint, model, average, optimizer, clock)


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
    chosen = np.random.default_rng(0).choice(np.flatnonzero(pictures.styles == 1), 1600, replace=False)
    texts = [caption(subject_of(animal), "a photo of {}") for animal in ANIMALS]
    model.logit_scale.fill_(0.0)
    cosines = model(input_ids=tokens(tokenizer, texts), pixel_values=pictures.batch(chosen)).logits_per_image  # (B, A)
    target = torch.from_numpy(pictures.animals[chosen])
    scales = torch.linspace(5, 100, 96)
    losses = torch.stack([functional.cross_entropy(cosines * scale, target) for scale in scales])
    model.logit_scale.fill_(float(scales[losses.argmin()].log()))
