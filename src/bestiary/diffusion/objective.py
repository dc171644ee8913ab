"""The objective: what the UNet has to predict, how much each timestep counts, and the validation loss."""

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
BANDS = 5  # equal parts of the noise schedule, in which the validation loss is reported too


@dataclass(frozen=True)
class Validation:
    """The validation loss: plain mean squared error over fixed images, noise and timesteps."""

    overall: float
    by_band: dict[str, float]  # by its first and last timestep, from the least noise to the most
    by_class: dict[str, float]


def snr_weights(scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR-gamma's weight of each timestep for what the base predicts: (B,). Hang et al. 2023, arXiv:2303.09556."""
    if gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    alphas: torch.Tensor = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = (alphas / (1 - alphas)).float().clamp(min=1e-8)  # a zero-terminal-SNR schedule ends with none
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    weights: torch.Tensor = snr.clamp(max=gamma) / divisor
    return weights


def prediction_error(unet: Any, scheduler: DDPMScheduler, batch: Batch, features: torch.Tensor) -> torch.Tensor:
    """Prediction minus target, for the prediction type that the base is made for: (B, C, h, w), float32."""
    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    v_prediction = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v_prediction else noise
    prediction = unet(noisy, timesteps, features[batch["captions"]]).sample
    error: torch.Tensor = prediction.float() - target.float()
    return error


def squared(error: torch.Tensor) -> torch.Tensor:
    """Each image's mean squared error: (B, C, h, w) -> (B,)."""
    return error.square().mean(dim=(1, 2, 3))


def pseudo_huber(error: torch.Tensor, c: float) -> torch.Tensor:
    """Each image's pseudo-Huber loss, squared below `c` and linear above: (B, C, h, w) -> (B,). arXiv:2403.16728."""
    return (2 * c * ((error.square() + c * c).sqrt() - c)).mean(dim=(1, 2, 3))


@torch.no_grad()
def validation_loss(
    unet: Any,
    scheduler: DDPMScheduler,
    grid: ValidationGrid,
    loader: Iterable[list[Batch]],
    features: torch.Tensor,
    accelerator: Accelerator,
) -> Validation:
    """The loss over the validation grid. Two measurements of the same weights are equal."""
    unet.eval()
    losses = []
    for batches in loader:
        found = torch.cat([squared(prediction_error(unet, scheduler, batch, features)) for batch in batches])
        place = torch.cat([batch["place"] for batch in batches])
        losses.append(accelerator.gather_for_metrics(found[place.argsort()]))
    unet.train()
    per_image = torch.cat(losses).double().cpu().numpy()
    if not np.isfinite(per_image).all():
        raise BestiaryError("The validation loss is not a finite number: lower train.learning_rate.")
    count = scheduler.config.num_train_timesteps
    band = np.array(grid.timesteps) * BANDS // count
    classes = np.array(grid.classes)
    return Validation(
        overall=float(per_image.mean()),
        by_band={
            f"{-(-number * count // BANDS)}-{-(-(number + 1) * count // BANDS) - 1}": float(
                per_image[band == number].mean()
            )
            for number in range(BANDS)
            if (band == number).any()
        },
        by_class={str(name): float(per_image[classes == name].mean()) for name in np.unique(classes)},
    )
