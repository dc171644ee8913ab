"""One image file of any common format as 8-bit sRGB."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from bestiary.image_files import UnreadableImageError, damage, open_image, read_image

EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # a JPEG with more pictures after the first, as phones save them
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
_SEVERAL_PICTURES = ("MPO", "HEIF")  # one photograph and its companions (depth, a burst), not an animation
_SRGB_NAMES = ("srgb", "c2", "urgb")  # c2 and uRGB are the tiny sRGB profiles that social networks embed
_ORIENTATION = 0x0112  # the EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # orientations that exchange width and height
_ROWS = 64
_MAX_FULL_SIZE_PIXELS = 64_000_000  # larger images are used at half their width and height


@dataclass(frozen=True)
class Decoded:
    """An RGB image, the real format of its file, and the changes that made it plain RGB."""

    image: Image.Image
    format: str
    changes: tuple[str, ...]
    size: tuple[int, int]  # width and height in the file, upright: more than the image's if that was decoded smaller


def open_rgb(path: Path) -> Image.Image:
    """Return the image at `path` as upright 8-bit sRGB on white.

    Raises UnreadableImageError when the file is not a complete image of a supported format.
    """
    return decode(path).image


def decode(path: Path, content: bytes | None = None, at_least: int | None = None) -> Decoded:
    """Return the image at `path` as upright 8-bit sRGB on white, with its format and the changes it needed.

    `content` is the file's content if the caller has already read it. If `at_least` pixels per side are enough, a
    larger JPEG is decoded at a fraction of its size, which is faster. An image of more than 64 megapixels always comes
    at half size. Raises UnreadableImageError when the file is not a complete image of a supported format, BestiaryError
    when it does not exist.
    """
    content = read_image(path) if content is None else content
    image = open_image(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata; only the pixels matter here
            return _decode(image, at_least)
    # A damaged file can make a decoder raise anything (struct.error, IndexError, zlib.error, MemoryError, ...).
    except Exception as error:
        raise UnreadableImageError(path, damage(error, content)) from None


def right_extension(name: str, file_format: str) -> str:
    """Return `name` with an extension that fits `file_format`, unchanged if it already has one.

    >>> right_extension("cat.jpg", "PNG"), right_extension("cat.JPEG", "JPEG"), right_extension("v1.5", "JPEG")
    ('cat.png', 'cat.JPEG', 'v1.5.jpg')
    """
    allowed = EXTENSIONS[file_format]
    suffix = Path(name).suffix
    if suffix.lower() in allowed:
        return name
    # Only a known extension is replaced: in "v1.5" the dot is part of the name.
    known = {extension for extensions in EXTENSIONS.values() for extension in extensions}
    return (name[: -len(suffix)] if suffix.lower() in known else name) + allowed[0]


def _decode(opened: Image.Image, at_least: int | None) -> Decoded:
    image = opened
    size = opened.size
    file_format = str(image.format)
    animated = file_format not in _SEVERAL_PICTURES and bool(getattr(image, "is_animated", False))
    profile = image.info.get("icc_profile")
    # Pillow opens 16-bit colours as 8-bit ones. Only the tiles' raw mode still shows the difference, and only until
    # the image is loaded.
    tiles = getattr(opened, "tile", [])
    deep = any(";16" in str(tile.args) for tile in tiles) and not image.mode.startswith(("I", "F"))
    if isinstance(opened, JpegImageFile):
        if at_least and min(size) >= 2 * at_least:
            opened.draft(None, (at_least, at_least))
        elif size[0] * size[1] > _MAX_FULL_SIZE_PIXELS:
            opened.draft(None, (size[0] // 2, size[1] // 2))
    opened.load()
    if image.width * image.height > _MAX_FULL_SIZE_PIXELS and image.mode in ("RGB", "L", "CMYK"):
        image = image.reduce(2)
        image.getexif()[_ORIENTATION] = opened.getexif().get(_ORIENTATION, 1)
    changes = ["animated"] * animated + ["16-bit"] * deep
    orientation = opened.getexif().get(_ORIENTATION, 1)
    if orientation not in (0, 1):
        image = ImageOps.exif_transpose(image)
        size = size[::-1] if orientation in _SIDEWAYS else size
        changes.append("orientation")
    image, colour_changes = _to_rgb(image, profile)
    return Decoded(image, file_format, (*changes, *colour_changes), size)


def _to_rgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Return the image as sRGB, and the changes that took."""
    if image.mode == "RGB" and "transparency" not in image.info:
        converted = _to_srgb(image, profile)
        return (image, ()) if converted is None else (converted, ("colour profile",))
    if image.mode == "CMYK":
        return _to_srgb(image, profile) or image.convert("RGB"), ("CMYK",)
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image), ("16-bit",)
    kind = {"L": "greyscale", "1": "greyscale", "P": "palette"}.get(image.mode, image.mode)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image, kind = Image.new("RGB", image.size, "white"), "alpha"
        image.paste(rgba, mask=rgba.getchannel("A"))
    converted = _to_srgb(image, profile)
    return image.convert("RGB") if converted is None else converted, (kind,)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Convert 16- and 32-bit grey to 8 bits per channel.

    White is the mode's full scale (65535 for integers, 1.0 for floats), or the largest value if that is larger.
    """

    def rows(top: int) -> NDArray[np.float64]:  # few at a time: 64-bit numbers take four to eight times the memory
        part = image.crop((0, top, image.width, min(top + _ROWS, image.height)))
        return np.nan_to_num(np.asarray(part, dtype=np.float64), posinf=0.0, neginf=0.0).clip(0.0)

    tops = range(0, image.height, _ROWS)
    full_scale = 65535.0 if image.mode.startswith("I") else 1.0
    white = max(full_scale, *(float(rows(top).max()) for top in tops))
    levels = np.empty((image.height, image.width), np.uint8)
    for top in tops:
        levels[top : top + _ROWS] = (rows(top) / white * 255.0).round()
    return Image.fromarray(levels).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """Convert `image` from its colour profile to sRGB; None if it is sRGB already or the profile is unusable."""
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
