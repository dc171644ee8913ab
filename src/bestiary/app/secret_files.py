"""Secrets from a private file or from the environment, never from the command line, which every process list shows."""

from __future__ import annotations

import os
from pathlib import Path

from bestiary.errors import BestiaryError


def read_secret(file: Path | None, variable: str, content: str) -> tuple[str, str]:
    """The name of a secret's source, and the secret: from `file`, or else from the environment; empty if not set.

    `content` says in an error what the file holds. Raises BestiaryError when the file cannot be read, or when other
    users can read it too.
    """
    if file is None:
        return variable, os.environ.get(variable, "")
    try:
        text = file.read_text(encoding="utf-8").strip()
        if os.name == "posix" and file.stat().st_mode & 0o077:
            raise BestiaryError(f"Other users can read {file}. Run `chmod 600 {file}`, then try again.")
    except (OSError, UnicodeDecodeError):
        raise BestiaryError(f"{file} cannot be read. Name a UTF-8 text file that holds {content}.") from None
    return str(file), text
