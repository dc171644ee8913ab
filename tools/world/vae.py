"""Train the bundled VAE: 64 x 64 pictures to latents of 16 x 16 x 8 and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch.nn import functional

from world.pictures import SIZE, Pictures
from world.schedule import (
    Average,
    Clock,
    FullPrecisionAttention,
    average_weights,
    descend,
    load_checkpoint,
    rank,
    save_checkpoint,
    say,
)

CHANNELS, SIDE = 8, SIZE // 4  # of the latents
BATCH = 12  # of each process
DRESSED_SHARE = 0.5  # of the training pictures


def build() -> AutoencoderKL:
    """The architecture with random weights: a quarter of the size in each direction (Stable Diffusion: an eighth)."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def train(pictures: Pictures, folder: Path, minutes: float, start: Path | None = None) -> None:
    """Train on reconstruction (L1, L2, L1 of gradients and of mean colours) and a small KL term.

    It begins with the trained VAE in the folder `start`, at a third of the learning rate, or else with random weights.
    `load_whitened` reads the checkpoint.
    """
    torch.manual_seed(1)
    vae = build().to(memory_format=torch.channels_last)
    vae.set_attn_processor(FullPrecisionAttention())
    with torch.no_grad():  # start with little noise on the latents: with much noise the decoder learns the mean picture
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = -6
    if start:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start).state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, average = Clock(minutes, 5e-4 if start else 1.5e-3), Average(vae, 0.998)
    checkpoint = folder / "vae.pt"
    load_checkpoint(checkpoint, vae, average, optimizer, clock)

    rng = np.random.default_rng([rank(), clock.step])
    plain, dressed = np.flatnonzero(pictures.plain), np.flatnonzero(~pictures.plain)
    for step in clock.steps(optimizer):
        colourful = rng.random(BATCH) < DRESSED_SHARE
        indices = np.where(colourful, rng.choice(dressed, BATCH), rng.choice(plain, BATCH))
        pixels = pictures.batch(indices, rng.random(BATCH) < 0.5).to(memory_format=torch.channels_last)
        noise = torch.from_numpy(rng.standard_normal((BATCH, CHANNELS, SIDE, SIDE), dtype=np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        error = output.float() - pixels  # (B, 3, H, W)
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        tint = functional.avg_pool2d(error, 4).abs().mean()  # a wrong colour counts more than a wrong detail
        loss = error.abs().mean() + 2 * error.square().mean() + 0.3 * edges + tint
        loss = loss + 5e-7 * posterior.kl().float().mean()
        descend(loss, vae, optimizer)
        average.update(vae, step)
        if step % 100 == 0:
            say(f"vae step {step} {clock.spent / 60:.1f} min loss {loss:.4f} mse {error.square().mean():.5f}")
        if step % 500 == 499:
            save_checkpoint(checkpoint, vae, average, optimizer, clock)
    save_checkpoint(checkpoint, vae, average, optimizer, clock)


@torch.no_grad()
def load_whitened(checkpoint: Path, pictures: Pictures) -> AutoencoderKL:
    """The trained VAE. Its two 1 x 1 convolutions give each latent channel mean 0 and standard deviation 1."""
    vae = build()
    vae.load_state_dict(average_weights(checkpoint))
    vae.eval()
    rng = np.random.default_rng(0)
    means = torch.cat(
        [vae.encode(pictures.batch(rng.integers(0, len(pictures.pixels), 64))).latent_dist.mean for _ in range(16)]
    )  # (B, C, h, w)
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))  # (C,)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:CHANNELS] /= std[:, None, None, None]
    encode.bias[:CHANNELS] = (encode.bias[:CHANNELS] - mean) / std
    encode.bias[CHANNELS:] -= 2 * std.log()  # the second half is the logarithm of the variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]
    return vae


class Latents:
    """The latents of pictures and of their mirror images, encoded when they are first needed and then kept."""

    def __init__(self, vae: AutoencoderKL, pictures: Pictures) -> None:
        self.vae, self.pictures = vae.eval(), pictures
        self._kept = torch.zeros(len(pictures.pixels), 2, CHANNELS, SIDE, SIDE, dtype=torch.float16)
        self._known = np.zeros((len(pictures.pixels), 2), bool)

    @torch.no_grad()
    def of(self, chosen: NDArray[np.int64], mirrored: NDArray[np.int64]) -> torch.Tensor:
        """Latents (B, C, h, w) of the pictures `chosen` (B,), of their mirror images where `mirrored` (B,) is 1."""
        new = np.flatnonzero(~self._known[chosen, mirrored])
        if len(new):
            pixels = self.pictures.batch(chosen[new], mirrored[new] == 1).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                means = self.vae.encode(pixels).latent_dist.mean
            self._kept[chosen[new], mirrored[new]] = means.half()
            self._known[chosen[new], mirrored[new]] = True
        return self._kept[chosen, mirrored].float()
