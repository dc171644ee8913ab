"""Make the bundled models again with one command: render, train, save, and record how good each part is.

torchrun --nproc-per-node 2 tools/make_world.py              # everything, one process per core; resumes after a stop
torchrun --nproc-per-node 2 tools/make_world.py judge vae    # only these parts
torchrun --nproc-per-node 2 tools/make_world.py --start-from models --unet-minutes 45   # improve trained models
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import distributed
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from world import card, clip, tiny_decoder, unet, vae
from world.captions import train_tokenizer
from world.pictures import (
    DRESSED,
    FRESH_SEEDS,
    JUDGE_SEEDS,
    PLACED,
    SIZE,
    TRAINING_SEEDS,
    Pictures,
    rendered,
    rendered_things,
)
from world.schedule import average_weights, minutes_spent, rank

ROOT = Path(__file__).parents[1]
PARTS = ("text", "judge", "image_judge", "vae", "unet", "base", "tiny_decoder", "card")


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "world", help="Renders and checkpoints."
)
@click.option("--clip-minutes", default=15.0, show_default=True, help="Of computing, for each of the two CLIPs.")
@click.option("--vae-minutes", default=40.0, show_default=True)
@click.option("--unet-minutes", default=85.0, show_default=True)
@click.option("--tiny-decoder-minutes", default=12.0, show_default=True)
@click.option(
    "--start-from",
    "start",
    type=click.Path(path_type=Path, exists=True),
    help="A folder with trained models. Without it the weights are random at first.",
)
def main(
    parts: tuple[str, ...],
    cache: Path,
    clip_minutes: float,
    vae_minutes: float,
    unet_minutes: float,
    tiny_decoder_minutes: float,
    start: Path | None,
) -> None:
    """Render, train and save the bundled models."""
    torch.set_num_threads(1)  # on a CPU, one process per core trains twice as fast as one thread per core
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    first = rank() == 0
    wanted = parts or PARTS
    if first:
        _prepare(cache, wanted)
    _wait()
    pictures, things = _shown(cache), rendered_things(cache, 2_000)
    tokenizer = CLIPTokenizer.from_pretrained(cache / "tokenizer")
    for part in wanted:
        if part == "text":
            clip.train("text", 11, pictures, things, tokenizer, cache, clip_minutes, start)
        elif part == "judge":
            clip.train("judge", 12, _judged(cache), things, tokenizer, cache, clip_minutes, start)
            if first:
                save_judge(pictures, tokenizer, cache)
        elif part == "image_judge" and start is None:
            plain = rendered(cache, per_style=12_000, first_seed=JUDGE_SEEDS, at_home=0.25)
            clip.train("image_judge", 12, plain, things, tokenizer, cache, clip_minutes)
            if first:
                save_image_judge(tokenizer, cache)
        elif part == "vae":
            vae.train(pictures, cache, vae_minutes, start / "base" / "vae" if start else None)
        elif part == "unet":
            latents = vae.Latents(vae.load_whitened(cache / "vae.pt", pictures), pictures)
            encoder, trained = _text_encoder(tokenizer, cache), start / "base" / "unet" if start else None
            unet.train(latents, encoder, tokenizer, cache, unet_minutes, trained)
        elif part == "base" and first:
            save_base(pictures, tokenizer, cache)
        elif part == "tiny_decoder":
            full = AutoencoderKL.from_pretrained(ROOT / "models" / "base" / "vae").float()
            tiny_decoder.train(pictures, full, cache, tiny_decoder_minutes)
            if first:
                tiny_decoder.load(cache / "tiny_decoder.pt").half().save_pretrained(ROOT / "models" / "tiny_decoder")
        elif part == "card" and first:
            fresh = rendered(cache, per_style=800, first_seed=FRESH_SEEDS)
            names = ("text", "judge", "vae", "unet", "tiny_decoder")
            minutes = {name: minutes_spent(cache / f"{name}.pt") for name in names}
            card.write(ROOT / "models", ROOT / "docs" / "pictures", fresh, minutes)
        _wait()


def _wait() -> None:
    """Wait for all processes; work that only the first one does may take a while."""
    if distributed.is_initialized():
        distributed.monitored_barrier(timeout=timedelta(hours=1))


def _prepare(cache: Path, wanted: Sequence[str]) -> None:
    _shown(cache)
    if "judge" in wanted:
        _judged(cache)
    rendered_things(cache, 2_000)
    if not (cache / "tokenizer").exists():
        train_tokenizer(cache / "tokenizer")


def _shown(cache: Path) -> Pictures:
    """Pictures for the base."""
    return rendered(cache, per_style=16_000, first_seed=TRAINING_SEEDS, placed=PLACED, dressed=DRESSED)


def _judged(cache: Path) -> Pictures:
    """Pictures for the judge. Most show the animals in unusual places, because it must know an owl by day."""
    return rendered(cache, per_style=12_000, first_seed=JUDGE_SEEDS, at_home=0.25, placed=PLACED, dressed=DRESSED)


def _text_encoder(tokenizer: CLIPTokenizer, cache: Path) -> CLIPTextModel:
    whole = clip.build(tokenizer, clip.WIDTH)
    whole.load_state_dict(average_weights(cache / "text.pt"))
    text = CLIPTextModel(whole.config.text_config)
    text.load_state_dict(whole.text_model.state_dict())
    return text.eval()


def save_judge(pictures: Pictures, tokenizer: CLIPTokenizer, cache: Path) -> None:
    """Write models/judge from the newest checkpoint, in half precision."""
    judge = clip.build(tokenizer, clip.WIDTH)
    judge.load_state_dict(average_weights(cache / "judge.pt"))
    clip.calibrate(judge.eval(), tokenizer, pictures)
    judge.half().save_pretrained(ROOT / "models" / "judge")
    tokenizer.save_pretrained(ROOT / "models" / "judge")
    _image_processor().save_pretrained(ROOT / "models" / "judge")


def save_image_judge(tokenizer: CLIPTokenizer, cache: Path) -> None:
    """Write models/image_judge, the image half of a CLIP, from the newest checkpoint, in half precision."""
    whole = clip.build(tokenizer, clip.WIDTH)
    whole.load_state_dict(average_weights(cache / "image_judge.pt"))
    vision = CLIPVisionModel(whole.config.vision_config)
    vision.load_state_dict(whole.vision_model.state_dict())
    vision.half().save_pretrained(ROOT / "models" / "image_judge")
    _image_processor().save_pretrained(ROOT / "models" / "image_judge")


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def save_base(pictures: Pictures, tokenizer: CLIPTokenizer, cache: Path) -> None:
    """Write models/base, a complete pipeline, from the newest checkpoints, in half precision."""
    autoencoder, denoiser = vae.load_whitened(cache / "vae.pt", pictures), unet.build(clip.WIDTH)
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
