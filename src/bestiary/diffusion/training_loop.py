"""What training and distillation have in common: the weights and their state, checkpoints, and the loop over steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from bestiary.diffusion.checkpoints import Checkpoint, save_checkpoint, stop_on_sigterm
from bestiary.diffusion.optimization import Ema, assign, learning_rate_factor
from bestiary.diffusion.progress import OnLog, Progress, TrainingResult, copies, progress_bar, stopped

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from bestiary.diffusion.batches import Batch
    from bestiary.diffusion.half_precision import TrainedWeights
    from bestiary.params import AdapterTraining

OnValidation = Callable[[int], float | None]  # step; returns the CLIP score of what it drew, if any


class Callbacks(NamedTuple):
    """Functions that a run calls: `on_log` with its measurements, `on_validation` to draw with its weights."""

    on_log: OnLog | None
    on_validation: OnValidation | None


class TrainingState:
    """The weights of an adapter in training and all that changes with them. Checkpoints store this state."""

    def __init__(
        self,
        accelerator: Accelerator,
        trained: TrainedWeights,
        optimizer: AcceleratedOptimizer,
        settings: AdapterTraining,
        progress: Progress,
    ) -> None:
        self.accelerator, self.trained, self.optimizer = accelerator, trained, optimizer
        self.settings, self.progress = settings, progress
        self.ema = Ema(trained.weights, settings.ema_decay)

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next step."""
        settings, progress = self.settings, self.progress
        progress.learning_rate = settings.learning_rate * learning_rate_factor(settings, progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = progress.learning_rate

    def learn_from(self, loss: torch.Tensor, logged: torch.Tensor) -> bool:
        """Train on a batch's loss, and return whether it completes an optimizer step.

        `logged` is the loss that the history shows. Both are scalars on the device.
        """
        accelerator, trained, progress = self.accelerator, self.trained, self.progress
        accelerator.backward(loss)
        trained.collect_gradients()
        progress.add_loss(logged)
        if accelerator.sync_gradients:
            trained.average_gradients(accelerator)
            progress.grad_norm = accelerator.clip_grad_norm_(trained.weights, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        trained.spread()
        return bool(accelerator.sync_gradients)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context, the UNet has the averaged weights."""
        with self.ema.applied():
            self.trained.spread()
            yield
        self.trained.spread()

    def save(self, checkpoints: Path | None) -> None:
        """Save a checkpoint, in the main process and if there is a folder for it."""
        if checkpoints is None or not self.accelerator.is_main_process:
            return
        checkpoint = Checkpoint(
            weights=copies(self.trained.weights),
            average=self.ema.average,
            optimizer=self.optimizer.state_dict(),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            progress=self.progress.checkpoint(),
        )
        save_checkpoint(checkpoints, checkpoint)

    def restore(self, saved: Checkpoint) -> None:
        """Resume from a checkpoint."""
        assign(self.trained.weights, saved.weights)
        self.trained.spread()
        assign(self.ema.average, saved.average)
        self.optimizer.load_state_dict(saved.optimizer)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        self.progress.restore(saved.progress)

    def finish(self) -> TrainingResult:
        """Leave the UNet with the best weights and return the result."""
        assign(self.trained.weights, self.progress.state.best_weights)
        self.trained.give_back()
        return self.progress.result(sum(weight.numel() for weight in self.trained.weights))

    def any_process(self, stop_requested: bool) -> bool:
        """Whether any process was asked to stop. All processes must call this at the same step."""
        if self.accelerator.num_processes == 1:
            return stop_requested
        requests = torch.tensor(float(stop_requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(requests).item())


class Run(Protocol):
    """The parts that training and distillation do differently."""

    @property
    def state(self) -> TrainingState: ...

    @property
    def batches(self) -> Iterable[list[Batch]]:
        """The remaining batches, several at once only where images of different sizes share a batch."""
        ...

    def train_on(self, batches: list[Batch]) -> bool:
        """Train on the next images, and return whether they complete an optimizer step."""
        ...

    def validate(self) -> None:
        """Measure the averaged weights, draw with them, and keep them if they are the best so far."""
        ...

    def draw(self, step: int) -> float | None:
        """Draw with the UNet as it is, and return the CLIP score."""
        ...


def run_steps(
    run: Run, saved: Checkpoint | None, checkpoints: Path | None, *, verb: str, gerund: str
) -> TrainingResult:
    """Take all optimizer steps from the start or from `saved`, and leave the UNet with the best weights.

    The progress bar says "`verb` the adapter", and an error about SIGTERM begins with `gerund`.
    Raises BestiaryError when the loss is not finite, the disk is full, or SIGTERM arrived.
    """
    state, progress = run.state, run.state.progress
    accelerator, steps = state.accelerator, progress.pace.steps
    if saved:
        run.draw(0)  # the adapter is fresh and changes nothing yet
        state.restore(saved)
    else:
        run.validate()
    progress.start_clock()
    with progress_bar(steps, progress.step, f"{verb} the adapter", accelerator) as bar, stop_on_sigterm() as stop:
        for batches in run.batches:
            if progress.out_of_patience:
                break
            if not run.train_on(batches):
                continue  # the step accumulates the gradients of more batches
            progress.finish_step()
            state.ema.update(progress.step)
            bar.update()
            if progress.row_due:
                progress.average_losses()
                if progress.validation_due:
                    run.validate()
                    progress.start_clock()
                else:
                    progress.log()
                loss, best = f"{progress.state.train_loss:.4f}", f"{progress.best_val_loss:.4f}"
                bar.set_postfix(loss=loss, best=best, refresh=False)
                if progress.checkpoint_due:
                    state.save(checkpoints)
            if (progress.row_due or accelerator.num_processes == 1) and state.any_process(stop.requested):
                state.save(checkpoints)
                raise stopped(gerund, progress.step, steps, checkpoints)
    state.save(checkpoints)  # for a run that fails or is killed while it writes its outputs
    return state.finish()
