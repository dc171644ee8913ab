"""The bearer token by which programs prove that they may draw (RFC 6750)."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

from bestiary.app.secret_files import read_secret
from bestiary.errors import BestiaryError

VARIABLE = "BESTIARY_TOKEN"
MIN_LENGTH = 16  # characters
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # characters that a header may contain


class Token:
    """A bearer token. Only its hash is in memory, so that neither a log nor a traceback can show it."""

    def __init__(self, text: str) -> None:
        self._hash = hashlib.sha256(text.encode()).digest()

    def matches(self, given: str) -> bool:
        """Whether this is the token, in a time that does not depend on how much of it is right."""
        return secrets.compare_digest(hashlib.sha256(given.encode()).digest(), self._hash)


def read_token(file: Path | None = None) -> Token | None:
    """The token from `file`, or else from the environment variable BESTIARY_TOKEN, if set.

    Raises BestiaryError when it is too short or holds other characters than a header can carry, and when other users
    can read the file.
    """
    source, text = read_secret(file, VARIABLE, "a token")
    if file is None and not text:
        return None
    if len(text) < MIN_LENGTH or not TOKEN.fullmatch(text):
        raise BestiaryError(
            f"The token in {source} needs at least {MIN_LENGTH} letters, digits or any of . _ ~ + / -. Make one with "
            "`openssl rand -hex 32`."
        )
    return Token(text)
