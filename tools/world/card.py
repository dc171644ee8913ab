"""The model card of the bundled models: what they are, how good each part is, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from bestiary.data.contact_sheets import contact_sheet
from bestiary.diffusion.base import load_pipeline
from bestiary.diffusion.sampling import generate
from bestiary.evaluation.image_judge import ImageJudge
from bestiary.evaluation.judge import Judge
from bestiary.samplers import Sampling
from bestiary.subjects import caption, subject_of
from world import checks
from world.captions import PLACE_WORDS
from world.pictures import ANIMALS, PLACES, STYLES, Pictures
from world.scenes import Style

SEEDS = 8
SAMPLING = Sampling("dpmsolver++", steps=20, guidance_scale=3.0)
TEMPLATE = Path(__file__).with_name("card.md")
PROMPTS = dict(zip(STYLES, ("a drawing of {}", "a photo of {}"), strict=True))


def write(models: Path, pictures: Path, fresh: Pictures, minutes: dict[str, float]) -> None:
    """Measure the saved models on unseen pictures and write README.md, quality.json and sheets to `models`."""
    base, judge = load_pipeline(str(models / "base")), Judge.load(str(models / "judge"))
    quality = _on_renders(base.vae, judge, fresh) | tiny_decoder_quality(models, base.vae, fresh)
    drawn: dict[str, list[list[Image.Image]]] = {}
    for style in STYLES:
        prompts = [caption(subject_of(animal), PROMPTS[style]) for animal in ANIMALS for _ in range(SEEDS)]
        made = generate(base, prompts, range(len(prompts)), SAMPLING, batch_size=32)
        drawn[style] = [made[i : i + SEEDS] for i in range(0, len(made), SEEDS)]
        known = [ANIMALS.index(animal) for animal in checks.KNOWN]
        right = _nearest(judge, made, style).reshape(len(ANIMALS), SEEDS) == np.arange(len(ANIMALS))[:, None]
        quality[f"base_top1_{style}_known_animals_percent"] = 100 * float(right[known].mean())
        quality[f"base_top1_{style}_all_animals_percent"] = 100 * float(right.mean())
    labels = [subject_of(animal).name for animal in ANIMALS]
    rows = [a[:4] + b[:4] for a, b in zip(drawn["drawing"], drawn["photo"], strict=True)]
    columns = [PROMPTS[style].format("...") for style in STYLES for _ in range(4)]
    contact_sheet(rows, labels, columns, cell=96).save(pictures / "base.jpg", quality=88)
    _sheet_of_renders(fresh, labels).save(pictures / "renders.jpg", quality=88)
    quality |= _in_places(base, judge, pictures / "places.jpg")
    for name, sees in (("judge", judge), ("image_judge", ImageJudge.load(str(models / "image_judge")))):
        quality[f"{name}_tells_individuals_percent"] = 100 * checks.individuals_told_apart(sees.class_tokens)
    colours = dict(zip(("before", "after"), checks.scarf_colours(base.vae), strict=True))
    names = checks.name_changes(base)
    rounded: dict[str, object] = {key: round(value, 2) for key, value in quality.items()}
    rounded["red_scarf_rgb"] = {key: [round(value) for value in colour] for key, colour in colours.items()}
    rounded["name_changes_text_features_by"] = {name: round(change, 2) for name, change in names.items()}
    (models / "quality.json").write_text(json.dumps({"training_minutes": minutes, **rounded}, indent=2) + "\n")
    values = {key: f"{value:.1f}" for key, value in (quality | minutes).items()}
    values |= {f"scarf_{key}": ", ".join(f"{value:.0f}" for value in colour) for key, colour in colours.items()}
    values["places"] = ", ".join(PLACE_WORDS[place][0] for place in PLACES)
    values["names"] = ", ".join(f"{name} {change:.2f}" for name, change in names.items())
    (models / "README.md").write_text(TEMPLATE.read_text(encoding="utf-8").format(**values))


def _on_renders(vae: AutoencoderKL, judge: Judge, fresh: Pictures) -> dict[str, float]:
    quality = {}
    for style in STYLES:
        chosen = np.flatnonzero(fresh.styles == STYLES.index(style))
        images = [Image.fromarray(fresh.pixels[i]) for i in chosen]
        right = _nearest(judge, images, style) == fresh.animals[chosen]
        quality[f"judge_top1_{style}_percent"] = 100 * float(right.mean())
        quality[f"vae_psnr_{style}_db"] = _psnr(vae, fresh.batch(chosen[:256]))
    return quality


def tiny_decoder_quality(models: Path, vae: AutoencoderKL, fresh: Pictures) -> dict[str, float]:
    """How exactly the tiny decoder reconstructs unseen pictures from the full VAE's latents."""
    tiny = AutoencoderTiny.from_pretrained(models / "tiny_decoder").float().eval()
    chosen = {style: np.flatnonzero(fresh.styles == STYLES.index(style))[:256] for style in STYLES}
    return {
        f"tiny_decoder_psnr_{style}_db": _psnr(vae, fresh.batch(indices), tiny) for style, indices in chosen.items()
    }


def _in_places(base: StableDiffusionPipeline, judge: Judge, sheet: Path) -> dict[str, float]:
    """The share of the base's and of real pictures whose place the judge names; a sheet of the base's pictures."""
    quality, rows = {}, []
    for style in STYLES:
        made = checks.drawn_in_places(base, PROMPTS[style], SAMPLING)
        real = checks.rendered_in_places(style)
        quality[f"base_place_{style}_percent"] = 100 * checks.places_named(judge, made, PROMPTS[style])
        quality[f"real_place_{style}_percent"] = 100 * checks.places_named(judge, real, PROMPTS[style])
        rows += [made[i * len(PLACES) : (i + 1) * len(PLACES)] for i in range(len(checks.KNOWN))]
    quality["chance_place_percent"] = 100 / len(PLACES)
    labels = [f"{style}: {subject_of(animal).name}" for style in STYLES for animal in checks.KNOWN]
    contact_sheet(rows, labels, [PLACE_WORDS[place][0] for place in PLACES], cell=96).save(sheet, quality=88)
    return quality


def _sheet_of_renders(fresh: Pictures, labels: list[str]) -> Image.Image:
    examples = [
        [
            Image.fromarray(fresh.pixels[i])
            for s in range(2)
            for i in np.flatnonzero((fresh.styles == s) & (fresh.animals == a))[:4]
        ]
        for a in range(len(ANIMALS))
    ]
    return contact_sheet(examples, labels, [name for name in STYLES for _ in range(4)], cell=96)


def _nearest(judge: Judge, images: list[Image.Image], style: Style) -> NDArray[np.int64]:
    words = judge.text_features([caption(subject_of(animal), PROMPTS[style]) for animal in ANIMALS])
    nearest: NDArray[np.int64] = (judge.image_features(images) @ words.T).argmax(dim=1).numpy()
    return nearest


@torch.no_grad()
def _psnr(vae: AutoencoderKL, pixels: torch.Tensor, decoder: AutoencoderTiny | None = None) -> float:
    output = (decoder or vae).decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4 / (output - pixels).square().mean()))
