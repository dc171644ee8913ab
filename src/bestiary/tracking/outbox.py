"""Runs that could not be written to MLflow: kept in `mlruns/unsent`, and sent by the recorder of the next run."""

from __future__ import annotations

import fcntl
import queue
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from bestiary.tracking.content import content_hash
from bestiary.tracking.messages import (
    Artifact,
    Image,
    Message,
    Opening,
    decode_message,
    decode_opening,
    encode,
    read_lines,
)


def keep(opening: Opening, messages: Iterable[Message]) -> Path:
    """Store a run's messages and copies of its artifacts, complete or not at all. Returns their folder."""
    folder = Path(opening.root) / "mlruns" / "unsent" / uuid.uuid4().hex
    temporary = folder.with_name(f".{folder.name}")
    temporary.mkdir(parents=True)
    with (temporary / "messages.jsonl").open("w", encoding="utf-8") as file:
        file.write(encode(with_input_hashes(opening)))
        for number, message in enumerate(messages, start=1):
            if isinstance(message, (Artifact, Image)):
                source = Path(message.path)
                copy = temporary / str(number) / source.name
                copy.parent.mkdir()
                shutil.copytree(source, copy) if source.is_dir() else shutil.copy2(source, copy)
                message = replace(message, path=str(folder / str(number) / source.name))
            file.write(encode(message))
    return temporary.rename(folder)


def with_input_hashes(opening: Opening) -> Opening:
    """The opening with its existing inputs hashed: `inputs` is empty, and each path has a tag `input.<path>`."""
    hashes = {f"input.{path}": content_hash(Path(path)) for path in opening.inputs if Path(path).exists()}
    return replace(opening, inputs=[], tags=opening.tags | hashes)


def unsent(root: Path) -> list[Path]:
    """The folders of the project's unsent runs."""
    folder = root / "mlruns" / "unsent"
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []


def send(folder: Path, write: Callable[[Opening, queue.Queue[Message | None]], None]) -> None:
    """Pass an unsent run to `write` and delete its folder afterwards. Does nothing when another process is sending it.

    The queue ends with None. The folder stays when `write` raises.
    """
    with (folder / "messages.jsonl").open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        opening = decode_opening(file.readline())
        messages: queue.Queue[Message | None] = queue.Queue()
        read_lines(file, decode_message, messages)
        write(opening, messages)
        shutil.rmtree(folder)
