"""A faster way to compute a training step's prediction on a GPU: compiled, and launched as one CUDA graph.

Small batches are bound by the launching of kernels, large ones by what the kernels read and write. A CUDA graph helps
the former, compiling both. Both need inputs of one shape, so every other shape takes the plain way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bestiary.diffusion.compiled_layers import INDUCTOR_OPTIONS, use_compiled_forms
from bestiary.diffusion.waiting import waiting_bar
from bestiary.errors import BestiaryError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from bestiary.params import Train

# Measured on an H200 with 16 cores: Stable Diffusion 1.5's UNet, forward and backward, 256 px, batch 64.
COMPILE_SECONDS = 110.0
SPEED_UP = 1.3
WARM_UP, MEASURED = 3, 5  # eager steps before the choice
# How far a compiled step's prediction and gradients may be from the plain ones, as a share of their norm. bfloat16
# has 8 significant bits; Stable Diffusion's size, compiled on an H200, trained 20 steps with losses equal to 2e-6.
TOLERANCE = 0.05
LOSS_SCALE = 4096.0  # keeps the check's gradients from becoming 0 in float16

Mode = Literal["auto", "always", "never"]


class Prediction(NamedTuple):
    """What a UNet answers, as diffusers names it."""

    sample: torch.Tensor  # (B, C, h, w)


class FastPrediction:
    """Predicts as `model` does, compiled or as a CUDA graph for inputs of the shape that `use` was called for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shape: torch.Size | None = None
        self.fast: Callable[..., torch.Tensor] | None = None

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> Prediction:
        if self.fast is not None and noisy.shape == self.shape:
            return Prediction(self.fast(noisy, timesteps, features))
        return Prediction(self.model(noisy, timesteps, features, return_dict=False)[0])

    @property
    def decided(self) -> bool:
        """Whether `use` was called."""
        return self.shape is not None

    def use(
        self,
        example: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        *,
        compiled: bool,
        graph: bool,
        must: bool = False,
    ) -> None:
        """Compile the model for inputs of the shapes of `example`, and capture it as a CUDA graph.

        What does not work on this machine is left out, unless it `must` be compiled.
        Raises BestiaryError when it must be and cannot.
        """
        noisy, timesteps, features = (tensor.clone() for tensor in example)
        self.shape = noisy.shape
        step: Any = _Sample(self.model)
        compiled_step = self._compiled(step, (noisy, timesteps, features), must) if compiled else None
        fast = compiled_step is not None
        if compiled_step is not None:
            step = compiled_step
        if graph:
            reason = ""
            try:  # a module is changed in place and returned
                step = torch.cuda.make_graphed_callables(step, (noisy, timesteps, features))
                fast = True
            except RuntimeError as error:  # a graph keeps memory of its own, and not every kernel can be captured
                reason = type(error).__name__
            if reason:  # after the except block, because the error holds tensors until then
                torch.cuda.empty_cache()
                tqdm.write(f"Training continues without a CUDA graph ({reason}).")
        self.fast = step if fast else None

    def _compiled(self, plain: nn.Module, example: tuple[torch.Tensor, ...], must: bool) -> Any | None:
        # In this layout compiled convolutions are faster, and eager ones slower.
        layouts = [(p, p.data) for p in self.model.parameters() if p.dim() == 4 and not p.requires_grad]
        for parameter, data in layouts:
            parameter.data = data.contiguous(memory_format=torch.channels_last)
        use_compiled_forms(self.model)
        step: Any = torch.compile(plain, dynamic=False, options=INDUCTOR_OPTIONS)
        try:
            with waiting_bar(COMPILE_SECONDS):
                self._compare(plain, step, example)
        except Exception as error:  # whatever a compiler and its backends raise
            if must:
                raise cannot_compile(error) from error
            for parameter, data in layouts:
                parameter.data = data
            tqdm.write(f"Training continues without torch.compile: {_reason(error)}.")
            return None
        return step

    def _compare(
        self, plain: nn.Module, compiled: Callable[..., torch.Tensor], example: tuple[torch.Tensor, ...]
    ) -> None:
        """Compile, and raise OtherNumbersError when prediction or gradients differ from the plain step's.

        With dropout the two draw different random numbers, so they are not compared. Gradients are not averaged with
        other processes, which may not compile at the same step.
        """
        alone = self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with _without_zeros(trained), alone:
            answers = _answers(compiled, example, trained)
            _synchronize(example[0].device)
            if any(isinstance(module, nn.Dropout) and module.p for module in self.model.modules()):
                return
            try:
                expected = _answers(plain, example, trained)
            except torch.cuda.OutOfMemoryError:  # the plain step may need more memory than the compiled one
                torch.cuda.empty_cache()
                return
        for answer, wanted in zip(answers, expected, strict=True):
            if not (answer - wanted).norm() <= TOLERANCE * wanted.norm():  # also true for NaN
                raise OtherNumbersError


class OtherNumbersError(Exception):
    """A compiled step computes something else than the plain one."""


class _Sample(nn.Module):
    """The model's answer as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        sample: torch.Tensor = self.model(noisy, timesteps, features, return_dict=False)[0]
        return sample


@contextmanager
def _without_zeros(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that are zero have small random values: a fresh adapter's gradients are zero in one matrix."""
    generator = torch.Generator().manual_seed(0)
    zeros = [parameter for parameter in parameters if not parameter.any()]
    for parameter in zeros:
        parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()


def _answers(
    step: Callable[..., torch.Tensor], example: tuple[torch.Tensor, ...], trained: Sequence[nn.Parameter]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step's prediction and the gradients of the trained parameters, in float32, as one row each."""
    for parameter in trained:
        parameter.grad = None
    sample = step(*example)
    (LOSS_SCALE * sample.float().square().mean()).backward()
    gradients = [parameter.grad.flatten().float() for parameter in trained if parameter.grad is not None]
    for parameter in trained:
        parameter.grad = None
    return sample.detach().flatten().float(), torch.cat(gradients)


class CompileChoice:
    """Decides after a few measured steps whether compiling pays in the steps that are left.

    Several processes would measure different times, and must not decide differently: with `auto` they do not compile.
    """

    def __init__(self, mode: Mode, steps_left: int, processes: int) -> None:
        self.mode: Mode = "never" if mode == "auto" and processes > 1 else mode
        self.steps_left = steps_left
        self.started = 0.0
        self.done = 0
        self.chosen: bool | None = None
        self.waited = 0

    def compile_now(self, device: torch.device) -> bool | None:
        """Whether to compile, asked once before each step; None while that is not known yet."""
        if self.chosen is None:
            self.chosen = self._choose(device)
        return self.chosen

    def _choose(self, device: torch.device) -> bool | None:
        if self.mode != "auto":
            return self.mode == "always"
        if device.type != "cuda":
            return False
        if self.done == WARM_UP:
            _synchronize(device)
            self.started = time.perf_counter()
        if self.done < WARM_UP + MEASURED:
            self.done += 1
            return None
        _synchronize(device)
        return pays((time.perf_counter() - self.started) / MEASURED, self.steps_left - self.done)

    def wait(self) -> None:
        """Count a step that could not be compiled. After a few, `auto` decides against compiling, `always` says so."""
        self.waited += 1
        if not self.chosen or self.waited != MEASURED:
            return
        if self.mode == "auto":
            self.chosen = False
        else:
            tqdm.write("Training is not compiled yet: its batches have images of several sizes.")

    @contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Inside, time does not count: a validation between two steps says nothing about steps."""
        _synchronize(device)
        begun = time.perf_counter()
        yield
        _synchronize(device)
        self.started += time.perf_counter() - begun


def pays(seconds_per_step: float, steps: int) -> bool:
    """Whether compiling saves at least twice the time that it takes, compared with steps like the measured ones.

    They are measured without a CUDA graph: another capture after compiling would need memory for both graphs.

    >>> pays(0.13, steps=300), pays(0.13, steps=15_000)
    (False, True)
    """
    return seconds_per_step * steps * (1 - 1 / SPEED_UP) > 2 * COMPILE_SECONDS


def graphs_fit(settings: Train, accelerator: Accelerator) -> bool:
    """Whether a training step can be one CUDA graph: it draws nothing at random and does not wait for others."""
    alone = accelerator.num_processes == 1 and accelerator.mixed_precision == "no"
    return accelerator.device.type == "cuda" and alone and not settings.dropout and not settings.gradient_checkpointing


def check_compiler(device: torch.device) -> None:
    """Raise BestiaryError when torch.compile does not work on this machine."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # there is no compiler, or no Triton for this device
        raise cannot_compile(error) from error


def cannot_compile(error: Exception) -> BestiaryError:
    """What to say when torch.compile fails although it must work."""
    return BestiaryError(f"train.compile is always, but {_reason(error)}. Set it to never.")


def _reason(error: Exception) -> str:
    """Why a compiled step is not used, as a clause."""
    if isinstance(error, OtherNumbersError):
        return "a compiled step computes something else than the plain one on this machine"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "a compiled step needs more GPU memory than there is"
    return f"torch.compile does not work on this machine ({type(error).__name__})"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
