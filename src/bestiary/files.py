"""Where the project is, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from bestiary.errors import BestiaryError


def project_root() -> Path:
    """The project's folder: DVC's root inside a stage, else the nearest folder above the working one with a dvc.yaml.

    Outside any project it is the working folder.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root).resolve()
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), here)


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


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` (its folder is made) through a temporary file beside it.

    Raises BestiaryError when the disk is full or the folder cannot be written; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # its folder may be no folder
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BestiaryError(f"There is no space left in {path.parent} to write {path.name}.") from None
        raise BestiaryError(f"{path} cannot be written: {error.strerror}.") from None
