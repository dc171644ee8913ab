"""What the trainings of the embedded models share: a learning rate that follows the clock, averaging, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


class Clock:
    """A training of a given length in minutes: warm-up, then cosine to zero; it goes on where a checkpoint stopped."""

    def __init__(self, minutes: float, learning_rate: float, warmup: float = 0.02):
        self.seconds, self.learning_rate, self.warmup = minutes * 60, learning_rate, warmup
        self.spent = 0.0
        self.step = 0

    def steps(self, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """Step numbers until the time is up; sets the optimizer's learning rate before each."""
        last = time.monotonic()
        while self.spent < self.seconds:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self._factor()
            yield self.step
            now = time.monotonic()
            # one long first step (compiling) is not training time
            self.spent += min(now - last, 10.0)
            last, self.step = now, self.step + 1

    def _factor(self) -> float:
        done = self.spent / self.seconds
        return min(1.0, done / self.warmup + 0.01) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


class Average:
    """An exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.weights = decay, {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.weights[name].lerp_(value, 1 - decay)


def descend(loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step down the gradient of `loss`, its norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def save_checkpoint(
    path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer, clock: Clock
) -> None:
    """Everything that is needed to go on, written in one piece."""
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "average": average.weights,
            "optimizer": optimizer.state_dict(),
            "spent": clock.spent,
            "step": clock.step,
        },
        part,
    )
    part.replace(path)


def load_checkpoint(
    path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer, clock: Clock
) -> None:
    """Go on from `path` if it is there."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.weights = state["average"]
    optimizer.load_state_dict(state["optimizer"])
    clock.spent, clock.step = state["spent"], state["step"]


def average_weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint: what is used."""
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["average"]
    return weights


def minutes_spent(path: Path) -> float:
    """How long a checkpoint's training has taken."""
    return float(torch.load(path, weights_only=True)["spent"] / 60)
