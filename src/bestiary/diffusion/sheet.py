"""The sheet of a training: pictures of the same prompts and seeds at each validation, the base's in the first row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from bestiary.data.contact_sheets import contact_sheet
from bestiary.files import write_atomically


class Sheet:
    """The rows of a sheet, kept in a folder, so that a training that was killed and goes on has them all."""

    def __init__(self, kept: Path, columns: Sequence[str]) -> None:
        """`kept` is for this training and these prompts alone; `columns` are what each picture of a row shows."""
        self.kept = kept
        self.columns = columns

    def add(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Keep the row of a step. Raises BestiaryError when the disk is full."""
        for column, picture in enumerate(pictures):
            write_atomically(self.kept / f"{step:08}" / f"{column:04}.png", _png(picture))

    def save(self, path: Path) -> dict[int, Path]:
        """Write the whole sheet to `path` and each row by itself below `steps/` beside it; returns the rows by step.

        A row that a kill has left unfinished is left out: it is drawn again when the training goes on.
        """
        rows: dict[int, list[Image.Image]] = {}
        for file in sorted(self.kept.glob("*/*.png")):
            with Image.open(file) as picture:
                rows.setdefault(int(file.parent.name), []).append(picture.convert("RGB"))
        rows = {step: row for step, row in rows.items() if len(row) == len(self.columns)}
        labels = {step: f"step {step}" if step else "base" for step in rows}
        write_atomically(path, _png(contact_sheet(list(rows.values()), list(labels.values()), self.columns)))
        alone = {step: path.parent / "steps" / f"{step}.png" for step in rows}
        for step, row in rows.items():
            write_atomically(alone[step], _png(contact_sheet([row], [labels[step]], self.columns)))
        return alone


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
