"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from bestiary.errors import BestiaryError


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
