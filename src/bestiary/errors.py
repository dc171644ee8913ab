"""The one error that a user can cause, and how text and values from files are shown."""

from __future__ import annotations

import errno
import re
import reprlib

# Control characters can move a terminal's cursor or change its title; the others reorder or break a line.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxlong, _repr.maxother = 2, 80, 80, 80


def printable(text: str) -> str:
    """The text with control characters, and those that reorder a line, as escapes: safe to write to a terminal.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def shown(text: str, longest: int = 80) -> str:
    """The text as an error shows it: printable, and not longer than part of a line.

    >>> shown("a" * 100, 5)
    'aaaaa…'
    """
    return printable(text if len(text) <= longest else f"{text[:longest]}…")


def short(value: object) -> str:
    """A value as Python writes it, cut to less than a line, for an error message.

    >>> short("four"), len(short("x" * 1_000_000)), len(short([["x" * 1000] * 1000] * 1000))
    ("'four'", 80, 120)
    """
    text = _repr.repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


class BestiaryError(Exception):
    """An error that the user can correct. Its text is one plain sentence, shown without a traceback."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))  # it may quote a file that a stranger wrote


def file_sentence(error: OSError) -> str | None:
    """What a user can do about a full disk or missing permissions; None for every other error.

    >>> file_sentence(PermissionError(errno.EACCES, "Permission denied", "photos/1.jpg"))
    'photos/1.jpg cannot be read or written (Permission denied). Change its permissions.'
    """
    if error.errno == errno.ENOSPC:
        return printable(
            f"the disk is full, so {error.filename or 'a file'} cannot be written. Free space, then try again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return printable(f"{error.filename} cannot be read or written ({error.strerror}). Change its permissions.")
    return None
