"""The sheet of a training run: the same prompts and seeds at each validation, the base's pictures in the first row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from bestiary.data.contact_sheets import contact_sheet
from bestiary.files import write_atomically


class Sheet:
    """The rows of a sheet. They are kept in a folder, so a run that was killed and resumed has all of them."""

    def __init__(self, folder: Path, columns: Sequence[str], first: str = "base") -> None:
        """`folder` holds the rows of this run with these prompts only.

        `columns` are the names of the pictures in a row, and `first` labels the row of step 0.
        """
        self.folder = folder
        self.columns = columns
        self.first = first

    def add(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Keep the row of a step. Raises BestiaryError when the disk is full."""
        for column, picture in enumerate(pictures):
            write_atomically(self.folder / f"{step:08}" / f"{column:04}.png", _png(picture))

    def save(self, path: Path) -> dict[int, Path]:
        """Write the whole sheet to `path` and each row to a file in `steps/` beside it; returns these files by step.

        A row that is incomplete, because the run was killed while it was drawn, is left out: the resumed run draws it
        again.
        """
        rows: dict[int, list[Image.Image]] = {}
        for file in sorted(self.folder.glob("*/*.png")):
            with Image.open(file, formats=("PNG",)) as picture:
                rows.setdefault(int(file.parent.name), []).append(picture.convert("RGB"))
        rows = {step: row for step, row in rows.items() if len(row) == len(self.columns)}
        labels = {step: f"step {step}" if step else self.first for step in rows}
        write_atomically(path, _png(contact_sheet(list(rows.values()), list(labels.values()), self.columns)))
        files = {step: path.parent / "steps" / f"{step}.png" for step in rows}
        for step, row in rows.items():
            write_atomically(files[step], _png(contact_sheet([row], [labels[step]], self.columns)))
        return files


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
