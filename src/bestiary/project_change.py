"""A change of a project's data and settings. Until it is made final, it is undone, even if this process is killed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from bestiary.errors import BestiaryError
from bestiary.files import write_atomically

DATA, DATA_DVC = "data", "data.dvc"
# Git and DVC ignore both. Data that was replaced stays in PUT_ASIDE until its owner deletes it.
WORK, PUT_ASIDE = Path(".cache/learn"), Path("put-aside")
LOCK_SECONDS = 3.0  # to wait for the pipeline of a command that was killed, which ends by itself
Hashes = dict[str, str]  # SHA-256 by path, relative to data/
BUSY_SECONDS = 15.0  # to wait for a DVC that was killed


class _Journal(BaseModel):
    """The state before a change, and the files that the change writes: by name, as base64; None: no such file."""

    before: dict[str, str | None]
    after: dict[str, str | None]
    index: str | None  # Git's index entry of data.dvc; "" when it has none, None without Git
    data: Hashes | None  # what the change puts into data/; None when data/ stays as it is
    had_data: bool


@contextlib.contextmanager
def only_one(root: Path) -> Iterator[int]:
    """Hold the lock that only one change of a project may have, and give its file descriptor.

    A child process that inherits the descriptor holds the lock too. Raises BestiaryError when it is taken.
    """
    path = root / ".cache" / "locks" / "learn"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _locked(file):
            if time.monotonic() > deadline:
                raise BestiaryError(
                    "`bestiary learn`, or the pipeline that it started, is still running in this project. Wait until "
                    "it has ended, or stop it."
                )
            time.sleep(0.1)
        yield file.fileno()


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def hashes(folder: Path) -> Hashes:
    """The SHA-256 of each file below `folder`, by its relative path; empty when there is no folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class ProjectChange:
    """Replaces data/ and some files at the project's root, and can undo that as long as it was not kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before = root / WORK / "before"
        self.journal = root / WORK / "journal.json"

    def start(self, files: Mapping[str, str], data: Path | None) -> None:
        """Write `files` (texts by name) and put the folder `data` in the place of data/, tracked by DVC.

        With `data` None, data/ stays as it is. Raises BestiaryError, with everything as it was, when DVC or the file
        system refuse.
        """
        names = [*files, DATA_DVC]
        shutil.rmtree(self.before, ignore_errors=True)  # copies only: data/ moves after the journal is written
        journal = _Journal(
            before={name: _packed(self.root / name) for name in names},
            after={name: base64.b64encode(text.encode()).decode() for name, text in files.items()},
            index=_index_entry(self.root),
            data=None if data is None else hashes(data),
            had_data=(self.root / DATA).exists(),
        )
        for name in names:
            if (self.root / name).is_file():
                write_atomically(self.before / name, (self.root / name).read_bytes())
        self.before.mkdir(parents=True, exist_ok=True)
        write_atomically(self.journal, journal.model_dump_json().encode())
        try:
            if data is not None:
                if journal.had_data:
                    (self.root / DATA).rename(self.before / DATA)
                data.rename(self.root / DATA)
                (self.root / DATA_DVC).unlink(missing_ok=True)
            for name, text in files.items():
                write_atomically(self.root / name, text.encode())
            if data is not None:
                _track_data(self.root)
        except BaseException as error:
            self.undo()
            if isinstance(error, OSError):
                raise BestiaryError(f"data/ cannot be changed: {error.strerror}. Nothing has changed.") from None
            raise

    def undo(self) -> str | None:
        """Put everything back as it was before an unfinished change; returns a note about what could not be, if any.

        Edits since then are not undone.
        """
        journal = self._read()
        if journal is None:
            return None
        note = None
        if journal.data is not None and ((self.before / DATA).exists() or not journal.had_data):
            current = hashes(self.root / DATA)
            if any(journal.data.get(path) != sha256 for path, sha256 in current.items()):
                note = f"data/ was edited meanwhile and stays as it is. {self._put_aside()}"
            else:
                undone = self.root / WORK / "undone"
                shutil.rmtree(undone, ignore_errors=True)
                if (self.root / DATA).exists():
                    (self.root / DATA).rename(undone)
                if journal.had_data:
                    (self.before / DATA).rename(self.root / DATA)
                shutil.rmtree(undone, ignore_errors=True)
        if note is None:
            if journal.data is not None:
                _restore(self.root / DATA_DVC, journal.before[DATA_DVC])
                _restore_index(self.root, journal.index)
            for name, written in journal.after.items():
                if _packed(self.root / name) == written:
                    _restore(self.root / name, journal.before[name])
        self.journal.unlink()
        shutil.rmtree(self.before, ignore_errors=True)
        return note

    def keep(self) -> str | None:
        """Make the change final. Returns a sentence that says where the data is that was replaced, if any."""
        journal = self._read()
        if journal is None:
            return None
        note = self._put_aside() if any(path.is_file() for path in (self.before / DATA).rglob("*")) else None
        self.journal.unlink()
        shutil.rmtree(self.before, ignore_errors=True)
        return note

    def _put_aside(self) -> str:
        aside = self.root / PUT_ASIDE / datetime.now().strftime("%Y-%m-%dT%H-%M-%S-%f")
        aside.parent.mkdir(exist_ok=True)
        self.before.rename(aside)
        place = aside.relative_to(self.root)
        return (
            f"The data that was there before is in {place}/data, with its data.dvc, subjects.yaml and params.yaml "
            "beside it. Copy all four back to use it again."
        )

    def _read(self) -> _Journal | None:
        """The journal of a change that was neither kept nor undone."""
        try:
            journal = _Journal.model_validate_json(self.journal.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        if not self.before.exists():  # killed while it was being kept
            self.journal.unlink()
            return None
        return journal


def _track_data(root: Path) -> None:
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "add", DATA], cwd=root, capture_output=True, text=True, check=False
        )
        if not done.returncode:
            return
        # A DVC that was killed a moment ago blocks data/ until the system has forgotten its process.
        if "is busy" not in done.stderr or time.monotonic() > deadline:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["no reason given"]
            raise BestiaryError(f"DVC cannot track data/: {lines[0].removeprefix('ERROR: ').rstrip('.')}.")


def _packed(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _restore(path: Path, packed: str | None) -> None:
    if packed is None:
        path.unlink(missing_ok=True)
    elif _packed(path) != packed:
        write_atomically(path, base64.b64decode(packed))


def _index_entry(root: Path) -> str | None:
    """The entry of data.dvc in Git's index, as `mode,object`: DVC stages the file when it tracks data/."""
    done = _git(root, "ls-files", "--stage", "--", DATA_DVC)
    if done is None:
        return None
    words = done.split()
    return f"{words[0]},{words[1]}" if words else ""


def _restore_index(root: Path, entry: str | None) -> None:
    if entry:
        _git(root, "update-index", "--add", "--cacheinfo", f"{entry},{_prefix(root)}{DATA_DVC}")
    elif entry == "":
        _git(root, "update-index", "--force-remove", DATA_DVC)


def _prefix(root: Path) -> str:
    """The project's path in its Git repository: "" at the root, else with a slash at its end."""
    return (_git(root, "rev-parse", "--show-prefix") or "").strip()


def _git(root: Path, *arguments: str) -> str | None:
    """What Git prints; None when the project is not in a Git repository, or Git is not installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
