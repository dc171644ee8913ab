"""Contact sheets: many images on one white sheet, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 128,
) -> Image.Image:
    """Return a white sheet of images in rows, each fitted into `cell` x `cell` pixels, with labels left and above.

    Small images are enlarged by whole factors without interpolation, so that every pixel stays visible. A label that
    is wider than its place wraps.

    >>> contact_sheet([[Image.new("RGB", (64, 48))] * 3] * 2, cell=100).size
    (312, 209)
    """
    font = _font(max(12, cell // 9))
    columns = max((len(row) for row in rows), default=0)
    gap = max(2, cell // 32)
    wrapped_rows = [_wrap(label, font, int(cell * 1.5)) for label in row_labels]
    wrapped_columns = [_wrap(label, font, cell) for label in column_labels]
    left = max((_text_size(text, font)[0] for text in wrapped_rows), default=0) + (2 * gap if wrapped_rows else 0)
    top = max((_text_size(text, font)[1] for text in wrapped_columns), default=0) + (2 * gap if wrapped_columns else 0)
    step = cell + gap
    sheet = Image.new("RGB", (left + columns * step + gap, top + len(rows) * step + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for x, text in enumerate(wrapped_columns):
        centre = (left + gap + x * step + cell / 2, top - gap)
        draw.multiline_text(centre, text, fill="black", font=font, anchor="md", align="center")
    for y, row in enumerate(rows):
        if y < len(wrapped_rows):
            middle = (left - gap, top + gap + y * step + cell / 2)
            draw.multiline_text(middle, wrapped_rows[y], fill="black", font=font, anchor="rm", align="right")
        for x, image in enumerate(row):
            fitted = _fit(image, cell)
            corner = (
                left + gap + x * step + (cell - fitted.width) // 2,
                top + gap + y * step + (cell - fitted.height) // 2,
            )
            sheet.paste(fitted, corner)
    return sheet


def with_title(sheet: Image.Image, title: str) -> Image.Image:
    """Return the sheet below a line of text.

    >>> with_title(Image.new("RGB", (60, 40)), "blank: 48 of 512").height > 40
    True
    """
    font = _font(20)
    width, height = _text_size(title, font)
    titled = Image.new("RGB", (max(sheet.width, width + 8), sheet.height + height + 4), "white")
    titled.paste(sheet, (0, height + 4))
    ImageDraw.Draw(titled).text((4, 0), title, fill="black", font=font)
    return titled


def _fit(image: Image.Image, cell: int) -> Image.Image:
    image = image.convert("RGB")
    factor = cell // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(image, (cell, cell), Image.Resampling.LANCZOS)


@lru_cache(maxsize=8)
def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _text_size(text: str, font: _Font) -> tuple[int, int]:
    """Width and height of `text` in pixels."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(box[2] - box[0]) + 1, int(box[3]) + 1


def _wrap(text: str, font: _Font, width: int) -> str:
    """Break `text` into lines of at most `width` pixels: between words, and within a word that is wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and _text_size(f"{lines[-1]} {word}", font)[0] <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and _text_size(lines[-1] + character, font)[0] > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)
