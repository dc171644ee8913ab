"""Training: a LoRA adapter on cached latents and captions, resumable, on any number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import device_and_dtype
from bestiary.diffusion.batches import TrainingStream, ValidationGrid, seeded_number
from bestiary.diffusion.checkpoints import load_checkpoint, save_checkpoint, stop_on_sigterm
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.objective import (
    PREDICTION_TYPES,
    Validation,
    prediction_error,
    pseudo_huber,
    snr_weights,
    squared,
    validation_loss,
)
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

LOG_EVERY = 10  # steps between two rows of the history
CHECKPOINT_SECONDS = 30.0

OnLog = Callable[[int, Mapping[str, float]], None]
OnValidation = Callable[[int], None]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. `batch_size` counts the images of one optimiser step, over all processes."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    validate_every: int
    seed: int
    rank: int
    alpha: float
    targets: Sequence[str]
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    caption_dropout: float = 0.0
    min_snr_gamma: float | None = None
    huber_c: float | None = None  # None: squared error
    noise_offset: float = 0.0
    timestep_sampling: str = "uniform"  # uniform | stratified | importance
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    ema_decay: float = 0.0
    learning_rate_schedule: str = "cosine"  # cosine | linear | constant
    accumulation: int = 1
    gradient_checkpointing: bool = False
    patience: int | None = None  # validations without an improvement of min_delta after which training ends
    min_delta: float = 0.0


@dataclass(frozen=True)
class TrainingResult:
    """What a training reached. Losses are plain mean squared errors; the validation's are those of the best step."""

    steps: int
    best_step: int
    train_loss: float
    val_loss: float
    base_val_loss: float
    images_per_second: float
    peak_memory_mib: float
    trainable_parameters: int
    seconds: float
    val_loss_by_band: list[float]
    val_loss_by_class: dict[str, float]
    history: list[dict[str, float]]  # a row every LOG_EVERY steps and at each validation

    def report(self) -> dict[str, float]:
        """The single numbers, for reports/train.json."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int | float)}


class Ema:
    """A moving average of the trainable parameters, warmed up so that the first steps do not weigh on it."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = _copies(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps."""
        decay = min(self.decay, step / (10 + step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged parameters."""
        trained = _copies(self.parameters)
        _put(self.parameters, self.average)
        try:
            yield
        finally:
            _put(self.parameters, trained)


def train(
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    training: LatentCache,
    validation: LatentCache,
    settings: TrainingSettings,
    *,
    on_log: OnLog | None = None,
    on_validation: OnValidation | None = None,
    checkpoints: Path | None = None,
) -> TrainingResult:
    """Train a fresh adapter in `unet`, which keeps the averaged weights of its best step, ready for `save_adapter`.

    `on_log(step, numbers)` is called with each row of the history. `on_validation(step)` is called while `unet` holds
    what would be saved now, first at step 0, when it still equals the base: the place to draw a sheet. Both are called
    in the main process only.

    With a folder for `checkpoints` (one for each `checkpoint_key`), a training that was killed goes on from the newest
    and ends with the same adapter as one that was not; SIGTERM saves one before it ends.

    Raises BestiaryError when the base and the latents do not go together, the loss stops being a number, the disk is
    full, or SIGTERM came.
    """
    check_fit(unet, scheduler, training, validation)
    accelerator, micro_batch = _accelerator(settings)
    parameters = inject(
        unet,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=settings.targets,
        seed=settings.seed,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    unet.to(accelerator.device, memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    features = training.features.to(accelerator.device, unet.dtype)  # (captions, T, D)
    stream, loss_weights = _stream(training, scheduler, settings)
    loss_weights = loss_weights.to(accelerator.device)
    grid = ValidationGrid(validation, len(loss_weights))
    saved = load_checkpoint(checkpoints) if checkpoints else None
    remaining = Subset(stream, range(saved["progress"]["step"] * settings.batch_size if saved else 0, len(stream)))
    # A GPU must not wait for its next batch; a CPU has no better use for its cores than the step itself.
    workers = 2 if accelerator.device.type == "cuda" else 0
    model, optimizer, stream_loader, grid_loader = accelerator.prepare(
        unet,
        torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True),
        DataLoader(remaining, micro_batch, num_workers=workers, pin_memory=workers > 0),
        DataLoader(grid, micro_batch),
    )
    ema = Ema(parameters, settings.ema_decay)
    progress = _Progress(settings, len(training), accelerator, on_log)

    def show(step: int) -> None:
        if on_validation and accelerator.is_main_process:
            unet.eval()
            on_validation(step)
            unet.train()
        accelerator.wait_for_everyone()

    def validate() -> None:
        with ema.applied():
            found = validation_loss(model, scheduler, grid, grid_loader, features, accelerator)
            show(progress.step)
        progress.note_validation(found, ema.average)

    def save() -> None:
        if checkpoints and accelerator.is_main_process:
            state = {"weights": _copies(parameters), "average": ema.average, "optimizer": optimizer.state_dict()}
            state["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
            save_checkpoint(checkpoints, progress.step, state | {"progress": progress.state()})

    model.train()
    if saved:
        show(0)  # the adapter is still fresh: what is shown is the base
        _put(parameters, saved["weights"])
        _put(ema.average, saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(saved["scaler"])
        progress.restore(saved["progress"])
    else:
        validate()
    progress.start_clock()
    bar = tqdm(total=settings.steps, initial=progress.step, desc="train", disable=not accelerator.is_local_main_process)
    with bar, stop_on_sigterm() as stop:
        for batch in stream_loader:
            if settings.dropout:  # dropout draws from the global state only
                torch.manual_seed(seeded_number(settings.seed, "dropout", progress.draws, accelerator.process_index))
            progress.learning_rate = settings.learning_rate * learning_rate_factor(settings, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = progress.learning_rate
            with accelerator.accumulate(model):
                error = prediction_error(model, scheduler, batch, features)
                losses = squared(error) if settings.huber_c is None else pseudo_huber(error, settings.huber_c)
                accelerator.backward((losses * loss_weights[batch["timesteps"]]).mean())
                progress.add_loss(squared(error.detach()).mean())
                if accelerator.sync_gradients:
                    norm_before = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                    progress.grad_norm = norm_before
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            ema.update(progress.step)
            bar.update()
            if progress.row_due:
                progress.take_losses()
                if progress.validation_due:
                    validate()
                    progress.start_clock()
                else:
                    progress.log()
                bar.set_postfix(loss=f"{progress.train_loss:.4f}", best=f"{progress.best.overall:.4f}", refresh=False)
                if progress.out_of_patience:
                    break
                if progress.checkpoint_due:
                    save()
            if (progress.row_due or accelerator.num_processes == 1) and _agreed(accelerator, stop.made):
                progress.take_losses()
                save()
                raise BestiaryError(_farewell(progress.step, settings.steps, checkpoints))
    _put(parameters, progress.best_weights)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    return progress.result(sum(parameter.numel() for parameter in parameters))


def check_fit(
    unet: UNet2DConditionModel, scheduler: DDPMScheduler, training: LatentCache, validation: LatentCache
) -> None:
    """Raise BestiaryError when the latents, the captions or the scheduler are not for this UNet."""
    for cache in (training, validation):
        if not len(cache):
            raise BestiaryError("There are no images to train on or none to validate with.")
    channels, width = training.posterior(0, 0)[0].shape[0], training.features.shape[2]
    if channels != unet.config.in_channels:
        raise BestiaryError(
            f"The latents have {channels} channels and the base's UNet takes {unet.config.in_channels}."
        )
    if width != unet.config.cross_attention_dim:
        raise BestiaryError(f"The captions have {width} features and the UNet takes {unet.config.cross_attention_dim}.")
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise BestiaryError(
            f"The base predicts {scheduler.config.prediction_type!r}; only {' and '.join(PREDICTION_TYPES)} can train."
        )
    for cache in (training, validation):
        uncaptioned = sorted(set(cache.images["class"]) - set(cache.captions["class"]))
        if uncaptioned:
            raise BestiaryError(f"The class {uncaptioned[0]} has no caption: run the encode stage again.")


def learning_rate_factor(settings: TrainingSettings, step: int) -> float:
    """The share of the learning rate at a step: linear warm-up, then constant, or down to 0 linearly or as a cosine."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = min(1.0, (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps))
    factors = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return factors[settings.learning_rate_schedule]


def _accelerator(settings: TrainingSettings) -> tuple[Accelerator, int]:
    """The accelerator, and how many images one process takes at a time."""
    _, dtype = device_and_dtype()
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_steps=settings.accumulation)
    micro_batch, remainder = divmod(settings.batch_size, accelerator.num_processes * settings.accumulation)
    if remainder:
        raise BestiaryError(
            f"train.batch_size is {settings.batch_size}, which {accelerator.num_processes} processes with "
            f"{settings.accumulation} accumulated steps cannot share evenly."
        )
    return accelerator, micro_batch


def _stream(
    cache: LatentCache, scheduler: DDPMScheduler, settings: TrainingSettings
) -> tuple[TrainingStream, torch.Tensor]:
    """The run's images, and the weight of each timestep's loss: (timesteps,)."""
    weights = snr_weights(scheduler, torch.arange(scheduler.config.num_train_timesteps), settings.min_snr_gamma)
    importance = settings.timestep_sampling == "importance"
    stream = TrainingStream(
        cache,
        settings.steps * settings.batch_size,
        seed=settings.seed,
        caption_dropout=settings.caption_dropout,
        noise_offset=settings.noise_offset,
        timestep_weights=weights if importance else torch.ones_like(weights),
        stratified=settings.timestep_sampling == "stratified",
    )
    # Timesteps that are drawn as often as they count all count the same.
    return stream, weights.mean().repeat(len(weights)) if importance else weights


class _Progress:
    """Where a training stands: its step, its curve, its best weights and its clock.

    Losses stay on the device until a row is due, so that a GPU never waits for them.
    """

    STATE = ("step", "best_step", "since_best", "base_val_loss", "best_weights", "history", "train_loss", "seconds")

    def __init__(self, settings: TrainingSettings, images: int, accelerator: Accelerator, on_log: OnLog | None) -> None:
        self.settings = settings
        self.images = images
        self.accelerator = accelerator
        self.on_log = on_log
        self.step = 0
        self.best_step = 0
        self.since_best = 0  # validations
        self.base_val_loss = math.nan
        self.best: Validation
        self.best_weights: list[torch.Tensor] = []
        self.history: list[dict[str, float]] = []
        self.train_loss = math.nan
        self.learning_rate = 0.0
        self.grad_norm: Any = math.nan
        self.seconds = 0.0  # spent in training steps
        self.started = self.saved_at = self._resumed_at = time.perf_counter()
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
        if time.perf_counter() - self.saved_at < CHECKPOINT_SECONDS:
            return False
        self.saved_at = time.perf_counter()
        return True

    @property
    def images_per_second(self) -> float:
        return self.step * self.settings.batch_size / self.seconds if self.seconds else 0.0

    def start_clock(self) -> None:
        """Count the time from now on as training."""
        self._resumed_at = time.perf_counter()

    def add_loss(self, loss: torch.Tensor) -> None:
        self._losses.append(loss)

    def take_losses(self) -> None:
        """Average the losses since the last row, over all processes. Raises BestiaryError when one is not finite."""
        if not self._losses:
            return
        losses = self.accelerator.reduce(torch.stack(self._losses).float(), "mean").tolist()
        self._losses.clear()
        now = time.perf_counter()
        self.seconds += now - self._resumed_at
        self._resumed_at = now
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                failed = self.step - (len(losses) - 1 - index) // self.settings.accumulation
                raise BestiaryError(f"The training loss at step {failed} is {loss}: lower train.learning_rate.")
        self.train_loss = sum(losses) / len(losses)

    def note_validation(self, found: Validation, weights: Sequence[torch.Tensor]) -> None:
        """Keep the weights if they are the best trained ones; the fresh adapter of step 0 is no candidate."""
        if self.step == 0:
            self.base_val_loss = found.overall
        self.since_best += 1
        if self.best_step == 0 or found.overall < self.best.overall - self.settings.min_delta:
            self.best_step, self.best, self.best_weights = self.step, found, _copies(weights)
            self.since_best = 0
        self.log(val_loss=found.overall)

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
        return {name: getattr(self, name) for name in self.STATE} | {"best": asdict(self.best)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken; the curve so far is told again, to a run that has not heard of it."""
        for name in self.STATE:
            setattr(self, name, state[name])
        self.best = Validation(**state["best"])
        for row in self.history:
            self._tell(row)

    def result(self, trainable_parameters: int) -> TrainingResult:
        return TrainingResult(
            steps=self.step,
            best_step=self.best_step,
            train_loss=self.train_loss,
            val_loss=self.best.overall,
            base_val_loss=self.base_val_loss,
            images_per_second=self.images_per_second,
            peak_memory_mib=_peak_memory_mib(self.accelerator.device),
            trainable_parameters=trainable_parameters,
            seconds=time.perf_counter() - self.started,
            val_loss_by_band=self.best.by_band,
            val_loss_by_class=self.best.by_class,
            history=self.history,
        )

    def _tell(self, row: Mapping[str, float]) -> None:
        if self.on_log and self.accelerator.is_main_process:
            self.on_log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})


def _agreed(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process has the wish; all of them must ask at the same step."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.reduce(torch.tensor(float(wish), device=accelerator.device)).item())


def _farewell(step: int, steps: int, checkpoints: Path | None) -> str:
    kept = "its state is kept, and the same command goes on from there" if checkpoints else "nothing of it is kept"
    return f"Training was asked to stop (SIGTERM) and did so after step {step} of {steps}: {kept}."


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _put(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: the GPU's for a GPU, this process's otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
