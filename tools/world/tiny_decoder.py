"""Train the bundled tiny decoder, from 16 x 16 x 8 latents to 64 x 64 pictures, like TAESD for Stable Diffusion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn import functional

from world.pictures import Pictures
from world.schedule import (
    Average,
    Clock,
    average_weights,
    descend,
    load_checkpoint,
    rank,
    save_checkpoint,
    say,
)
from world.vae import CHANNELS, DRESSED_SHARE, Latents

WIDTH = 48  # channels of each convolution in the decoder
BATCH = 16  # of each process
LEARNING_RATE = 2e-3


def build() -> AutoencoderTiny:
    """The architecture with random weights: three resolutions.

    The last one has no block. Wider layers at the lower resolutions cost the same and reconstruct better.
    """
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        decoder_block_out_channels=(WIDTH,) * 3,
        num_decoder_blocks=(3, 2, 0),
        encoder_block_out_channels=(16,) * 3,
        num_encoder_blocks=(0, 1, 1),
        scaling_factor=1.0,
    )


def train(pictures: Pictures, full: AutoencoderKL, folder: Path, minutes: float) -> None:
    """Train to reconstruct the pictures from the `full` VAE's latents (L1, L2, L1 of gradients and of mean colours).

    The small encoder learns the full VAE's latents, so that the whole folder works as an autoencoder. `load` reads
    the checkpoint.
    """
    torch.manual_seed(2)
    tiny = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, average = Clock(minutes, LEARNING_RATE), Average(tiny, 0.998)
    checkpoint = folder / "tiny_decoder.pt"
    load_checkpoint(checkpoint, tiny, average, optimizer, clock)

    known = Latents(full, pictures)
    rng = np.random.default_rng([rank(), clock.step])
    plain, dressed = np.flatnonzero(pictures.plain), np.flatnonzero(~pictures.plain)
    for step in clock.steps(optimizer):
        colourful = rng.random(BATCH) < DRESSED_SHARE
        chosen = np.where(colourful, rng.choice(dressed, BATCH), rng.choice(plain, BATCH))
        mirrored = rng.integers(0, 2, BATCH)
        pixels = pictures.batch(chosen, mirrored == 1).to(memory_format=torch.channels_last)
        latents = known.of(chosen, mirrored)  # (B, C, h, w)
        with torch.autocast("cpu", torch.bfloat16):
            output = tiny.decoder(latents)
            guessed = tiny.encoder(pixels)
        error = output.float() - pixels  # (B, 3, H, W)
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        tint = functional.avg_pool2d(error, 4).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.3 * edges + tint
        loss = loss + 0.05 * (guessed.float() - latents).square().mean()
        descend(loss, tiny, optimizer)
        average.update(tiny, step)
        if step % 100 == 0:
            psnr = 10 * torch.log10(4 / error.square().mean())
            say(f"tiny decoder step {step} {clock.spent / 60:.1f} min loss {loss:.4f} psnr {psnr:.2f} dB")
        if step % 500 == 499:
            save_checkpoint(checkpoint, tiny, average, optimizer, clock)
    save_checkpoint(checkpoint, tiny, average, optimizer, clock)


def load(checkpoint: Path) -> AutoencoderTiny:
    """The trained autoencoder."""
    tiny = build()
    tiny.load_state_dict(average_weights(checkpoint))
    return tiny.eval()
