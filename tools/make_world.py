"""Make the embedded models again with one command: render, train, save, and write down how good each part is.

python tools/make_world.py               # everything; goes on from its checkpoints when it was stopped
python tools/make_world.py judge vae     # only these parts; parts that do not need each other can run side by side
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from world import card, clip, unet, vae
from world.captions import train_tokenizer
from world.pictures import FRESH_SEEDS, JUDGE_SEEDS, SIZE, Pictures, rendered, rendered_things
from world.schedule import average_weights, minutes_spent

ROOT = Path(__file__).parents[1]
PARTS = ("text", "judge", "vae", "unet", "base", "card")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "world", help="Renders and checkpoints."
)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Threads of each training.")
@click.option("--clip-minutes", default=15.0, show_default=True, help="For each of the two CLIPs.")
@click.option("--vae-minutes", default=40.0, show_default=True)
@click.option("--unet-minutes", default=60.0, show_default=True)
def main(
    parts: tuple[str, ...], cache: Path, threads: int, clip_minutes: float, vae_minutes: float, unet_minutes: float
) -> None:
    """Render, train and save the embedded world."""
    torch.set_num_threads(threads)
    pictures, things = rendered(cache, per_style=12_000), rendered_things(cache, 2_000)
    words = cache / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(words) if words.exists() else train_tokenizer(words)
    for part in parts or PARTS:
        if part == "text":
            clip.train("text", 11, 128, pictures, things, tokenizer, cache, clip_minutes)
        elif part == "judge":
            # the judge must know an owl by day: other pictures than the base's, most of them away from home
            anywhere = rendered(cache, per_style=12_000, first_seed=JUDGE_SEEDS, at_home=0.25)
            clip.train("judge", 12, 128, anywhere, things, tokenizer, cache, clip_minutes)
            save_judge(pictures, tokenizer, cache)
        elif part == "vae":
            vae.train(pictures, cache, vae_minutes)
        elif part == "unet":
            text = _text_encoder(tokenizer, cache)
            latents = vae.encode_all(vae.load_whitened(cache / "vae.pt", pictures), pictures, cache / "latents.npy")
            unet.train(pictures, latents, text, tokenizer, cache, unet_minutes)
        elif part == "base":
            save_base(pictures, tokenizer, cache)
        else:
            fresh = rendered(cache, per_style=800, first_seed=FRESH_SEEDS)
            minutes = {name: minutes_spent(cache / f"{name}.pt") for name in ("text", "judge", "vae", "unet")}
            card.write(ROOT / "models", ROOT / "docs" / "pictures", fresh, minutes)


def _text_encoder(tokenizer: CLIPTokenizer, cache: Path) -> CLIPTextModel:
    whole = clip.build(tokenizer, 128)
    whole.load_state_dict(average_weights(cache / "text.pt"))
    text = CLIPTextModel(whole.config.text_config)
    text.load_state_dict(whole.text_model.state_dict())
    return text.eval()


def save_judge(pictures: Pictures, tokenizer: CLIPTokenizer, cache: Path) -> None:
    """Write models/judge from the newest checkpoint, in half precision."""
    judge = clip.build(tokenizer, 128)
    judge.load_state_dict(average_weights(cache / "judge.pt"))
    clip.calibrate(judge.eval(), tokenizer, pictures)
    judge.half().save_pretrained(ROOT / "models" / "judge")
    tokenizer.save_pretrained(ROOT / "models" / "judge")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(ROOT / "models" / "judge")


def save_base(pictures: Pictures, tokenizer: CLIPTokenizer, cache: Path) -> None:
    """Write models/base, a whole pipeline, from the newest checkpoints, in half precision."""
    autoencoder, denoiser = vae.load_whitened(cache / "vae.pt", pictures), unet.build(128)
    denoiser.load_state_dict(average_weights(cache / "unet.pt"))
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=_text_encoder(tokenizer, cache),
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=unet.noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(ROOT / "models" / "base")


if __name__ == "__main__":
    main()
