"""Training on a small GPU: the settings that `train.low_memory` replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bestiary.diffusion.base import device_and_dtype
from bestiary.diffusion.optimization import load_adamw8bit
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from bestiary.params import Train

FULL_MEMORY = (
    "Set train.low_memory to true: each process then trains on one image at a time. If it is true already, close other "
    "programs that use the GPU, or choose a smaller encode.resolution. A run with unchanged settings resumes from its "
    "checkpoint."
)


def low_memory(settings: Train, processes: int) -> Train:
    """The settings with which training really runs on this many processes.

    With `low_memory`, each process takes one image at a time, recomputes activations, does not compile, and has the
    8-bit optimizer where it works. Without it, the settings are returned as they are. The function is idempotent.

    Raises BestiaryError when low_memory is on and the images of a step cannot be split evenly over the processes.
    """
    if not settings.low_memory:
        return settings
    images_at_a_time(settings, processes)
    return settings.model_copy(
        update={
            "accumulation": settings.batch_size // processes,
            "gradient_checkpointing": True,
            "compile": "never",
            "optimizer": "adamw8bit" if settings.optimizer == "adamw8bit" else _smallest_optimizer(),
        }
    )


def images_at_a_time(settings: Train, processes: int) -> int:
    """How many images each of the processes trains on at a time.

    Raises BestiaryError when the images of a step cannot be split evenly.
    """
    parts = processes if settings.low_memory else processes * settings.accumulation
    if settings.batch_size % parts:
        parted = "" if settings.low_memory else f" with train.accumulation {settings.accumulation}"
        raise BestiaryError(
            f"train.batch_size is {settings.batch_size} and cannot be split evenly over {processes} processes{parted}. "
            f"Choose a multiple of {parts}."
        )
    return 1 if settings.low_memory else settings.batch_size // parts


def _smallest_optimizer() -> Literal["adamw", "adamw8bit"]:
    try:
        load_adamw8bit(device_and_dtype()[0])
    except BestiaryError:
        return "adamw"
    return "adamw8bit"
