"""Checkpoints that an interrupted training run resumes from, and what else it keeps until it has finished."""

from __future__ import annotations

import io
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from bestiary.diffusion.adapter import save_adapter
from bestiary.diffusion.adapter_format import FILE_NAME, Provenance
from bestiary.diffusion.objective import Validation
from bestiary.diffusion.progress import ProgressState
from bestiary.files import write_atomically

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

MAX_CHECKPOINTS = 2  # in case the newest is broken


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training run after a step."""

    weights: list[torch.Tensor]  # of the adapter
    average: list[torch.Tensor]  # their moving average
    optimizer: dict[str, Any]  # what torch's optimizer needs to resume
    scaler: dict[str, Any] | None  # what torch's gradient scaler needs to resume, in float16
    progress: ProgressState


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and delete all but the newest ones. Raises BestiaryError when the disk is full."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(folder / f"step-{checkpoint.progress.step:08}.pt", buffer.getvalue())
    for old in _newest_first(folder)[MAX_CHECKPOINTS:]:
        old.unlink()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` that can be read; None when there is none."""
    for path in _newest_first(folder):
        try:
            with torch.serialization.safe_globals([Checkpoint, ProgressState, Validation]):
                checkpoint: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
            continue  # a power failure may break a file; the one before it is as good
        return checkpoint
    return None


def keep_adapter(folder: Path, step: int, unet: UNet2DConditionModel, provenance: Provenance) -> None:
    """Keep the adapter of a validation beside the checkpoints, until `publish_kept_adapters`."""
    save_adapter(unet, folder / "adapters" / f"step-{step:06}", provenance)


def publish_kept_adapters(folder: Path, out: Path) -> None:
    """Write the kept adapters to `out/step-...`, in place of any that are there."""
    shutil.rmtree(out, ignore_errors=True)
    for file in (folder / "adapters").glob(f"*/{FILE_NAME}"):  # leaves out what a kill left half-written
        write_atomically(out / file.parent.name / FILE_NAME, file.read_bytes())


class StopRequest:
    """Whether the process has been asked to stop."""

    requested = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Inside, SIGTERM only sets the request, so that the work can stop at a point where it can be resumed."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield stop
        return

    def request(_number: int, _frame: FrameType | None) -> None:
        stop.requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
