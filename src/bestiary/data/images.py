"""One image: opened whatever it is, brought to RGB; and many of them on a labelled sheet."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from bestiary.errors import BestiaryError

MAX_PIXELS = 100_000_000  # more than any camera makes; a small file that claims more is a decompression bomb
EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # a JPEG with further pictures behind the first, as phones make them
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
# Pillow also opens formats that call other programs (EPS) or that no photograph comes in: left out.
_FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")
_SRGB_NAMES = ("srgb", "c2", "urgb")  # c2 and uRGB: the tiny sRGB profiles that social networks put in


class UnreadableImageError(BestiaryError):
    """The file holds no image that can be used; `reason` says why in a few words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}.")
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """An RGB image, the format its file really has, and what had to be done to it."""

    image: Image.Image
    format: str
    changes: tuple[str, ...]


def open_rgb(path: Path) -> Image.Image:
    """The image at `path` as upright 8-bit sRGB on white. Raises UnreadableImageError."""
    return decode(path).image


def decode(path: Path, content: bytes | None = None) -> Decoded:
    """The image at `path` (or in `content`, where the caller has read it) as upright 8-bit sRGB on white.

    Raises UnreadableImageError for whatever is no complete image of a supported format.
    """
    if content is None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise BestiaryError(f"{path} does not exist.") from None
    if not content:
        raise UnreadableImageError(path, "zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; only the pixels matter here
            return _decode(path, content)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(path, _describe(content)) from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(path, f"decompression bomb: more than {MAX_PIXELS:,} pixels") from None
    # Decoders raise whatever a damaged file drives them to (struct.error, IndexError, zlib.error, MemoryError, ...).
    except Exception as error:
        reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "damaged"
        raise UnreadableImageError(path, f"{reason} ({_describe(content)})") from None


def _decode(path: Path, content: bytes) -> Decoded:
    opened = Image.open(io.BytesIO(content), formats=_FORMATS)
    image: Image.Image = opened
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(path, f"decompression bomb: {image.width} x {image.height} pixels")
    file_format = str(image.format)
    animated = file_format != "MPO" and bool(getattr(image, "is_animated", False))
    profile = image.info.get("icc_profile")
    # Colours of 16 bits: Pillow opens them as 8 bits, and says so only here.
    deep = any(";16" in str(tile.args) for tile in opened.tile) and not image.mode.startswith(("I", "F"))
    opened.load()
    changes = ["animated"] * animated + ["16-bit"] * deep
    if image.getexif().get(0x0112, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
        changes.append("orientation")
    image, kinds = _to_rgb(image, profile)
    return Decoded(image, file_format, (*changes, *kinds))


def _to_rgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    if image.mode == "RGB" and "transparency" not in image.info:
        converted = _to_srgb(image, profile)
        return (image, ()) if converted is None else (converted, ("colour profile",))
    if image.mode == "CMYK":
        return _to_srgb(image, profile) or image.convert("RGB"), ("CMYK",)
    if image.mode.startswith(("I", "F")):
        return _from_deep(image), ("16-bit",)
    kind = {"L": "greyscale", "1": "greyscale", "P": "palette"}.get(image.mode, image.mode)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image, kind = Image.new("RGB", image.size, "white"), "alpha"
        image.paste(rgba, mask=rgba.getchannel("A"))
    converted = _to_srgb(image, profile)
    return image.convert("RGB") if converted is None else converted, (kind,)


def _from_deep(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey to 8-bit: by the depth where the file's is 16 bits, by the largest value where it is not."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0).clip(0.0)
    whole = 65535.0 if image.mode.startswith("I") else 1.0
    scaled = values / max(whole, float(values.max())) * 255.0
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """`image` taken from `profile` to sRGB; None where there is nothing to do or the profile is of no use."""
    transform = _transform(profile, image.mode) if profile else None
    return ImageCms.applyTransform(image, transform) if transform else None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).strip().casefold().startswith(_SRGB_NAMES):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _describe(content: bytes) -> str:
    """What a file is that is no image."""
    head = content[:512].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        return "HTML in disguise"
    if head.startswith((b"{", b"[")):
        return "JSON in disguise"
    if head.startswith((b"<?xml", b"<svg")):
        return "XML or SVG"
    if content.startswith(b"\xff\xd8"):
        return "JPEG"
    if content.startswith(b"\x89PNG"):
        return "PNG"
    printable = sum(32 <= byte < 127 or byte in b"\t\n\r" for byte in content[:512])
    return "text in disguise" if printable > 0.95 * len(content[:512]) else "unsupported format"


def right_extension(name: str, file_format: str) -> str:
    """`name` with an extension that says what the file is, unchanged where it already does."""
    allowed = EXTENSIONS[file_format]
    suffix = Path(name).suffix
    if suffix.lower() in allowed:
        return name
    # "a.b" may be a name without extension, "a.jpg" is one with the wrong one.
    known = {extension for extensions in EXTENSIONS.values() for extension in extensions}
    return (name[: -len(suffix)] if suffix.lower() in known else name) + allowed[0]


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 128,
) -> Image.Image:
    """A white sheet of images in rows, each fitted into `cell` x `cell` pixels, with labels left and above.

    Small images are enlarged by whole factors so that their pixels stay what they are. Lines of a label that is too
    long for its place are broken.
    """
    font = _font(max(12, cell // 9))
    columns = max((len(row) for row in rows), default=0)
    gap = max(2, cell // 32)
    broken_rows = [_break(label, font, int(cell * 1.5)) for label in row_labels]
    broken_columns = [_break(label, font, cell) for label in column_labels]
    left = max((_extent(text, font)[0] for text in broken_rows), default=0) + (2 * gap if broken_rows else 0)
    top = max((_extent(text, font)[1] for text in broken_columns), default=0) + (2 * gap if broken_columns else 0)
    step = cell + gap
    sheet = Image.new("RGB", (left + columns * step + gap, top + len(rows) * step + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, text in enumerate(broken_columns):
        centre = (left + gap + index * step + cell / 2, top - gap)
        draw.multiline_text(centre, text, fill="black", font=font, anchor="md", align="center")
    for y, row in enumerate(rows):
        if y < len(broken_rows):
            middle = (left - gap, top + gap + y * step + cell / 2)
            draw.multiline_text(middle, broken_rows[y], fill="black", font=font, anchor="rm", align="right")
        for x, image in enumerate(row):
            fitted = _fit(image, cell)
            corner = (
                left + gap + x * step + (cell - fitted.width) // 2,
                top + gap + y * step + (cell - fitted.height) // 2,
            )
            sheet.paste(fitted, corner)
    return sheet


def _fit(image: Image.Image, cell: int) -> Image.Image:
    image = image.convert("RGB")
    factor = cell // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return ImageOps.contain(image, (cell, cell), Image.Resampling.LANCZOS)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _extent(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(box[2] - box[0]) + 1, int(box[3]) + 1


def _break(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and _extent(f"{lines[-1]} {word}", font)[0] <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:  # a path may be longer than a line
            if lines[-1] and _extent(lines[-1] + character, font)[0] > width:
                lines.append("")
            lines[-1] += character
    return "\n".join(lines)
