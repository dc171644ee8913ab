"""CSV tables: read with the types that were meant, and written so that a spreadsheet takes no text for a formula."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def read_table(path: Path, numbers: Mapping[str, type[int | float]] | None = None) -> pd.DataFrame:
    """Read a CSV table of text, but for the columns in `numbers`, which are of those types.

    Nothing is guessed: a class named 001, NA or null keeps its name. Raises OSError and ValueError as pandas does.
    """
    types: defaultdict[Any, Any] = defaultdict(lambda: str, numbers or {})  # pandas' types for dtype are as loose
    return pd.read_csv(path, dtype=types, keep_default_na=False)


def spreadsheet_text(text: str) -> str:
    """Return `text` with an apostrophe in front if a spreadsheet would compute it, as OWASP advises.

    >>> spreadsheet_text("=1+1"), spreadsheet_text("owl")
    ("'=1+1", 'owl')
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def typed_text(cell: str) -> str:
    """Return what `spreadsheet_text` was given.

    >>> typed_text("'=1+1"), typed_text("'owl'")
    ('=1+1', "'owl'")
    """
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def for_spreadsheet(table: pd.DataFrame) -> pd.DataFrame:
    """Return `table` with `spreadsheet_text` in the place of every text; numbers stay."""
    return table.map(lambda cell: spreadsheet_text(cell) if isinstance(cell, str) else cell)
