"""Rolling checkpoints of a training, each whole or not there, and the wish to stop."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bestiary.files import write_atomically

KEEP = 2
PACKAGE = Path(__file__).parents[1]


def checkpoint_key(content: Mapping[str, Any]) -> str:
    """A name for one training's checkpoints: it changes with the `content` that decides the result, and the code.

    That is the whole package: a list of what decides is soon out of date, and who edits code trains anew anyway.
    """
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for module in sorted(PACKAGE.rglob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state after `step` steps and drop all but the newest. Raises BestiaryError when the disk is full."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(folder / f"step-{step:08}.pt", buffer.getvalue())
    for old in _newest_first(folder)[KEEP:]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state in `folder` that can be read; None when there is none."""
    for path in _newest_first(folder):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
            continue  # a disk that lost power may leave one broken: the one before it is as good
        return state
    return None


class StopRequest:
    """Whether the process has been asked to end."""

    made = False


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Inside, SIGTERM only makes the request, so that the work can end where it is whole."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield request
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        request.made = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
