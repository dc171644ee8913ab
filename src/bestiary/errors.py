"""The one error that a user can cause, and how text from files is shown."""

from __future__ import annotations

import re

# Control characters can move a terminal's cursor or change its title; the others reorder or break a line.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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


class BestiaryError(Exception):
    """Something that the user can put right: its text is one plain sentence, shown without a traceback."""

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(sentence))  # it may quote a file that a stranger wrote
