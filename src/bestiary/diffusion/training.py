"""Training: a LoRA adapter on cached latents and captions, resumable, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from bestiary.diffusion.adapter import inject
from bestiary.diffusion.base import device_and_dtype, processes
from bestiary.diffusion.batches import TrainingStream, ValidationGrid, collate, seeded_number
from bestiary.diffusion.checkpoints import load_checkpoint, save_checkpoint, stop_on_sigterm
from bestiary.diffusion.latents import LatentCache
from bestiary.diffusion.objective import (
    PREDICTION_TYPES,
    prediction_error,
    pseudo_huber,
    snr_weights,
    squared,
    validation_loss,
)
from bestiary.diffusion.progress import OnLog, Progress, TrainingResult, copies
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

OnValidation = Callable[[int], float | None]


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
    optimizer: str = "adamw"  # adamw | adamw8bit
    compile: bool = False
    criterion: str = "val_loss"  # val_loss | clip_score: by which the best step is chosen
    patience: int | None = None  # validations without an improvement of min_delta after which training ends
    min_delta: float = 0.0
    checkpoint_seconds: float = 30.0  # between two checkpoints, at least; decides nothing


class Ema:
    """A moving average of the trainable parameters, warmed up so that the first steps do not weigh on it."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = copies(parameters)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after `step` steps."""
        decay = min(self.decay, step / (10 + step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged parameters."""
        trained = copies(self.parameters)
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
    what would be saved now, first at step 0, when it still equals the base: the place to draw a sheet. It may return
    the CLIP score of what it drew. Both are called in the main process only.

    With a folder for `checkpoints` (one for each `checkpoint_key`), a training that was killed goes on from the newest
    and ends with the same adapter as one that was not; SIGTERM saves one before it ends.

    Raises BestiaryError when the base and the latents do not go together, this machine cannot do what the settings
    say, the loss stops being a number, the disk is full, or SIGTERM came.
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
        make_optimizer(parameters, settings),
        DataLoader(remaining, micro_batch, num_workers=workers, pin_memory=workers > 0, collate_fn=collate),
        DataLoader(grid, micro_batch, collate_fn=collate),
    )
    ema = Ema(parameters, settings.ema_decay)
    progress = Progress(settings, len(training), accelerator, on_log)

    def show(step: int) -> float | None:
        score = None
        if on_validation and accelerator.is_main_process:
            unet.eval()
            score = on_validation(step)
            unet.train()
        if accelerator.num_processes == 1:
            return score
        known = torch.tensor(math.nan if score is None else score, dtype=torch.float64, device=accelerator.device)
        agreed = float(broadcast(known).item())
        return None if math.isnan(agreed) else agreed

    def validate() -> None:
        with ema.applied():
            found = validation_loss(model, scheduler, grid, grid_loader, features, accelerator)
            score = show(progress.step)
        progress.note_validation(found, score, ema.average)

    def save() -> None:
        if checkpoints and accelerator.is_main_process:
            state = {"weights": copies(parameters), "average": ema.average, "optimizer": optimizer.state_dict()}
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
        for batches in stream_loader:
            if settings.dropout:  # dropout draws from the global state only
                torch.manual_seed(seeded_number(settings.seed, "dropout", progress.draws, accelerator.process_index))
            progress.learning_rate = settings.learning_rate * learning_rate_factor(settings, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = progress.learning_rate
            with accelerator.accumulate(model):
                losses, weighted = [], []
                for batch in batches:  # one, but where images of two sizes meet
                    error = prediction_error(model, scheduler, batch, features)
                    loss = squared(error) if settings.huber_c is None else pseudo_huber(error, settings.huber_c)
                    weighted.append(loss * loss_weights[batch["timesteps"]])
                    losses.append(squared(error.detach()))
                accelerator.backward(torch.cat(weighted).mean())
                progress.add_loss(torch.cat(losses).mean())
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


def make_optimizer(parameters: Sequence[torch.nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW in float32, or with its averages in 8 bits (Dettmers et al. 2021, arXiv:2110.02861).

    Raises BestiaryError when bitsandbytes, which the latter needs, is not here or does not work on this device.
    """
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise BestiaryError(
            "train.optimizer is adamw8bit, which needs bitsandbytes: pip install 'bestiary[adamw8bit]'."
        ) from None
    probe = torch.zeros(8192, device=parameters[0].device, requires_grad=True)  # smaller ones stay in 32 bits
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe]).step()
    except Exception as error:  # whatever its kernels raise where they do not exist
        raise BestiaryError(
            f"train.optimizer is adamw8bit, and bitsandbytes does not work on this {probe.device.type} "
            f"({type(error).__name__}): set it to adamw."
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)
    return optimizer


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # a missing compiler, or no Triton for this device
        raise BestiaryError(
            f"train.compile is true, and torch.compile does not work on this machine ({type(error).__name__}): "
            "set it to false."
        ) from error


def _accelerator(settings: TrainingSettings) -> tuple[Accelerator, int]:
    """The accelerator, and how many images one process takes at a time."""
    processes()
    _, dtype = device_and_dtype()
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=settings.accumulation,
        dynamo_backend="inductor" if settings.compile else None,
    )
    if settings.compile:
        _check_compiler(accelerator.device)
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
        batch_size=settings.batch_size,
        seed=settings.seed,
        caption_dropout=settings.caption_dropout,
        noise_offset=settings.noise_offset,
        timestep_weights=weights if importance else torch.ones_like(weights),
        stratified=settings.timestep_sampling == "stratified",
    )
    # Timesteps that are drawn as often as they count all count the same.
    return stream, weights.mean().repeat(len(weights)) if importance else weights


def _agreed(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process has the wish; all of them must ask at the same step."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.reduce(torch.tensor(float(wish), device=accelerator.device)).item())


def _farewell(step: int, steps: int, checkpoints: Path | None) -> str:
    kept = "its state is kept, and the same command goes on from there" if checkpoints else "nothing of it is kept"
    return f"Training was asked to stop (SIGTERM) and did so after step {step} of {steps}: {kept}."


@torch.no_grad()
def _put(targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
