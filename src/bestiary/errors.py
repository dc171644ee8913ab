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


# What to do about a file that cannot be read or written, by the system's error. Other errors are probably bugs.
FILE_ADVICE = {
    errno.ENOSPC: "Free space on its disk, then try again.",
    errno.EDQUOT: "Delete other files of yours on its disk, then try again.",
    errno.EROFS: "Use a folder on a writable disk.",
    errno.EACCES: "Change its permissions.",
    errno.EPERM: "Change its permissions.",
    errno.ENOTDIR: "Part of this path is a file, not a folder. Use another path.",
    errno.EISDIR: "It is a folder. Name a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Raise the limit on open files with `ulimit -n 4096`, then try again.",
    errno.ENFILE: "Close other programs, then try again.",
    errno.EIO: "Check its disk, or the connection to it.",
}
NAMELESS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # about a file even if the error names none


def file_sentence(error: OSError) -> str | None:
    """What a user can do about a file that cannot be read or written; None if the error is probably a bug.

    >>> file_sentence(PermissionError(errno.EACCES, "Permission denied", "photos/1.jpg"))
    'photos/1.jpg cannot be read or written (Permission denied). Change its permissions.'
    """
    advice = FILE_ADVICE.get(error.errno or 0)
    if advice is None or not (error.filename or error.errno in NAMELESS):
        return None
    name = shown(str(error.filename or "A file"), 200)
    return printable(f"{name} cannot be read or written ({error.strerror}). {advice}")


def system_sentence(error: Exception) -> str | None:
    """What a user can do about a file or about full memory; None if the error is probably a bug.

    >>> system_sentence(RuntimeError("CUDA error: out of memory"))
    "The GPU's memory is full. Close other programs that use the GPU, then try again."
    """
    if isinstance(error, OSError):
        return file_sentence(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
        return "This machine's memory is full. Close other programs, then try again."
    if isinstance(error, RuntimeError) and "out of memory" in str(error):  # torch's own type needs torch
        return "The GPU's memory is full. Close other programs that use the GPU, then try again."
    return None
