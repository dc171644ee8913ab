"""Where the project is, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from bestiary.errors import FILE_ADVICE, BestiaryError, shown

ABANDONED_DAYS = 30
DONE = ".done"  # the ending of a folder's name while it is deleted


def project_root() -> Path:
    """The project's folder: DVC's root inside a stage, else the nearest folder above the working one with a dvc.yaml.

    Outside any project it is the working folder.
    """
    return find_project() or Path.cwd()


def find_project() -> Path | None:
    """The project's folder as `project_root` finds it; None outside any project."""
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), None)


def dvc_cache() -> list[Path]:
    """DVC's cache, which the files in data/ may be links to. Only asked for when there are links."""
    asked = subprocess.run(
        [sys.executable, "-m", "dvc", "cache", "dir"], cwd=project_root(), capture_output=True, text=True, check=False
    )
    return [Path(asked.stdout.strip())] if asked.returncode == 0 and asked.stdout.strip() else []


def no_project_error() -> BestiaryError:
    """The error for what only works in a project."""
    return BestiaryError(f"{Path.cwd()} is not in a project. Run this in the project's folder.")


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder. A name that no file system accepts is none."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # too long, not permitted, or with a null character
        return False


def is_file(path: str | Path) -> bool:
    """Whether there is such a file. A name that no file system accepts is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def check_writable(folder: Path) -> None:
    """Raise BestiaryError when files cannot be written to `folder`, which need not exist. Creates nothing.

    Call it before work that takes long.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.lstat()  # fails if a parent is a file, or if the name is too long
        existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise unwritable(folder, error) from None


def check_not_overwritten(file: Path, data: bytes) -> None:
    """Raise BestiaryError when writing `data` to `file` would overwrite anything but the same file."""
    if os.path.lexists(file) and not (is_file(file) and file.read_bytes() == data):
        raise BestiaryError(f"{file} exists and would be overwritten. Choose another name.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` (its folder is made) through a temporary file beside it.

    Raises BestiaryError when the disk is full or the folder cannot be written; `path` is then as it was before.
    """
    _write(path, data, Path.replace)


def write_new(path: Path, data: bytes) -> bool:
    """Write `data` as `write_atomically` does, unless `path` exists. Returns whether the file was written.

    Of several processes that write the same path at the same time, exactly one succeeds.
    """
    try:
        _write(path, data, _link)
    except FileExistsError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without hard links: reserve the name first.
        path.open("xb").close()
        temporary.replace(path)
    else:
        temporary.unlink()


def _write(path: Path, data: bytes, put_in_place: Callable[[Path, Path], object]) -> None:
    # Its own short name: several threads may write the same path, whose name may be as long as names can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        put_in_place(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may be no folder
            temporary.unlink(missing_ok=True)
        if isinstance(error, FileExistsError) and os.path.lexists(path):
            raise
        raise unwritable(path, error) from None


def discard(folder: Path) -> None:
    """Delete the folder of a finished run's unfinished work, and those beside it that no run has used for 30 days.

    A folder is renamed first, so that a run killed while deleting does not leave a part that the next one resumes.
    """
    oldest = time.time() - ABANDONED_DAYS * 24 * 60 * 60
    for other in folder.parent.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run may have deleted it meanwhile
            if other == folder or other.suffix == DONE or other.stat().st_mtime < oldest:
                done = other.with_name(f"{other.stem}-{uuid.uuid4().hex}{DONE}")
                shutil.rmtree(other.rename(done), ignore_errors=True)


def unwritable(path: Path, error: OSError) -> BestiaryError:
    """The error for a file or folder that the system refuses to write, with advice."""
    number = errno.ENOTDIR if isinstance(error, FileExistsError) else error.errno  # where a folder was to be created
    advice = FILE_ADVICE.get(number or 0, "Use another path.")
    return BestiaryError(f"{shown(str(path), 200)} cannot be written ({error.strerror or error}). {advice}")
