"""Train a LoRA adapter on cached latents and captions, on any number of processes. An interrupted run resumes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.utils.data import DataLoader, Subset

from bestiary.diffusion.base import device_and_dtype, processes
from bestiary.diffusion.batches import Batch, TrainingStream, ValidationGrid, collate, seeded_number
from bestiary.diffusion.checkpoints import load_checkpoint
from bestiary.diffusion.fast_step import CompileChoice, FastPrediction, check_compiler, graphs_fit
from bestiary.diffusion.full_memory import explained
from bestiary.diffusion.latents import Latents
from bestiary.diffusion.low_memory import FULL_MEMORY, images_at_a_time, low_memory
from bestiary.diffusion.objective import (
    PREDICTION_TYPES,
    prediction_error,
    pseudo_huber,
    snr_weights,
    squared,
    validation_loss,
)
from bestiary.diffusion.optimization import make_optimizer, start_adapter
from bestiary.diffusion.preservation import preservation_error
from bestiary.diffusion.progress import OnLog, Pace, Progress, TrainingResult
from bestiary.diffusion.training_loop import Callbacks, OnValidation, TrainingState, run_steps
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from bestiary.diffusion.preservation import Preserved
    from bestiary.params import Train


@explained("A training step", FULL_MEMORY)
def train(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Latents,
    settings: Train,
    *,
    seed: int,
    on_log: OnLog | None = None,
    on_validation: OnValidation | None = None,
    checkpoints: Path | None = None,
) -> TrainingResult:
    """Train a fresh adapter in `unet`, which ends with the averaged weights of the best step, ready for `save_adapter`.

    `on_log(step, numbers)` is called with each row of the history. `on_validation(step)` is called while `unet` holds
    the weights that would be saved now, first at step 0, when it still equals the base: the place to draw a sheet. It
    may return the CLIP score of its pictures. Both are called in the main process only.

    With a folder for `checkpoints` (one for each `checkpoint_key`), a run that was killed resumes from the newest
    checkpoint and ends with the same adapter as an uninterrupted run. SIGTERM saves a checkpoint before training stops.

    Raises BestiaryError when the base and the latents do not match, this machine cannot do what the settings ask for,
    the loss is not finite, the GPU's memory or the disk is full, or SIGTERM arrived.
    """
    settings = low_memory(settings, processes().num_processes)
    check_fit(unet, scheduler, latents)
    saved = load_checkpoint(checkpoints) if checkpoints else None
    first_step = saved.progress.step if saved else 0
    run = _Run(unet, scheduler, latents, settings, seed, first_step, Callbacks(on_log, on_validation))
    run.model.train()
    result = run_steps(run, saved, checkpoints, verb="train", gerund="Training")
    run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    return result


class _Run:
    """One training run on this process's device: the model, its data and its progress."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        latents: Latents,
        settings: Train,
        seed: int,
        first_step: int,
        callbacks: Callbacks,
    ) -> None:
        check_preserved(latents, settings)
        self.unet, self.scheduler, self.settings, self.seed = unet, scheduler, settings, seed
        self.on_validation = callbacks.on_validation
        self.accelerator, micro_batch = _accelerator(settings)
        device = self.accelerator.device
        trained = start_adapter(unet, settings, seed=seed, device=device)
        self.features = latents.training.features.to(device, unet.dtype)  # (captions, T, D)
        self.preserved = latents.preserved.to(device, unet.dtype) if latents.preserved else None
        timestep_weights, loss_weights = _weights(scheduler, settings)
        self.loss_weights = loss_weights.to(device)
        stream = TrainingStream(latents.training, settings, seed=seed, timestep_weights=timestep_weights)
        remaining = Subset(stream, range(first_step * settings.batch_size, len(stream)))
        self.grid = ValidationGrid(latents.validation, len(loss_weights))
        # A GPU must not wait for its next batch; on a CPU, workers would only take cores from the step itself.
        workers = 2 if device.type == "cuda" else 0
        # In bfloat16 the processes average the weights' float32 gradients: DistributedDataParallel would average the
        # rounded ones, and move the parameters away from the copy that they are parts of.
        self.model: nn.Module = unet if unet.dtype is torch.bfloat16 else self.accelerator.prepare(unet)
        optimizer, self.batches, self.grid_batches = self.accelerator.prepare(
            make_optimizer(trained.weights, settings),
            DataLoader(remaining, micro_batch, num_workers=workers, pin_memory=workers > 0, collate_fn=collate),
            DataLoader(self.grid, micro_batch, collate_fn=collate),
        )
        self.predict = FastPrediction(self.model)
        self.compile = CompileChoice(settings.compile, settings.steps - first_step, self.accelerator.num_processes)
        progress = Progress(Pace.of_training(settings), len(latents.training), self.accelerator, callbacks.on_log)
        self.state = TrainingState(self.accelerator, trained, optimizer, settings, progress)

    def train_on(self, batches: list[Batch]) -> bool:
        """Train on the next images, and return whether they complete an optimizer step."""
        settings, progress, accelerator = self.settings, self.state.progress, self.accelerator
        self.speed_up(batches)
        if settings.dropout:  # dropout draws from torch's global generator only, and so does speeding up
            torch.manual_seed(seeded_number(self.seed, "dropout", progress.batches, accelerator.process_index))
        self.state.set_learning_rate()
        with accelerator.accumulate(self.model):
            losses, weighted = [], []
            for batch in batches:  # several only where images of different sizes share a batch
                error = prediction_error(self.predict, self.scheduler, batch, self.features)
                weighted.append(self.loss(error, batch["timesteps"]))
                losses.append(squared(error.detach()))
            loss = torch.cat(weighted).mean()
            if self.preserved is not None:
                loss = loss + settings.preservation.weight * self.preservation_loss(self.preserved)
            return self.state.learn_from(loss, logged=torch.cat(losses).mean())

    def speed_up(self, batches: list[Batch]) -> None:
        """Change to a faster way to predict, once it is known whether compiling pays."""
        if self.predict.decided or self.state.progress.batches % self.settings.accumulation:
            return  # between the parts of an optimizer step, whose gradients would be lost
        compiled, graph = self.compile.compile_now(self.accelerator.device), graphs_fit(self.settings, self.accelerator)
        if compiled is None:
            return
        if len(batches) > 1:  # of several sizes, so their shapes are rare
            self.compile.wait()
            return
        (batch,) = batches
        example = batch["latents"].to(self.features.dtype), batch["timesteps"], self.features[batch["captions"]]
        self.predict.use(example, compiled=compiled, graph=graph, must=self.settings.compile == "always")
        self.state.trained.forget_gradients()

    def loss(self, error: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Each image's weighted loss: error (B, C, h, w) -> (B,)."""
        c = self.settings.huber_c
        losses = squared(error) if c is None else pseudo_huber(error, c)
        weights: torch.Tensor = self.loss_weights[timesteps]
        return losses * weights

    def preservation_loss(self, preserved: Preserved) -> torch.Tensor:
        """This process's part of the preserved samples' loss. The parts of a step average to the samples' mean."""
        accelerator, samples = self.accelerator, self.settings.preservation.samples
        step, part = divmod(self.state.progress.batches, self.settings.accumulation)
        parts: int = accelerator.num_processes * self.settings.accumulation
        first = step * samples + part * accelerator.num_processes + accelerator.process_index
        total = torch.zeros((), device=accelerator.device)
        positions = range(first, (step + 1) * samples, parts)
        for batch in preserved.batches(self.seed, positions, one_at_a_time=self.settings.low_memory):
            error = preservation_error(self.model, batch, preserved.features)
            total = total + self.loss(error, batch.timesteps).sum()
        return total * parts / samples

    def validate(self) -> None:
        """Measure the averaged weights, draw with them, and keep them if they are the best so far."""
        state = self.state
        with state.averaged(), self.compile.paused(self.accelerator.device):
            found = validation_loss(
                self.model, self.scheduler, self.grid, self.grid_batches, self.features, self.accelerator
            )
            score = self.draw(state.progress.step)
        state.progress.add_validation(found, score, state.ema.average)

    def draw(self, step: int) -> float | None:
        """Call `on_validation` in the main process and return its score to every process."""
        score = None
        if self.on_validation and self.accelerator.is_main_process:
            self.unet.eval()
            with self.state.trained.in_float32():
                score = self.on_validation(step)
            self.unet.train()
        if self.accelerator.num_processes == 1:
            return score
        sent = torch.tensor(math.nan if score is None else score, dtype=torch.float64, device=self.accelerator.device)
        received = float(broadcast(sent).item())
        return None if math.isnan(received) else received


def check_fit(unet: UNet2DConditionModel, scheduler: DDPMScheduler, latents: Latents) -> None:
    """Raise BestiaryError when the latents, the captions or the scheduler do not match the UNet."""
    for split, cache in (("train", latents.training), ("val", latents.validation)):
        if not len(cache):
            raise BestiaryError(f"There are no latents in the {split} split. Run the encode stage again.")
    channels, width = latents.training.posterior(0, 0)[0].shape[0], latents.training.features.shape[2]
    if channels != unet.config.in_channels:
        raise BestiaryError(
            f"The latents have {channels} channels and the base's UNet takes {unet.config.in_channels}. "
            "Run the encode stage with this base."
        )
    if width != unet.config.cross_attention_dim:
        raise BestiaryError(
            f"The captions have {width} features and the base's UNet takes {unet.config.cross_attention_dim}. "
            "Run the encode stage with this base."
        )
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise BestiaryError(
            f"The base predicts {scheduler.config.prediction_type!r}, which cannot be trained here. "
            f"Choose a base that predicts {' or '.join(PREDICTION_TYPES)}."
        )
    for cache in (latents.training, latents.validation):
        uncaptioned = sorted(set(cache.images["class"]) - set(cache.captions["class"]))
        if uncaptioned:
            raise BestiaryError(f"The class {uncaptioned[0]} has no caption. Run the encode stage again.")


def check_preserved(latents: Latents, settings: Train) -> None:
    """Raise BestiaryError unless there are predictions of the base exactly when train.preservation needs them."""
    if (latents.preserved is None) != (settings.preservation.kind == "none"):
        found = "no predictions" if latents.preserved is None else "predictions"
        raise BestiaryError(
            f"train.preservation.kind is {settings.preservation.kind}, but training was given {found} of the base to "
            "preserve. Call `preserve` exactly when the kind is not none."
        )


def _accelerator(settings: Train) -> tuple[Accelerator, int]:
    """The accelerator, and how many images one process takes at a time."""
    processes()
    _, dtype = device_and_dtype()
    # float16 needs autocast and a loss scaler. bfloat16 needs neither: see half_precision.py.
    accelerator = Accelerator(
        mixed_precision="fp16" if dtype is torch.float16 else "no", gradient_accumulation_steps=settings.accumulation
    )
    if settings.compile == "always":
        check_compiler(accelerator.device)
    return accelerator, images_at_a_time(settings, accelerator.num_processes)


def _weights(scheduler: DDPMScheduler, settings: Train) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each timestep is drawn, and how much its loss counts: (timesteps,) each."""
    weights = snr_weights(scheduler, torch.arange(scheduler.config.num_train_timesteps), settings.min_snr_gamma)
    if settings.timestep_sampling == "importance":
        # Timesteps that are drawn in proportion to their weights all count the same.
        return weights, weights.mean().repeat(len(weights))
    return torch.ones_like(weights), weights
