"""The one error that a user can cause, and how it shows values."""

from __future__ import annotations

import reprlib


class BestiaryError(Exception):
    """Something that the user can put right: its text is one plain sentence, shown without a traceback."""


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxlong, _repr.maxother = 2, 80, 80, 80


def short(value: object) -> str:
    """A value as Python writes it, cut to less than a line, for an error message.

    >>> short("four"), len(short("x" * 1_000_000)), len(short([["x" * 1000] * 1000] * 1000))
    ("'four'", 80, 120)
    """
    text = _repr.repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
