"""The training objective: what the UNet predicts, how much each timestep counts, and the validation loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bestiary.diffusion.batches import Batch, ValidationGrid
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction")
BANDS = 5  # equal parts of the noise schedule; the validation loss is reported for each


@dataclass(frozen=True)
class Validation:
    """The validation loss: plain mean squared error over fixed images, noise and timesteps."""

    overall: float
    by_band: dict[str, float]  # by first and last timestep, from the least noise to the most: "0-199", ...
    by_class: dict[str, float]


def snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR-gamma's weight of each timestep for the base's prediction type: (B,). Hang et al. 2023, arXiv:2303.09556.

    Without a gamma all weights are 1.
    """
    if gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    alphas: torch.Tensor = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = (alphas / (1 - alphas)).float().clamp(min=1e-8)  # a zero-terminal-SNR schedule ends at 0
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    weights: torch.Tensor = snr.clamp(max=gamma) / divisor
    return weights


def prediction_error(unet: Any, scheduler: DDPMScheduler, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Prediction minus target, float32 (B, C, h, w). `features` are those of all captions: (captions, T, D)."""
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
    prediction = unet(noisy.to(features.dtype), timesteps, features[batch["captions"]]).sample
    error: torch.Tensor = prediction.float() - target.float()
    return error


def squared(error: torch.Tensor) -> torch.Tensor:
    """Each image's mean squared error: (B, C, h, w) -> (B,).

    >>> squared(torch.full((2, 4, 8, 8), 3.0))
    tensor([9., 9.])
    """
    return error.square().mean(dim=(1, 2, 3))


def pseudo_huber(error: torch.Tensor, c: float) -> torch.Tensor:
    """Each image's pseudo-Huber loss: (B, C, h, w) -> (B,). Quadratic below `c`, linear above. arXiv:2403.16728.

    >>> pseudo_huber(torch.zeros(2, 4, 8, 8), c=0.1)
    tensor([0., 0.])
    """
    return (2 * c * ((error.square() + c * c).sqrt() - c)).mean(dim=(1, 2, 3))


@torch.no_grad()
def validation_loss(
    unet: Any,
    scheduler: DDPMScheduler,
    grid: ValidationGrid,
    batches: Iterable[list[Batch]],
    features: torch.Tensor,
    accelerator: Accelerator,
) -> Validation:
    """The loss over the validation grid. Two measurements of the same weights are equal.

    Raises BestiaryError when it is not finite.
    """
    unet.eval()
    gathered = []
    for parts in batches:
        losses = torch.cat([squared(prediction_error(unet, scheduler, batch, features)) for batch in parts])
        place = torch.cat([batch["place"] for batch in parts])
        gathered.append(accelerator.gather_for_metrics(losses[place.argsort()]))
    unet.train()
    per_image = torch.cat(gathered).double().cpu().numpy()
    if not np.isfinite(per_image).all():
        raise BestiaryError("The validation loss is not a finite number: lower train.learning_rate.")
    timesteps = scheduler.config.num_train_timesteps
    bands = np.array(grid.timesteps) * BANDS // timesteps
    classes = np.array(grid.classes)
    return Validation(
        overall=float(per_image.mean()),
        by_band={
            _band_name(band, timesteps): float(per_image[bands == band].mean())
            for band in range(BANDS)
            if (bands == band).any()
        },
        by_class={str(name): float(per_image[classes == name].mean()) for name in np.unique(classes)},
    )


def _band_name(band: int, timesteps: int) -> str:
    first, following = (-(-number * timesteps // BANDS) for number in (band, band + 1))  # rounded up
    return f"{first}-{following - 1}"
