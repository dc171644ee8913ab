"""What the trainings of the bundled models share: processes, a learning rate that follows the clock, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import distributed, nn


def rank() -> int:
    """The number of this process below torchrun, else 0. Each draws other pictures; they average their gradients."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def say(text: str) -> None:
    """Print a line of the training's log, once."""
    if rank() == 0:
        print(text, flush=True)


class FullPrecisionAttention(AttnProcessor2_0):  # type: ignore[misc]
    """Attention in float32 below a bfloat16 autocast: its backward pass takes a CPU eight times as long in bfloat16."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().__call__(attn, hidden_states.float(), encoder_hidden_states, attention_mask, temb)  # type: ignore[no-any-return]


class Clock:
    """A training of a given length in minutes: warm-up, then cosine to zero; it goes on where a checkpoint stopped."""

    def __init__(self, minutes: float, learning_rate: float, warmup: float = 0.02):
        self.seconds, self.learning_rate, self.warmup = minutes * 60, learning_rate, warmup
        self.spent = 0.0
        self.step = 0

    def steps(self, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """Step numbers until the time is up; sets the optimizer's learning rate before each."""
        last = time.monotonic()
        while self._agreed() < self.seconds:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self._factor()
            yield self.step
            now = time.monotonic()
            # one long first step (compiling) is not training time
            self.spent += min(now - last, 10.0)
            last, self.step = now, self.step + 1

    def _agreed(self) -> float:
        if distributed.is_initialized():  # the first process has the clock, or another would train one step more
            spent = torch.tensor([self.spent], dtype=torch.float64)
            distributed.broadcast(spent, 0)
            self.spent = float(spent)
        return self.spent

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
    """One step down the gradient of `loss`, the mean of all processes', its norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    if distributed.is_initialized():
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def save_checkpoint(
    path: Path, model: nn.Module, average: Average, optimizer: torch.optim.Optimizer, clock: Clock
) -> None:
    """Everything that is needed to go on, written in one piece by the first process."""
    if rank() != 0:
        return
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
