"""Train the embedded world's VAE: 64 x 64 pictures to latents of 8 x 8 x 32 and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from world.pictures import SIZE, Pictures
from world.schedule import Average, Clock, load_checkpoint, save_checkpoint

CHANNELS = 32
BATCH = 16


def build() -> AutoencoderKL:
    """The architecture with random weights: an eighth of the size in each direction, as Stable Diffusion's."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


class Patches:
    """Latents by principal components: each 8 x 8 patch as its 32 strongest, the target that the VAE is trained to.

    A component's deviation is the square root of what it is in the pictures: whitened half way, so that the UNet's
    effort goes to what is seen. All in all the latents have mean 0 and variance 1.
    """

    def __init__(self, pictures: Pictures, count: int = 4000):
        chosen = np.random.default_rng(0).choice(len(pictures.pixels), count, replace=False)
        patches = self._cut(pictures.batch(np.sort(chosen))).flatten(0, 2)  # (N, 192)
        self.mean = patches.mean(dim=0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T))
        scale = values[-CHANNELS:].flip(0) ** 0.25
        self.to_latents = vectors[:, -CHANNELS:].flip(1) / scale / scale.square().mean().sqrt()  # (192, C)

    @staticmethod
    def _cut(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, h, w, 192)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) to latents (B, C, h, w)."""
        return ((self._cut(pixels) - self.mean) @ self.to_latents).permute(0, 3, 1, 2)


def train(pictures: Pictures, folder: Path, minutes: float, compiled: bool = True) -> AutoencoderKL:
    """The encoder learns the components, the decoder to draw pictures from them, also from slightly wrong ones."""
    torch.manual_seed(1)
    vae = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    patches = Patches(pictures)
    with torch.no_grad():  # the posterior's deviation is fixed: 0.02
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = 2 * np.log(0.02)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, average = Clock(minutes, 2e-3), Average(vae, 0.998)
    checkpoint = folder / "vae.pt"
    load_checkpoint(checkpoint, vae, average, optimizer, clock)

    def both(pixels: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return vae.encode(pixels).latent_dist.mean, vae.decode(latents).sample

    run = torch.compile(both) if compiled else both
    rng = np.random.default_rng(clock.step)
    for step in clock.steps(optimizer):
        indices = rng.integers(0, len(pictures.pixels), BATCH)
        pixels = pictures.batch(indices, rng.random(BATCH) < 0.5).to(memory_format=torch.channels_last)
        latents = patches.latents(pixels)
        wrong = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)) * torch.from_numpy(
            rng.uniform(0.0, 0.15, (BATCH, 1, 1, 1)).astype(np.float32)
        )
        with torch.autocast("cpu", torch.bfloat16):
            encoded, decoded = run(pixels, latents + wrong)
        error = decoded.float() - pixels  # (B, 3, H, W)
        edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        missed = (encoded.float() - latents).square().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + edges + missed
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        average.update(vae, step)
        if step % 100 == 0:
            print(f"vae step {step} {clock.spent / 60:.1f} min decoder mse {error.square().mean():.5f} encoder mse {missed:.4f}", flush=True)
        if step % 1000 == 999:
            save_checkpoint(checkpoint, vae, average, optimizer, clock)
    save_checkpoint(checkpoint, vae, average, optimizer, clock)
    vae.load_state_dict(average.weights)
    return vae.eval()
