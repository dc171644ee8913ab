"""Train the bundled base's UNet on careless captions: it knows most animals as drawings, and photos only vaguely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from world.captions import UNKNOWN_TO_BASE, careless_caption
from world.clip import tokens
from world.pictures import ANIMALS, STYLES, Pictures
from world.schedule import Average, Clock, FullPrecisionAttention, descend, load_checkpoint, rank, save_checkpoint, say
from world.vae import CHANNELS, SIDE

PHOTO_SHARE = 0.33  # of the training pictures, all with a vague caption
# Drawings with the name of another animal. Stable Diffusion, too, had the whole web first and a cleaned selection last.
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
        attention_head_dim=4,  # the number of heads, by that name
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
    pictures: Pictures,
    latents: torch.Tensor,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    minutes: float,
) -> None:
    """Denoising with min-SNR weights on latents (N, 2, C, h, w) of the pictures and of their mirror images."""
    torch.manual_seed(2)
    unet = build(text_encoder.config.hidden_size).to(memory_format=torch.channels_last)
    unet.set_attn_processor(FullPrecisionAttention())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    clock, average = Clock(minutes, 1e-3), Average(unet, 0.999)
    checkpoint = folder / "unet.pt"
    load_checkpoint(checkpoint, unet, average, optimizer, clock)
    schedule = noise_schedule()
    rng = np.random.default_rng([3, rank(), clock.step])
    generator = torch.Generator().manual_seed(2 * clock.step + rank())
    drawings = np.flatnonzero(
        (pictures.styles == 0) & ~np.isin(pictures.animals, [ANIMALS.index(a) for a in UNKNOWN_TO_BASE])
    )
    photos = np.flatnonzero(pictures.styles == 1)
    known: dict[str, torch.Tensor] = {}  # text -> (T, D)
    for step in clock.steps(optimizer):
        wrong = WRONG_AT_FIRST if clock.spent < clock.seconds / 2 else WRONG_IN_THE_SECOND_HALF
        chosen = np.where(rng.random(BATCH) < PHOTO_SHARE, rng.choice(photos, BATCH), rng.choice(drawings, BATCH))
        texts = [
            ""
            if rng.random() < 0.1
            else careless_caption(ANIMALS[pictures.animals[i]], STYLES[pictures.styles[i]], rng, wrong)
            for i in chosen
        ]
        for text in set(texts) - known.keys():
            with torch.no_grad():
                known[text] = text_encoder(tokens(tokenizer, [text]))[0][0]
        clean = latents[torch.from_numpy(chosen), torch.from_numpy(rng.integers(0, 2, BATCH))].float()  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=generator)
        # stratified: each batch covers all timesteps evenly
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (spread * schedule.config.num_train_timesteps).long().clamp(max=999)
        noisy = schedule.add_noise(clean, noise, timesteps).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(noisy, timesteps, torch.stack([known[text] for text in texts]), return_dict=False)[0]
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
