"""The progress of a run that trains an adapter: its step, its history, its best weights and its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from tqdm import tqdm

from bestiary.diffusion.objective import Validation
from bestiary.errors import BestiaryError
from bestiary.files import write_atomically
from bestiary.memory import peak_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

    from bestiary.params import Train

LOG_EVERY = 10  # steps between two rows of the history
COLUMNS = (  # of the history
    "step",
    "epoch",
    "train_loss",
    "val_loss",
    "clip_score",
    "learning_rate",
    "grad_norm",
    "images_per_second",
)

COSTS = ("images_per_second", "peak_memory_mib", "seconds")  # the numbers that differ from run to run

HistoryRow = dict[str, float]  # by column; a row has only the columns that were measured at its step
OnLog = Callable[[int, Mapping[str, float]], None]  # step, the row's other columns


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run. Losses are mean squared errors; losses and scores are those of the best step."""

    steps: int
    best_step: int
    train_loss: float
    val_loss: float
    base_val_loss: float
    images_per_second: float
    peak_memory_mib: float  # of the GPU, or of the process where there is none
    trainable_parameters: int
    seconds: float  # in total, including the time before the run was resumed
    clip_score: float | None  # None: the pictures drawn at validations were not scored
    base_clip_score: float | None
    val_loss_by_band: dict[str, float]
    val_loss_by_class: dict[str, float]
    history: list[HistoryRow]  # a row every LOG_EVERY steps and at each validation

    def results(self) -> dict[str, float | dict[str, float]]:
        """The numbers for the stage's report that the same inputs give again."""
        numbers = {
            name: value for name, value in vars(self).items() if isinstance(value, int | float) and name not in COSTS
        }
        return {**numbers, "val_loss_by_band": self.val_loss_by_band}

    def costs(self) -> dict[str, float]:
        """The numbers for the stage's report that differ from run to run."""
        return {name: getattr(self, name) for name in COSTS}

    def write(self, folder: Path) -> None:
        """Write `history.csv`, without the speed, and `val_loss_by_class.csv` for DVC's plots."""
        import pandas as pd

        from bestiary.tables import for_spreadsheet

        history = pd.DataFrame(self.history, columns=[name for name in COLUMNS if name not in COSTS])
        write_atomically(folder / "history.csv", history.to_csv(index=False).encode())
        by_class = pd.DataFrame(self.val_loss_by_class.items(), columns=["class", "val_loss"])
        write_atomically(folder / "val_loss_by_class.csv", for_spreadsheet(by_class).to_csv(index=False).encode())


@dataclass(frozen=True)
class Pace:
    """The settings that a run's progress depends on, from `section` of params.yaml."""

    section: str
    steps: int
    batch_size: int
    validate_every: int  # steps
    checkpoint_seconds: float
    accumulation: int = 1
    criterion: Literal["val_loss", "clip_score"] = "val_loss"
    patience: int | None = None
    min_delta: float = 0.0

    @classmethod
    def of_training(cls, settings: Train) -> Pace:
        """The settings of the stage train."""
        return cls(
            "train",
            settings.steps,
            settings.batch_size,
            settings.validate_every,
            settings.checkpoint_seconds,
            settings.accumulation,
            settings.criterion,
            settings.patience,
            settings.min_delta,
        )


@dataclass
class ProgressState:
    """The part of the progress that a checkpoint stores."""

    step: int = 0
    best_step: int = 0
    validations_since_best: int = 0
    base_val_loss: float = math.nan
    base_clip_score: float | None = None
    best: Validation | None = None
    best_clip_score: float | None = None
    best_weights: list[torch.Tensor] = field(default_factory=list)
    history: list[HistoryRow] = field(default_factory=list)
    train_loss: float = math.nan
    pending_losses: list[torch.Tensor] = field(default_factory=list)  # one per batch since the last row
    training_seconds: float = 0.0  # spent in training steps
    total_seconds: float = 0.0  # including validations


class Progress:
    """The progress of a training run.

    Losses stay on the device until a row of the history is due, so a GPU never waits for them.
    """

    def __init__(self, pace: Pace, images: int, accelerator: Accelerator, on_log: OnLog | None) -> None:
        self.pace = pace
        self.images = images
        self.accelerator = accelerator
        self.on_log = on_log
        self.state = ProgressState()
        self.learning_rate = 0.0
        self.grad_norm: torch.Tensor | float = math.nan
        self._saved_at = self._resumed_at = self._counted_at = time.perf_counter()

    @property
    def step(self) -> int:
        """The number of finished optimizer steps."""
        return self.state.step

    @property
    def batches(self) -> int:
        """The number of batches that have been used; a step takes `train.accumulation` of them."""
        accumulation = self.pace.accumulation
        return self.step * accumulation + len(self.state.pending_losses) % accumulation

    @property
    def best_val_loss(self) -> float:
        """The validation loss of the best step so far."""
        return self.state.best.overall if self.state.best else math.nan

    @property
    def validation_due(self) -> bool:
        """Whether this step ends with a validation."""
        return self.step % self.pace.validate_every == 0 or self.step == self.pace.steps

    @property
    def row_due(self) -> bool:
        """Whether this step ends with a row of the history."""
        return self.validation_due or self.step % LOG_EVERY == 0

    @property
    def out_of_patience(self) -> bool:
        """Whether `train.patience` validations have passed without an improvement."""
        return self.pace.patience is not None and self.state.validations_since_best >= self.pace.patience

    @property
    def checkpoint_due(self) -> bool:
        """Whether `train.checkpoint_seconds` have passed since the last checkpoint."""
        return time.perf_counter() - self._saved_at >= self.pace.checkpoint_seconds

    @property
    def images_per_second(self) -> float:
        """The speed of training so far, without validations."""
        images = self.step * self.pace.batch_size
        return images / self.state.training_seconds if self.state.training_seconds else 0.0

    def start_clock(self) -> None:
        """Count the time from now on as training, and the time since the last row as validation."""
        self._resumed_at = time.perf_counter()

    def finish_step(self) -> None:
        """Count one more optimizer step."""
        self.state.step += 1

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add the mean loss of a batch, a scalar on the device."""
        self.state.pending_losses.append(loss)

    def average_losses(self) -> None:
        """Average the losses since the last row over batches and processes.

        Raises BestiaryError when one of them is not finite.
        """
        if not self.state.pending_losses:
            return
        losses = self.accelerator.reduce(torch.stack(self.state.pending_losses).float(), "mean").tolist()
        self.state.pending_losses.clear()
        self._count_time()
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                step = self.step - (len(losses) - 1 - index) // self.pace.accumulation
                raise BestiaryError(
                    f"The training loss at step {step} is {loss}. Lower {self.pace.section}.learning_rate."
                )
        self.state.train_loss = sum(losses) / len(losses)

    def add_validation(self, found: Validation, clip_score: float | None, weights: Sequence[torch.Tensor]) -> None:
        """Log a validation, and keep its weights if they are the best so far. Step 0, the base, is no candidate.

        Raises BestiaryError when train.criterion is clip_score and there is no score.
        """
        state = self.state
        if state.step == 0:
            state.base_val_loss, state.base_clip_score = found.overall, clip_score
        if clip_score is None and self.pace.criterion == "clip_score":
            raise BestiaryError(
                "train.criterion is clip_score, but this training has no judge that scores its pictures. Use val_loss."
            )
        state.validations_since_best += 1
        if state.best_step == 0 or self._improvement(found, clip_score) > self.pace.min_delta:
            state.best_step, state.best, state.best_clip_score = state.step, found, clip_score
            state.best_weights = copies(weights)
            state.validations_since_best = 0
        self.log(val_loss=found.overall, **({} if clip_score is None else {"clip_score": clip_score}))

    def _improvement(self, found: Validation, clip_score: float | None) -> float:
        """How much better a validation is than the best one by `train.criterion`."""
        if self.pace.criterion == "clip_score":
            assert clip_score is not None
            assert self.state.best_clip_score is not None
            return clip_score - self.state.best_clip_score
        return self.best_val_loss - found.overall

    def log(self, **validation: float) -> None:
        """Add a row to the history, with the columns of a validation if there was one."""
        row: HistoryRow = {"step": self.step, "epoch": self.step * self.pace.batch_size / self.images}
        if self.step:
            row |= {
                "train_loss": self.state.train_loss,
                "learning_rate": self.learning_rate,
                "grad_norm": float(self.grad_norm),
                "images_per_second": self.images_per_second,
            }
        self.state.history.append(row | validation)
        self._call_on_log(self.state.history[-1])

    def checkpoint(self) -> ProgressState:
        """The state to store in a checkpoint now."""
        self._count_time()
        self._saved_at = time.perf_counter()
        return self.state

    def restore(self, state: ProgressState) -> None:
        """Continue from a checkpoint's state. Its history is logged again, because a resumed run is a new run."""
        self.state = state
        state.pending_losses = [loss.to(self.accelerator.device) for loss in state.pending_losses]
        for row in state.history:
            self._call_on_log(row)

    def result(self, trainable_parameters: int) -> TrainingResult:
        """The outcome of the run; at least one validation must have been added."""
        self._count_time()
        state, peak = self.state, peak_memory()
        assert state.best is not None
        return TrainingResult(
            steps=state.step,
            best_step=state.best_step,
            train_loss=state.train_loss,
            val_loss=state.best.overall,
            base_val_loss=state.base_val_loss,
            images_per_second=self.images_per_second,
            peak_memory_mib=peak.process_mib if peak.device_mib is None else peak.device_mib,
            trainable_parameters=trainable_parameters,
            seconds=state.total_seconds,
            clip_score=state.best_clip_score,
            base_clip_score=state.base_clip_score,
            val_loss_by_band=state.best.by_band,
            val_loss_by_class=state.best.by_class,
            history=state.history,
        )

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.state.training_seconds += now - self._resumed_at
        self.state.total_seconds += now - self._counted_at
        self._resumed_at = self._counted_at = now

    def _call_on_log(self, row: Mapping[str, float]) -> None:
        if self.on_log and self.accelerator.is_main_process:
            self.on_log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})


def progress_bar(steps: int, first_step: int, task: str, accelerator: Accelerator) -> tqdm[NoReturn]:
    """A progress bar over the steps of a run, only in the first process of each machine."""
    return tqdm(total=steps, initial=first_step, desc=task, unit="step", disable=not accelerator.is_local_main_process)


def stopped(what: str, step: int, steps: int, checkpoints: Path | None) -> BestiaryError:
    """The error for a run that SIGTERM stopped after a step."""
    rest = "Run the same command again to resume." if checkpoints else "Nothing was saved."
    return BestiaryError(f"{what} stopped on SIGTERM after step {step} of {steps}. {rest}")


def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the tensors' current values."""
    return [tensor.detach().clone() for tensor in tensors]
