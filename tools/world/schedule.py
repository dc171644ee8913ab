"""What training the bundled models shares: processes, a learning rate that follows the clock, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import distributed, nn


def rank() -> int:
    """This process's rank under torchrun, else 0. Processes use different pictures and average their gradients."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def say(text: str) -> None:
    """Print a line of the training's log, in the first process only."""
    if rank() == 0:
        print(text, flush=True)


class FullPrecisionAttention(AttnProcessor2_0):  # type: ignore[misc]
    """Attention in float32 inside a bfloat16 autocast: on a CPU its backward pass is eight times as fast."""

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
    """A training of a given length in minutes: warm-up, then cosine to zero. It resumes from a checkpoint.

    It counts the minutes that this process computes, so that a machine with other work trains as well as an idle one.
    """

    def __init__(self, minutes: float, learning_rate: float, warmup: float = 0.02):
        self.seconds, self.learning_rate, self.warmup = minutes * 60, learning_rate, warmup
        self.spent = 0.0
        self.step = 0

    def steps(self, optimizer: torch.optim.Optimizer) -> Iterator[int]:
        """Yield step numbers until the time is up, and set the optimizer's learning rate before each step."""
        last = time.process_time()
        while self._agreed() < self.seconds:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * self._factor()
            yield self.step
            now = time.process_time()
            # a long first step (compiling) does not count as training time
            self.spent += min(now - last, 10.0)
            last, self.step = now, self.step + 1

    def _agreed(self) -> float:
        if distributed.is_initialized():  # the first process decides, or another one would train one step more
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
    """Take one step down the gradient of `loss`, averaged over all processes and clipped to norm 1."""
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
    """Save everything that resuming needs, in one file, from the first process."""
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
    """Resume from `path` if it exists."""
    if not path.exists():
        return
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.weights = state["average"]
    optimizer.load_state_dict(state["optimizer"])
    clock.spent, clock.step = state["spent"], state["step"]


def average_weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights in a checkpoint, which are the ones to use."""
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["average"]
    return weights


def minutes_spent(path: Path) -> float:
    """The minutes that a checkpoint's training has taken."""
    return float(torch.load(path, weights_only=True)["spent"] / 60)
