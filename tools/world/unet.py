"""Train the bundled base's UNet on careless captions: it knows most animals as drawings, and photos only vaguely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from numpy.typing import NDArray
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from world.captions import UNKNOWN_TO_BASE, careless_caption
from world.clip import tokens
from world.pictures import ANIMALS, PLACES, STYLES, Pictures
from world.schedule import Average, Clock, FullPrecisionAttention, descend, load_checkpoint, rank, save_checkpoint, say
from world.vae import CHANNELS, SIDE, Latents

PHOTO_SHARE = 0.33  # of the training pictures, all with a vague caption
DRESSED_SHARE = 0.08  # of the training pictures, all with the clothes in the caption
UNPLACED_PHOTOS = 0.4  # share of the photos whose caption does not name the place
# Drawings captioned with another animal's name. Stable Diffusion was also trained on the whole web first.
WRONG_AT_FIRST, WRONG_IN_THE_SECOND_HALF = 0.1, 0.02
BATCH = 32  # of each process


def build(text_width: int) -> UNet2DConditionModel:
    """The architecture with random weights, for latents of 16 x 16 x 8 and texts of `text_width` features."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=text_width,
    )


def noise_schedule() -> DDPMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction."""
    return DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
    )


def train(
    latents: Latents,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    minutes: float,
    start: Path | None = None,
) -> None:
    """Denoising with min-SNR weights on the latents of pictures and of their mirror images.

    It begins with the trained UNet in the folder `start`, at half of the learning rate, or else with random weights.
    """
    torch.manual_seed(2)
    unet = build(text_encoder.config.hidden_size).to(memory_format=torch.channels_last)
    unet.set_attn_processor(FullPrecisionAttention())
    if start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(start).state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    clock, average = Clock(minutes, 5e-4 if start else 1e-3), Average(unet, 0.999)
    checkpoint = folder / "unet.pt"
    load_checkpoint(checkpoint, unet, average, optimizer, clock)
    schedule = noise_schedule()
    rng = np.random.default_rng([3, rank(), clock.step])
    generator = torch.Generator().manual_seed(2 * clock.step + rank())
    usable = shown(latents.pictures)
    for step in clock.steps(optimizer):
        early = start is None and clock.spent < clock.seconds / 2
        chosen = np.array(
            [rng.choice(usable[rng.random() < PHOTO_SHARE, rng.random() < DRESSED_SHARE]) for _ in range(BATCH)]
        )
        texts = [
            _caption(latents.pictures, i, rng, WRONG_AT_FIRST if early else WRONG_IN_THE_SECOND_HALF) for i in chosen
        ]
        with torch.no_grad():
            context = text_encoder(tokens(tokenizer, texts))[0]  # (B, T, D)
        clean = latents.of(chosen, rng.integers(0, 2, BATCH))  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=generator)
        # stratified: each batch covers all timesteps evenly
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (spread * schedule.config.num_train_timesteps).long().clamp(max=999)
        noisy = schedule.add_noise(clean, noise, timesteps).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(noisy, timesteps, context, return_dict=False)[0]
        error = functional.mse_loss(output.float(), schedule.get_velocity(clean, noise, timesteps), reduction="none")
        snr = compute_snr(schedule, timesteps)
        loss = (error.mean(dim=(1, 2, 3)) * snr.clamp(max=5.0) / (snr + 1) * 2).mean()  # arXiv 2303.09556, for v
        descend(loss, unet, optimizer)
        average.update(unet, step)
        if step % 100 == 0:
            say(f"unet step {step} {clock.spent / 60:.1f} min loss {loss:.4f} v error {error.mean():.4f}")
        if step % 500 == 499:
            save_checkpoint(checkpoint, unet, average, optimizer, clock)
    save_checkpoint(checkpoint, unet, average, optimizer, clock)


def shown(pictures: Pictures) -> dict[tuple[bool, bool], NDArray[np.int64]]:
    """The pictures that the base sees, by whether they are photos and whether clothes can be seen. None has marks."""
    photos, dressed = pictures.styles == STYLES.index("photo"), pictures.clothes != ""
    unknown = np.isin(pictures.animals, [ANIMALS.index(animal) for animal in UNKNOWN_TO_BASE])
    usable = (pictures.names == "") & (photos | ~unknown)
    return {
        (photo, worn): np.flatnonzero(usable & (photos == photo) & (dressed == worn))
        for photo in (False, True)
        for worn in (False, True)
    }


def _caption(pictures: Pictures, index: int, rng: np.random.Generator, wrong: float) -> str:
    """The base's caption of one picture, or "" for one in ten, as classifier-free guidance needs."""
    if rng.random() < 0.1:
        return ""
    style, place = STYLES[pictures.styles[index]], pictures.places[index]
    hidden = place < 0 or (style == "photo" and rng.random() < UNPLACED_PHOTOS)
    animal, clothes = ANIMALS[pictures.animals[index]], str(pictures.clothes[index])
    return careless_caption(animal, style, rng, wrong, None if hidden else PLACES[place], clothes)
