"""Where a training stands and what it reached: its step, its curve, its best weights and its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bestiary.diffusion.objective import Validation
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

    from bestiary.diffusion.training import TrainingSettings

LOG_EVERY = 10  # steps between two rows of the history
HISTORY = (  # the columns of a history's rows, as files show them
    "step",
    "epoch",
    "train_loss",
    "val_loss",
    "clip_score",
    "learning_rate",
    "grad_norm",
    "images_per_second",
)

OnLog = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a training reached. Losses are plain mean squared errors; losses and scores are those of the best step."""

    steps: int
    best_step: int
    train_loss: float
    val_loss: float
    base_val_loss: float
    images_per_second: float
    peak_memory_mib: float
    trainable_parameters: int
    seconds: float  # in all, before a restart, too
    clip_score: float | None  # None: the pictures drawn at validations were not scored
    base_clip_score: float | None
    val_loss_by_band: dict[str, float]
    val_loss_by_class: dict[str, float]
    history: list[dict[str, float]]  # a row every LOG_EVERY steps and at each validation

    def report(self) -> dict[str, Any]:
        """The numbers of the whole, for reports/train.json."""
        numbers = {name: value for name, value in vars(self).items() if isinstance(value, int | float)}
        return numbers | {"val_loss_by_band": self.val_loss_by_band}

    def write(self, folder: Path) -> None:
        """Write the curve to `history.csv` and the loss of each class to `val_loss_by_class.csv`, for DVC's plots."""
        import pandas as pd

        history = pd.DataFrame(self.history, columns=list(HISTORY))
        write_atomically(folder / "history.csv", history.to_csv(index=False).encode())
        by_class = pd.Series(self.val_loss_by_class, name="val_loss").rename_axis("class")
        write_atomically(folder / "val_loss_by_class.csv", by_class.to_csv().encode())


class Progress:
    """Where a training stands: its step, its curve, its best weights and its clock.

    Losses stay on the device until a row is due, so that a GPU never waits for them.
    """

    STATE = (
        "step",
        "best_step",
        "since_best",
        "base_val_loss",
        "base_clip_score",
        "clip_score",
        "best_weights",
        "history",
        "train_loss",
        "seconds",
        "elapsed",
    )

    def __init__(self, settings: TrainingSettings, images: int, accelerator: Accelerator, on_log: OnLog | None) -> None:
        self.settings = settings
        self.images = images
        self.accelerator = accelerator
        self.on_log = on_log
        self.step = 0
        self.best_step = 0
        self.since_best = 0  # validations
        self.base_val_loss = math.nan
        self.base_clip_score: float | None = None
        self.clip_score: float | None = None  # of the best step, as `best` is
        self.best: Validation
        self.best_weights: list[torch.Tensor] = []
        self.history: list[dict[str, float]] = []
        self.train_loss = math.nan
        self.learning_rate = 0.0
        self.grad_norm: Any = math.nan
        self.seconds = 0.0  # spent in training steps
        self.elapsed = 0.0  # in all, validations included
        self.saved_at = self._resumed_at = self._looked_at = time.perf_counter()
        self._losses: list[torch.Tensor] = []

    @property
    def draws(self) -> int:
        """How many batches have been drawn from the stream."""
        return self.step * self.settings.accumulation + len(self._losses) % self.settings.accumulation

    @property
    def validation_due(self) -> bool:
        return self.step % self.settings.validate_every == 0 or self.step == self.settings.steps

    @property
    def row_due(self) -> bool:
        return self.validation_due or self.step % LOG_EVERY == 0

    @property
    def out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.since_best >= self.settings.patience

    @property
    def checkpoint_due(self) -> bool:
        if time.perf_counter() - self.saved_at < self.settings.checkpoint_seconds:
            return False
        self.saved_at = time.perf_counter()
        return True

    @property
    def images_per_second(self) -> float:
        return self.step * self.settings.batch_size / self.seconds if self.seconds else 0.0

    def start_clock(self) -> None:
        """Count the time from now on as training; that since the last row went into validation."""
        self._resumed_at = time.perf_counter()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._resumed_at
        self.elapsed += now - self._looked_at
        self._resumed_at = self._looked_at = now

    def add_loss(self, loss: torch.Tensor) -> None:
        self._losses.append(loss)

    def take_losses(self) -> None:
        """Average the losses since the last row, over all processes. Raises BestiaryError when one is not finite."""
        if not self._losses:
            return
        losses = self.accelerator.reduce(torch.stack(self._losses).float(), "mean").tolist()
        self._losses.clear()
        self._count_time()
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                failed = self.step - (len(losses) - 1 - index) // self.settings.accumulation
                raise BestiaryError(f"The training loss at step {failed} is {loss}: lower train.learning_rate.")
        self.train_loss = sum(losses) / len(losses)

    def note_validation(self, found: Validation, clip_score: float | None, weights: Sequence[torch.Tensor]) -> None:
        """Keep the weights if they are the best trained ones; the fresh adapter of step 0 is no candidate."""
        if self.step == 0:
            self.base_val_loss, self.base_clip_score = found.overall, clip_score
        if clip_score is None and self.settings.criterion == "clip_score":
            raise BestiaryError("train.criterion is clip_score, and nothing scores the pictures of this training.")
        self.since_best += 1
        if self.best_step == 0 or self._improvement(found, clip_score) > self.settings.min_delta:
            self.best_step, self.best, self.clip_score = self.step, found, clip_score
            self.best_weights = copies(weights)
            self.since_best = 0
        self.log(val_loss=found.overall, **({} if clip_score is None else {"clip_score": clip_score}))

    def _improvement(self, found: Validation, clip_score: float | None) -> float:
        """By how much a validation is better than the best one by the criterion."""
        if self.settings.criterion == "clip_score":
            assert clip_score is not None
            assert self.clip_score is not None
            return clip_score - self.clip_score
        return self.best.overall - found.overall

    def log(self, **validation: float) -> None:
        row: dict[str, float] = {"step": self.step, "epoch": self.step * self.settings.batch_size / self.images}
        if self.step:
            row |= {
                "train_loss": self.train_loss,
                "learning_rate": self.learning_rate,
                "grad_norm": float(self.grad_norm),
                "images_per_second": self.images_per_second,
            }
        self.history.append(row | validation)
        self._tell(self.history[-1])

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to know, in plain types and tensors."""
        self._count_time()
        kept = {name: getattr(self, name) for name in self.STATE}
        return kept | {"best": asdict(self.best), "losses": list(self._losses)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken; the curve so far is told again, to a run that has not heard of it."""
        for name in self.STATE:
            setattr(self, name, state[name])
        self.best = Validation(**state["best"])
        self._losses = [loss.to(self.accelerator.device) for loss in state["losses"]]
        for row in self.history:
            self._tell(row)

    def result(self, trainable_parameters: int) -> TrainingResult:
        self._count_time()
        return TrainingResult(
            steps=self.step,
            best_step=self.best_step,
            train_loss=self.train_loss,
            val_loss=self.best.overall,
            base_val_loss=self.base_val_loss,
            images_per_second=self.images_per_second,
            peak_memory_mib=peak_memory_mib(self.accelerator.device),
            trainable_parameters=trainable_parameters,
            seconds=self.elapsed,
            clip_score=self.clip_score,
            base_clip_score=self.base_clip_score,
            val_loss_by_band=self.best.by_band,
            val_loss_by_class=self.best.by_class,
            history=self.history,
        )

    def _tell(self, row: Mapping[str, float]) -> None:
        if self.on_log and self.accelerator.is_main_process:
            self.on_log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors' values now, apart from them."""
    return [tensor.detach().clone() for tensor in tensors]


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: the GPU's for a GPU, this process's otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
