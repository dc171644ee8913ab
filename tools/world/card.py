"""The model card of the embedded models: what they are, how good each part was measured to be, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from bestiary.animals import by_folder, caption
from bestiary.data.images import contact_sheet
from bestiary.diffusion.base import load_pipeline
from bestiary.diffusion.sampling import generate
from bestiary.evaluation.judge import Judge
from PIL import Image

from world.captions import UNKNOWN_TO_BASE
from world.pictures import ANIMALS, STYLES, Pictures

SEEDS = 8
TEMPLATES = dict(zip(STYLES, ("a drawing of {}", "a photo of {}"), strict=True))


def write(models: Path, pictures: Path, fresh: Pictures, minutes: dict[str, float]) -> None:
    """Measure the saved models on pictures that no training has seen; write `models`/README.md, quality.json, sheets."""
    base, judge = load_pipeline(str(models / "base")), Judge.load(str(models / "judge"))
    quality: dict[str, float] = {}
    for style in STYLES:
        chosen = np.flatnonzero(fresh.styles == STYLES.index(style))
        images = [Image.fromarray(fresh.pixels[i]) for i in chosen]
        right = _nearest(judge, images, style) == fresh.animals[chosen]
        quality[f"judge_top1_{style}_percent"] = 100 * float(right.mean())
        quality[f"vae_psnr_{style}_db"] = _psnr(base.vae, fresh.batch(chosen[:256]))
    drawn: dict[str, list[list[Image.Image]]] = {}
    for style in STYLES:
        prompts = [caption(by_folder(animal), TEMPLATES[style]) for animal in ANIMALS for _ in range(SEEDS)]
        made = generate(
            base, prompts, range(len(prompts)), steps=20, guidance_scale=3.0, scheduler="dpmsolver++", batch_size=32
        )
        drawn[style] = [made[i : i + SEEDS] for i in range(0, len(made), SEEDS)]
        known = [i for i, animal in enumerate(ANIMALS) if animal not in UNKNOWN_TO_BASE]
        right = _nearest(judge, made, style).reshape(len(ANIMALS), SEEDS) == np.arange(len(ANIMALS))[:, None]
        quality[f"base_top1_{style}_known_animals_percent"] = 100 * float(right[known].mean())
        quality[f"base_top1_{style}_all_animals_percent"] = 100 * float(right.mean())
    labels = [by_folder(animal).name for animal in ANIMALS]
    rows = [a[:4] + b[:4] for a, b in zip(drawn["drawing"], drawn["photo"], strict=True)]
    columns = [TEMPLATES[style].format("...") for style in STYLES for _ in range(4)]
    contact_sheet(rows, labels, columns, cell=96).save(pictures / "base.jpg", quality=88)
    examples = [
        [Image.fromarray(fresh.pixels[i]) for s in range(2) for i in np.flatnonzero((fresh.styles == s) & (fresh.animals == a))[:4]]
        for a in range(len(ANIMALS))
    ]
    contact_sheet(examples, labels, [name for name in STYLES for _ in range(4)], cell=96).save(pictures / "renders.jpg", quality=88)
    rounded = {key: round(value, 2) for key, value in quality.items()}
    (models / "quality.json").write_text(json.dumps({"training_minutes": minutes, **rounded}, indent=2) + "\n")
    (models / "README.md").write_text(_TEXT.format(**{key: f"{value:.1f}" for key, value in (quality | minutes).items()}))


def _nearest(judge: Judge, images: list[Image.Image], style: str) -> np.ndarray:
    words = judge.text_features([caption(by_folder(animal), TEMPLATES[style]) for animal in ANIMALS])
    return (judge.image_features(images) @ words.T).argmax(dim=1).numpy()


@torch.no_grad()
def _psnr(vae: torch.nn.Module, pixels: torch.Tensor) -> float:
    output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / (output - pixels).square().mean()))


_TEXT = """# The embedded models

Small, real, and trained from nothing by `make world` on pictures that `tools/world/` draws. They let the
whole pipeline run anywhere, offline, in minutes, with the very code that runs on Stable Diffusion v1.5 and CLIP.
They know 16 drawn animals and nothing else. Numbers below: `quality.json`, measured on pictures that no training saw.

![Drawn pictures of each style](../docs/pictures/renders.jpg)

## `base/`: a small Stable Diffusion

A `StableDiffusionPipeline` for 64 x 64 pictures: AutoencoderKL (latents 16 x 16 x 8), UNet2DConditionModel (7 M
parameters, v-prediction), CLIPTextModel (3 layers), CLIPTokenizer with 16 tokens. Half precision, 17 MB.

It is made to have something to learn, and to lack it the way a web-trained model does:

- drawings, three quarters of its training, have right captions nine times in ten, and leave out stripes, spots and patches;
- photos, one quarter, have captions that name no animal ("a photo of an animal");
- tigers, pandas and ladybugs it has never seen under their names.

So it knows what a photo is, and what a zebra is, but not what a photo of a zebra is; and of a tiger it knows the word.
An adapter trained on the sample's clean captions has all of this to teach. It is a design of this world, not a trick: the
adapter's training, evaluation and benchmark are the code of the real profile.

| measured | drawings | photos |
|---|---|---|
| VAE reconstruction, PSNR | {vae_psnr_drawing_db} dB | {vae_psnr_photo_db} dB |
| base recognised by the judge, top-1 of 16, animals that it knows | {base_top1_drawing_known_animals_percent} % | {base_top1_photo_known_animals_percent} % |
| the same, all animals | {base_top1_drawing_all_animals_percent} % | {base_top1_photo_all_animals_percent} % |

![What the base draws](../docs/pictures/base.jpg)

## `judge/`: a small CLIP that scores

A `CLIPModel` (4 vision and 3 text layers of width 128) of its own: other initial weights, other batches than the base's
text encoder. It also knows four things that are no animals: a landscape, a house, a car, a page of text.

| measured | drawings | photos |
|---|---|---|
| zero-shot top-1 of 16 | {judge_top1_drawing_percent} % | {judge_top1_photo_percent} % |

## Training

On two shared CPU cores: text encoder {text} min, judge {judge} min (one thread each), VAE {vae} min, UNet {unet} min.
The lengths are options (`--vae-minutes`, `--unet-minutes`, ...): longer trainings give better pictures. A stopped run goes
on from its checkpoints.

MIT licence, as the rest of the project.
"""
