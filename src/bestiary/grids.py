"""Grids: one picture of many, drawn with every combination of some values, with labelled axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bestiary.errors import BestiaryError, shown
from bestiary.png_metadata import PictureSettings, StartImage, adjusted, as_a1111
from bestiary.samplers import MAX_ADAPTER_WEIGHT, MAX_GUIDANCE_SCALE, MAX_STEPS, SAMPLERS

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CELLS = 400
MAX_PIXELS = 2**28  # of a whole grid: 800 MB in memory
MIN_CELL = 128  # pixels a side, for the labels; smaller pictures are enlarged by whole factors
AXES = ("weight", "weight2", "seed", "steps", "guidance", "scheduler", "denoise")
Value = str | int | float
Change = Callable[[PictureSettings], PictureSettings]


@dataclass(frozen=True)
class Axis:
    """What changes along one side of a grid, and its values."""

    name: str
    values: tuple[Value, ...]

    @staticmethod
    def parse(text: str) -> Axis:
        """Read NAME=VALUE,VALUE,...

        >>> Axis.parse("weight=0.4, 0.7,1.0")
        Axis(name='weight', values=(0.4, 0.7, 1.0))

        Raises BestiaryError for an unknown name, and for a value that is none or out of range.
        """
        name, equals, values = (part.strip() for part in text.partition("="))
        if name not in AXES or not equals:
            raise BestiaryError(
                f"{shown(text)} is no axis of a grid. Write one of {', '.join(AXES)} with its values, for example "
                "weight=0.4,0.7,1.0"
            )
        return Axis(name, tuple(_parse(name, value.strip()) for value in values.split(",")))

    @property
    def is_weight(self) -> bool:
        """Whether it changes the weight of an adapter."""
        return self.name in ("weight", "weight2")

    @property
    def labels(self) -> list[str]:
        """The labels beside the rows or above the columns."""
        return [
            f"{self.name} {value:g}" if isinstance(value, float) else f"{self.name} {value}" for value in self.values
        ]

    def applied(self, settings: PictureSettings, value: Value) -> PictureSettings:
        """The settings with this value. Raises BestiaryError when they have nothing that it could change."""
        sampling = settings.sampling
        if isinstance(value, str):
            return replace(settings, sampling=replace(sampling, sampler=value))
        if self.name == "seed":
            return replace(settings, seed=int(value))
        if self.name == "steps":
            return replace(settings, sampling=replace(sampling, steps=int(value)))
        if self.name == "guidance":
            return replace(settings, sampling=replace(sampling, guidance_scale=value))
        if self.name == "denoise":
            if settings.start is None:
                raise BestiaryError(
                    "--grid denoise has no effect without an image to start from. Name one with --image."
                )
            return replace(settings, start=StartImage(settings.start.image_sha256, value))
        number = 1 if self.name == "weight" else 2
        if len(settings.adapters) < number:
            raise BestiaryError(
                f"--grid {self.name} needs {number} adapter{'s' * (number > 1)}. "
                f"Name {'both' if number > 1 else 'one'} with --adapter."
            )
        if number == 1:
            return replace(settings, sampling=replace(sampling, adapter_weight=value))
        second, *others = settings.more_adapters
        return replace(settings, more_adapters=(replace(second, weight=value), *others))


def _parse(name: str, text: str) -> Value:
    if name == "scheduler":
        if text not in SAMPLERS:
            raise BestiaryError(f"There is no sampler {shown(text)!r}. Choose from {', '.join(SAMPLERS)}.")
        return text
    kind: Callable[[str], int | float] = int if name in ("seed", "steps") else float
    low, high = {
        "seed": (0, 2**63 - 1),
        "steps": (1, MAX_STEPS),
        "guidance": (1, MAX_GUIDANCE_SCALE),
        "denoise": (0.0, 1),
    }.get(name, (0, MAX_ADAPTER_WEIGHT))
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (name == "denoise" and value == 0):
        raise BestiaryError(f"--grid {name}: {shown(text)!r} is not a number from {low} to {high}.")
    return value


@dataclass(frozen=True)
class Grid:
    """The axes of a grid: its columns, and its rows if it has several."""

    axes: tuple[Axis, ...]

    @staticmethod
    def parse(texts: Sequence[str]) -> Grid | None:
        """Read at most two axes; None for none. A text may hold both: "weight=0.4,1 seed=1,2".

        Raises BestiaryError when the text is no grid.
        """
        texts = [axis for text in texts for axis in re.split(r"\s+(?=\w+\s*=)", text.strip())]
        if len(texts) > 2:
            raise BestiaryError(f"A grid has two axes, not {len(texts)}. Leave some out.")
        axes = tuple(Axis.parse(text) for text in texts)
        if len({axis.name for axis in axes}) < len(axes):
            raise BestiaryError(f"--grid {axes[0].name} is given twice. Give all its values at once.")
        if math.prod(len(axis.values) for axis in axes) > MAX_CELLS:
            raise BestiaryError(f"A grid may have at most {MAX_CELLS} pictures. Choose fewer values.")
        return Grid(axes) if axes else None

    def cells(self, settings: PictureSettings, reweighted: Change = lambda each: each) -> list[list[PictureSettings]]:
        """The settings of each picture, by row and column.

        `reweighted` changes what follows from the weights of a cell, such as its steps, before the other axes apply.
        Raises BestiaryError when the whole would be too large.
        """
        columns, *rows = self.axes
        downwards = [(value,) for value in rows[0].values] if rows else [()]
        cells = [[self._cell(settings, (across, *down), reweighted) for across in columns.values] for down in downwards]
        width, height = settings.sampling.width or 0, settings.sampling.height or 0
        if max(width, height, MIN_CELL) ** 2 * len(cells) * len(columns.values) > MAX_PIXELS:
            raise BestiaryError("The grid would be larger than 268 megapixels. Choose fewer values or a smaller size.")
        return cells

    def _cell(self, settings: PictureSettings, values: Sequence[Value], reweighted: Change) -> PictureSettings:
        """The settings with one value of each axis."""
        chosen = list(zip(self.axes, values, strict=True))
        for axis, value in chosen:
            settings = axis.applied(settings, value) if axis.is_weight else settings
        settings = reweighted(settings)
        for axis, value in chosen:
            settings = settings if axis.is_weight else axis.applied(settings, value)
        return settings

    def sheet(self, rows: Sequence[Sequence[Image]], settings: PictureSettings) -> Image:
        """The pictures in their colours on one sheet, with the labels of the axes."""
        from bestiary.data.contact_sheets import contact_sheet

        coloured = [[adjusted(image, settings.colours) for image in row] for row in rows]
        cell = max(MIN_CELL, *rows[0][0].size)
        across, *down = [axis.labels for axis in self.axes]
        return contact_sheet(coloured, down[0] if down else (), across, cell=cell)

    def png(self, sheet: Image, settings: PictureSettings) -> bytes:
        """The sheet as a PNG with the first picture's settings and the axes in A1111's text form."""
        from io import BytesIO

        from PIL.PngImagePlugin import PngInfo

        axes = zip(("columns", "rows"), self.axes, strict=False)
        named = [f'Grid {side}: "{axis.name}={",".join(map(str, axis.values))}"' for side, axis in axes]
        metadata = PngInfo()
        metadata.add_text("parameters", ", ".join([as_a1111(settings), *named]))
        buffer = BytesIO()
        sheet.save(buffer, "PNG", pnginfo=metadata)
        return buffer.getvalue()
