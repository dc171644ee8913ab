"""The optimizer's side of training: the weights to train, AdamW, the learning rate and the moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.half_precision import TrainedWeights
from bestiary.diffusion.progress import copies
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from bestiary.params import AdapterTraining, Train

BLOCK = 8192  # parameters; bitsandbytes keeps smaller tensors in 32 bits


class Ema:
    """A moving average of the trainable parameters, warmed up so that the first steps carry little weight."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = copies(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the parameters after `step` steps to the average."""
        decay = min(self.decay, step / (10 + step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged parameters."""
        trained = copies(self.parameters)
        assign(self.parameters, self.average)
        try:
            yield
        finally:
            assign(self.parameters, trained)


@torch.no_grad()
def assign(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy the values into the targets."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def learning_rate_factor(settings: AdapterTraining, step: int) -> float:
    """The fraction of the learning rate at a step: a linear warm-up, then constant, or linear or cosine decay to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = min(1.0, (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps))
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return factors[settings.learning_rate_schedule]


def start_adapter(unet: UNet2DConditionModel, settings: Train, *, seed: int, device: torch.device) -> TrainedWeights:
    """Add a fresh adapter to `unet`, move it to the device, and return the weights to train.

    Raises BestiaryError when no module of the UNet has the name of a target.
    """
    parameters = inject(
        unet,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=settings.targets,
        seed=seed,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    half = unet.dtype is torch.bfloat16
    # On a GPU, the copies between layouts around norms and attention cost more than convolutions gain.
    unet.to(device, memory_format=torch.contiguous_format if half else torch.channels_last)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return TrainedWeights(parameters, torch.bfloat16 if half else torch.float32)


def make_optimizer(parameters: Sequence[torch.nn.Parameter], settings: Train) -> torch.optim.Optimizer:
    """AdamW in float32, or with 8-bit moments (Dettmers et al. 2021, arXiv:2110.02861).

    Raises BestiaryError when the 8-bit optimizer is asked for and bitsandbytes is missing or fails on this device.
    """
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    adamw8bit = load_adamw8bit(parameters[0].device)
    return adamw8bit(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def load_adamw8bit(device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """The class of the 8-bit optimizer. Raises BestiaryError when bitsandbytes is missing or fails on this device."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise BestiaryError(
            "train.optimizer is adamw8bit, which needs bitsandbytes: pip install 'bestiary[adamw8bit]'."
        ) from None
    probe = torch.zeros(BLOCK, device=device, requires_grad=True)
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe]).step()
    except Exception as error:  # whatever its kernels raise on a device that they do not support
        raise BestiaryError(
            f"train.optimizer is adamw8bit, but bitsandbytes does not work on this {device.type} "
            f"({type(error).__name__}). Set it to adamw."
        ) from error
    adamw8bit: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return adamw8bit
