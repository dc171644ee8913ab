"""Runs that could not be written to MLflow: kept in `mlruns/unsent`, and sent by the recorder of the next run.

A kept run holds no address, because addresses may contain passwords, and its paths are relative to its own folder, so
that it can be sent after the project was moved. Only its owner can read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from bestiary.errors import BestiaryError
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

MESSAGES = "messages.jsonl"


def folder(root: Path) -> Path:
    """Where a project's unsent runs are kept."""
    return root / "mlruns" / "unsent"


def keep(opening: Opening, messages: Iterable[Message]) -> Path:
    """Store a run's messages and copies of its artifacts. Returns their folder.

    Without space for the copies, the messages are kept alone and refer to the artifacts where they are; without space
    for the messages, they go to the system's temporary folder. Raises BestiaryError when that fails, too.
    """
    opening, messages = with_input_hashes(opening), list(messages)
    unsent, elsewhere = folder(Path(opening.root)), Path(gettempdir()) / "bestiary-unsent"
    problem = ""
    for place, with_copies in ((unsent, True), (unsent, False), (elsewhere, False)):
        try:
            return _write(place, opening, messages, with_copies=with_copies)
        except OSError as error:
            problem = str(error.strerror)
    raise BestiaryError(f"Neither {unsent} nor {elsewhere} can be written ({problem}), so the run's record is lost.")


def _write(unsent: Path, opening: Opening, messages: Iterable[Message], *, with_copies: bool) -> Path:
    kept = unsent / uuid.uuid4().hex
    temporary = kept.with_name(f".{kept.name}")
    try:
        temporary.mkdir(parents=True, mode=0o700)
        with open(temporary / MESSAGES, "w", encoding="utf-8", opener=_private) as file:
            file.write(encode(replace(opening, uri="", root="")))
            for number, message in enumerate(messages, start=1):
                if with_copies and isinstance(message, (Artifact, Image)):
                    message = replace(message, path=_copy(Path(message.path), temporary, number))
                file.write(encode(message))
            file.flush()
            os.fsync(file.fileno())
        return temporary.rename(kept)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            unsent.rmdir()  # unless it holds other runs
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _copy(source: Path, folder: Path, number: int) -> str:
    """Copy an artifact into `folder`, for its owner alone. Returns its path in there; `source` if it is gone."""
    if not source.exists():
        return str(source)
    copy = folder / str(number) / source.name
    copy.parent.mkdir(mode=0o700)
    if source.is_dir():
        shutil.copytree(source, copy, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, copy)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return copy.relative_to(folder).as_posix()


def with_input_hashes(opening: Opening) -> Opening:
    """The opening with its existing inputs hashed: `inputs` is empty, and each path has a tag `input.<path>`."""
    hashes = {f"input.{path}": content_hash(Path(path)) for path in opening.inputs if Path(path).exists()}
    return replace(opening, inputs=[], tags=opening.tags | hashes)


def unsent(root: Path) -> list[Path]:
    """The folders of the project's unsent runs."""
    place = folder(root)
    return sorted(entry for entry in place.iterdir() if not entry.name.startswith(".")) if place.is_dir() else []


def send(folder: Path, write: Callable[[Opening, queue.Queue[Message | None]], None]) -> None:
    """Pass an unsent run to `write` and delete its folder afterwards. Does nothing when another process is sending it.

    The queue ends with None. The folder stays when `write` raises. The opening's address and root are empty, except in
    runs that an earlier version kept.
    """
    with (folder / MESSAGES).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if not folder.exists():
            return  # another process sent it between opening and locking
        opening = decode_opening(file.readline())
        messages: queue.Queue[Message | None] = queue.Queue()
        read_lines(file, lambda line: _located(decode_message(line), folder), messages)
        write(opening, messages)
        shutil.rmtree(folder)


def _located(message: Message, folder: Path) -> Message:
    """The message with the path of its artifact in `folder`, where earlier versions stored an absolute path."""
    if not isinstance(message, (Artifact, Image)):
        return message
    path = Path(message.path)
    if path.is_absolute() and folder.name in path.parts:  # the project may have been moved since
        path = Path(*path.parts[path.parts.index(folder.name) + 1 :])
    return replace(message, path=str(folder / path))
