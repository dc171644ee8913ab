"""Distil a base and its adapter into a few-step adapter: multistep consistency distillation with the guidance built in.

A picture is drawn in a few passes: predict the clean picture at the first timestep, add fresh noise for the second,
predict again, and so on. At the timestep of a pass, the student predicts the clean latents that the teacher's guided
path ends with. The teacher goes down its path to the timestep of the next pass, and the student's own prediction there
is the target (Song et al. 2023, arXiv:2303.01469; with a few timesteps only: Heek et al. 2024, arXiv:2403.06807). At
the end of the path, where noise hides only details, the target is the teacher's prediction. Because the path is guided,
the student needs no guidance (Luo et al. 2023, arXiv:2310.04378). The student is the teacher with a LoRA on its linear
and convolution layers (arXiv:2311.05556).
Letters: B pictures, C, h, w of latents, T tokens, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import device_and_dtype, processes
from bestiary.diffusion.batches import Batch, Sample, TrainingStream, ValidationGrid, collate
from bestiary.diffusion.checkpoints import load_checkpoint
from bestiary.diffusion.full_memory import explained
from bestiary.diffusion.half_precision import TrainedWeights
from bestiary.diffusion.objective import Validation, pseudo_huber, squared
from bestiary.diffusion.progress import OnLog, Pace, Progress, TrainingResult
from bestiary.diffusion.training import check_fit
from bestiary.diffusion.training_loop import Callbacks, OnValidation, TrainingState, run_steps
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from bestiary.diffusion.latents import Latents
    from bestiary.params import Distill

VALIDATION_IMAGES = 32  # the teacher follows the path of each once, in up to 2 x teacher_steps passes
BETAS = (0.9, 0.99)  # a shorter memory than Adam's usual 0.999, because the targets move with the student


@explained("A distillation step", "Lower distill.batch_size.")
def distill(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    latents: Latents,
    settings: Distill,
    *,
    seed: int,
    on_log: OnLog | None = None,
    on_validation: OnValidation | None = None,
    checkpoints: Path | None = None,
) -> TrainingResult:
    """Train a LoRA in `unet`, the teacher. Afterwards it has the averaged weights of the best step.

    The validation loss is the mean squared distance, in clean latents, between the student's prediction in each pass
    and the end of the teacher's path. Callbacks and `checkpoints` work as in `training.train`: an interrupted run
    resumes and ends with the same weights.

    Raises BestiaryError when the base and the latents do not match, the loss is not finite, the disk is full, several
    processes were started, or SIGTERM arrived.
    """
    check_fit(unet, scheduler, latents)
    saved = load_checkpoint(checkpoints) if checkpoints else None
    first_step = saved.progress.step if saved else 0
    run = _Run(unet, scheduler, latents, settings, seed, first_step, Callbacks(on_log, on_validation))
    return run_steps(run, saved, checkpoints, verb="distil", gerund="Distilling")


# ---- the noise schedule and the teacher's path ----


@dataclass(frozen=True)
class NoiseSchedule:
    """A base's noise schedule: latents at timestep t are alpha[t] x + sigma[t] e for clean latents x and noise e."""

    alpha: torch.Tensor  # (timesteps,)
    sigma: torch.Tensor  # (timesteps,)
    predicts_v: bool

    @classmethod
    def of(cls, scheduler: DDPMScheduler, device: torch.device) -> NoiseSchedule:
        """The schedule of a base that predicts the noise or the velocity."""
        alphas = scheduler.alphas_cumprod.float().to(device)
        return cls(alphas.sqrt(), (1 - alphas).sqrt(), scheduler.config.prediction_type == "v_prediction")

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Clean latents with noise: (B, C, h, w), timesteps (B,)."""
        return _at(self.alpha, timesteps) * clean + _at(self.sigma, timesteps) * noise

    def split(
        self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latents and the noise that a prediction implies for noisy latents: (B, C, h, w) each."""
        alpha, sigma = _at(self.alpha, timesteps), _at(self.sigma, timesteps)
        if self.predicts_v:
            return alpha * noisy - sigma * prediction, sigma * noisy + alpha * prediction
        return (noisy - sigma * prediction) / alpha.clamp(min=1e-4), prediction


def _at(values: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    return values[timesteps][:, None, None, None]


def path_timesteps(passes: Sequence[int], path_end: int, teacher_steps: int, total: int) -> list[int]:
    """The timesteps of the teacher's path, ascending: its end, the ends of equal parts of the schedule, and the passes.

    >>> path_timesteps([999, 699], 399, 5, 1000)
    [399, 599, 699, 799, 999]
    """
    grid = {total * (number + 1) // teacher_steps - 1 for number in range(teacher_steps)}
    return [path_end, *sorted(step for step in grid | set(passes) if path_end < step <= max(passes))]


class TeacherPath:
    """The teacher's guided path, and the clean prediction that it ends with.

    A step is one step of DPM-Solver++ (2S) (Lu et al. 2022, arXiv:2211.01095, algorithm 1), with its midpoint in
    log-SNR. DDIM with as many passes ends farther from the path's true end, and the student would learn that error.
    """

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: DDPMScheduler, settings: Distill, channel_means: torch.Tensor
    ) -> None:
        self.unet = unet
        self.device, self.dtype = unet.device, unet.dtype
        self.mean = channel_means.to(unet.device)[:, None, None]
        self.schedule = NoiseSchedule.of(scheduler, self.device)
        total = len(self.schedule.alpha)
        if max(settings.timesteps) >= total:
            raise BestiaryError(
                f"distill.timesteps must be below {total} for this base, not {max(settings.timesteps)}."
            )
        self.last, *self.timesteps = path_timesteps(
            settings.timesteps, settings.path_end, settings.teacher_steps, total
        )
        # The next lower timestep of the path, by timestep.
        self.following = torch.full((total,), self.last, device=self.device)
        self.following[self.timesteps] = torch.tensor([self.last, *self.timesteps[:-1]], device=self.device)
        # The timestep of the next pass, by the timestep of a pass.
        self.goals = torch.full((total,), self.last, device=self.device)
        self.goals[list(settings.timesteps)] = torch.tensor([*settings.timesteps[1:], self.last], device=self.device)
        log_snr = (self.schedule.alpha / self.schedule.sigma).log()
        self.middle = self.following.clone()
        for timestep in self.timesteps:
            goal = (log_snr[timestep] + log_snr[self.following[timestep]]) / 2
            self.middle[timestep] = (log_snr - goal).abs().argmin()
        self.guidance_scale = settings.guidance_scale
        low, high = settings.guidance_interval or (0.0, math.inf)
        level = self.schedule.sigma / self.schedule.alpha  # noise level, for latents scaled to 1
        self.guided = (level > low) & (level <= high) & (settings.guidance_scale > 1)

    def start(self, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The start of the path of a picture that is drawn from this noise: (B, C, h, w).

        At the last timestep, latents that the base was trained on still hold a trace of the image. Pure noise has
        none. The base takes it for the trace of an image whose latents are 0, and the picture becomes too bright or
        too dark (Lin et al. 2023, arXiv:2305.08891). So the path starts with the trace of the mean image.
        """
        return self.schedule.noised(self.mean.expand_as(noise), noise, timesteps)

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction in float32: (B, C, h, w), from latents, timesteps (B,) and features (B, T, D)."""
        prediction: torch.Tensor = self.unet(noisy.to(self.dtype), timesteps, features).sample
        return prediction.float()

    def teach(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor, empty: torch.Tensor
    ) -> torch.Tensor:
        """The teacher's prediction (B, C, h, w), guided where the noise level is within the guidance interval."""
        guided = torch.nonzero(self.guided[timesteps])[:, 0]
        unprompted = empty.expand(len(guided), -1, -1)
        with _as_teacher(self.unet):
            both = self.predict(
                torch.cat([noisy, noisy[guided]]),
                torch.cat([timesteps, timesteps[guided]]),
                torch.cat([features, unprompted]),
            )
        prediction, plain = both[: len(noisy)], both[len(noisy) :]
        return prediction.index_copy(0, guided, torch.lerp(plain, prediction[guided], self.guidance_scale))

    def move(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor, empty: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's step down the path: the new latents (B, C, h, w) and their timesteps (B,)."""
        schedule = self.schedule
        middle, following = self.middle[timesteps], self.following[timesteps]
        halfway = schedule.noised(*self.split(noisy, timesteps, features, empty), middle)  # by DDIM
        clean = self.split(halfway, middle, features, empty)[0]
        ratio = _at(schedule.sigma, following) / _at(schedule.sigma, timesteps)
        moved = ratio * noisy + (_at(schedule.alpha, following) - ratio * _at(schedule.alpha, timesteps)) * clean
        return moved, following

    def follow(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor, empty: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go down the path from a pass to the next one, or to the end: latents (B, C, h, w), timesteps (B,)."""
        goals = self.goals[timesteps]
        while len(rows := torch.nonzero(timesteps > goals)[:, 0]):
            moved, following = self.move(noisy[rows], timesteps[rows], features[rows], empty)
            noisy, timesteps = noisy.index_copy(0, rows, moved), timesteps.index_copy(0, rows, following)
        return noisy, timesteps

    def split(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor, empty: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latents and the noise that the teacher predicts for noisy latents: (B, C, h, w) each."""
        return self.schedule.split(noisy, self.teach(noisy, timesteps, features, empty), timesteps)

    @torch.no_grad()
    def end(self, noisy: torch.Tensor, timestep: int, features: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """The clean prediction that the path from this timestep ends with: (B, C, h, w)."""
        timesteps = torch.full((len(noisy),), timestep, device=self.device)
        while timesteps[0] != self.last:
            noisy, timesteps = self.move(noisy, timesteps, features, empty)
        return self.split(noisy, timesteps, features, empty)[0]


@contextmanager
def _as_teacher(unet: UNet2DConditionModel) -> Iterator[None]:
    """Disable the LoRA in the body."""
    from diffusers.utils import set_adapter_layers

    set_adapter_layers(unet, enabled=False)
    try:
        yield
    finally:
        set_adapter_layers(unet, enabled=True)


# ---- the run ----


@dataclass(frozen=True)
class _Draws:
    """How the stream chooses samples: every pass equally often."""

    steps: int
    batch_size: int
    caption_dropout: float = 0.0
    noise_offset: float = 0.0
    timestep_sampling: Literal["uniform", "stratified", "importance"] = "uniform"


class _Run:
    """One run on this process's device: the networks, the data and the progress."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        latents: Latents,
        settings: Distill,
        seed: int,
        first_step: int,
        callbacks: Callbacks,
    ) -> None:
        self.on_validation = callbacks.on_validation
        self.settings, self.unet = settings, unet
        self.accelerator = _accelerator()
        half = unet.dtype is torch.bfloat16
        unet.to(self.accelerator.device, memory_format=torch.contiguous_format if half else torch.channels_last)
        rank = settings.rank
        parameters = inject(unet, rank=rank, alpha=rank, dropout=0.0, targets=settings.targets, seed=seed)
        trained = TrainedWeights(parameters, torch.bfloat16 if half else torch.float32)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        # Evaluation mode: no layer has dropout, and PEFT would add its own in training mode.
        unet.eval()
        self.features = latents.training.features.to(unet.device, unet.dtype)  # (captions, T, D)
        self.path = TeacherPath(unet, scheduler, settings, latents.training.channel_means)
        weights = torch.zeros(len(self.path.schedule.alpha))
        weights[list(settings.timesteps)] = 1.0
        draws = _Draws(settings.steps, settings.batch_size)
        stream = TrainingStream(latents.training, draws, seed=seed, timestep_weights=weights)
        remaining = Subset(stream, range(first_step * settings.batch_size, len(stream)))
        workers = 2 if unet.device.type == "cuda" else 0
        optimizer, self.batches = self.accelerator.prepare(
            torch.optim.AdamW(trained.weights, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0, fused=True),
            DataLoader(remaining, settings.batch_size, num_workers=workers, collate_fn=collate),
        )
        pace = Pace(
            "distill", settings.steps, settings.batch_size, settings.validate_every, settings.checkpoint_seconds
        )
        progress = Progress(pace, len(latents.training), self.accelerator, callbacks.on_log)
        self.state = TrainingState(self.accelerator, trained, optimizer, settings, progress)
        self.lessons = _lessons(self.path, latents, settings)

    def train_on(self, batches: list[Batch]) -> bool:
        """Train on the next images, which always complete an optimizer step."""
        self.state.set_learning_rate()
        losses = torch.cat([self.loss(batch) for batch in batches])  # several batches only if images differ in size
        loss = losses.mean()
        return self.state.learn_from(loss, logged=loss.detach())

    def loss(self, batch: Batch) -> torch.Tensor:
        """The consistency loss of each picture: (B,)."""
        path, timesteps = self.path, batch["timesteps"]
        features, empty = self.features[batch["captions"]], self.features[:1]
        noise, noisy = batch["noise"], path.schedule.noised(batch["latents"], batch["noise"], timesteps)
        # Drawing starts with pure noise, so that is what the student sees in the first pass.
        first = (timesteps == self.settings.timesteps[0])[:, None, None, None]
        with torch.no_grad(), self.accelerator.autocast():
            start = torch.where(first, path.start(noise, timesteps), noisy)
            moved, following = path.follow(start, timesteps, features, empty)
            target = torch.empty_like(moved)
            for ends in (True, False):  # the teacher predicts at the path's end, the student before it
                at = torch.nonzero((following == path.last) == ends)[:, 0]
                if not len(at):
                    continue
                there = moved[at], following[at], features[at]
                prediction = path.teach(*there, empty) if ends else path.predict(*there)
                target = target.index_copy(0, at, path.schedule.split(there[0], prediction, there[1])[0])
        with self.accelerator.autocast():
            seen = torch.where(first, noise, noisy)
            guess = path.schedule.split(seen, path.predict(seen, timesteps, features), timesteps)[0]
        return pseudo_huber(guess - target, self.settings.huber_c)

    def validate(self) -> None:
        """Measure the averaged weights, draw with them, and keep them if they are the best so far."""
        state = self.state
        with state.averaged(), state.trained.in_float32():  # as in a saved adapter
            score = self.draw(state.progress.step)
            state.progress.add_validation(self.validation_loss(), score, state.ema.average)

    def draw(self, step: int) -> float | None:
        """Call `on_validation` and return its score."""
        return self.on_validation(step) if self.on_validation else None

    @torch.no_grad()
    def validation_loss(self) -> Validation:
        """The distance between the student's predictions in each pass and the ends of the teacher's path."""
        errors: dict[int, list[float]] = {}
        of_class: dict[str, list[float]] = {}
        for lesson in self.lessons:
            timesteps = torch.full((len(lesson.noisy),), lesson.timestep, device=self.unet.device)
            with self.accelerator.autocast():
                prediction = self.path.predict(lesson.noisy, timesteps, self.features[lesson.captions])
            guess = self.path.schedule.split(lesson.noisy, prediction, timesteps)[0]
            found = squared(guess - lesson.end).double().tolist()
            errors.setdefault(lesson.timestep, []).extend(found)
            for name, error in zip(lesson.classes, found, strict=True):
                of_class.setdefault(name, []).append(error)
        by_pass = {str(timestep): float(np.mean(found)) for timestep, found in errors.items()}
        overall = float(np.mean(list(by_pass.values())))
        if not math.isfinite(overall):
            raise BestiaryError("The validation loss is not a finite number. Lower distill.learning_rate.")
        return Validation(overall, by_pass, {name: float(np.mean(found)) for name, found in sorted(of_class.items())})


def _accelerator() -> Accelerator:
    if processes().num_processes > 1:
        raise BestiaryError("distill runs in one process only. Start it without accelerate launch.")
    return Accelerator(mixed_precision="fp16" if device_and_dtype()[1] is torch.float16 else "no")


@dataclass(frozen=True)
class _Lesson:
    """Validation images of one size in one pass, and where the teacher's path takes them."""

    timestep: int
    noisy: torch.Tensor  # (B, C, h, w)
    captions: torch.Tensor  # (B,)
    end: torch.Tensor  # (B, C, h, w)
    classes: list[str]


def _lessons(path: TeacherPath, latents: Latents, settings: Distill) -> list[_Lesson]:
    """Lessons in each pass for evenly spaced validation images. The first pass starts from pure noise."""
    cache = latents.validation
    grid = ValidationGrid(cache, len(path.schedule.alpha))
    count = min(VALIDATION_IMAGES, len(grid))
    images = [number * len(grid) // count for number in range(count)]
    features = latents.training.features.to(path.device, path.dtype)
    lessons = []
    for first in range(0, count, settings.batch_size):
        chosen = images[first : first + settings.batch_size]
        samples: list[Sample] = [grid[image] for image in chosen]
        for batch in collate(samples):
            classes = [grid.classes[chosen[place]] for place in batch["place"].tolist()]
            clean, noise, captions = (batch[key].to(path.device) for key in ("latents", "noise", "captions"))
            for number, timestep in enumerate(settings.timesteps):
                timesteps = torch.full((len(clean),), timestep, device=path.device)
                noisy = path.schedule.noised(clean, noise, timesteps) if number else noise
                start = noisy if number else path.start(noise, timesteps)
                end = path.end(start, timestep, features[captions], features[:1])
                lessons.append(_Lesson(timestep, noisy, captions, end, classes))
    return lessons
