"""Opening one image file of any common format as 8-bit sRGB."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener

from bestiary.errors import BestiaryError

# Cleaning runs one process per core, and of a file's pictures only the first is used.
register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)

MAX_PIXELS = 100_000_000  # more than any camera takes; a small file that claims more is a decompression bomb
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
# Pillow also opens formats that run other programs (EPS) or that photographs do not use. They stay closed here.
_FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")
_SEVERAL_PICTURES = ("MPO", "HEIF")  # one photograph and its companions (depth, a burst), not an animation
_SRGB_NAMES = ("srgb", "c2", "urgb")  # c2 and uRGB are the tiny sRGB profiles that social networks embed
_ORIENTATION = 0x0112  # the EXIF tag


class UnreadableImageError(BestiaryError):
    """The file holds no usable image; `reason` says why in a few words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}. Replace or remove the file.")
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """An RGB image, the real format of its file, and the changes that made it plain RGB."""

    image: Image.Image
    format: str
    changes: tuple[str, ...]


def open_rgb(path: Path) -> Image.Image:
    """Return the image at `path` as upright 8-bit sRGB on white.

    Raises UnreadableImageError when the file is not a complete image of a supported format.
    """
    return decode(path).image


def decode(path: Path, content: bytes | None = None) -> Decoded:
    """Return the image at `path` as upright 8-bit sRGB on white, with its format and the changes it needed.

    `content` is the file's content if the caller has already read it. Raises UnreadableImageError when the file is not
    a complete image of a supported format, BestiaryError when it does not exist.
    """
    if content is None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise BestiaryError(f"The image {path} does not exist. Check the path.") from None
    if not content:
        raise UnreadableImageError(path, "zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata; only the pixels matter here
            return _decode(path, content)
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:
        raise UnreadableImageError(path, _describe(content)) from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(path, f"decompression bomb: more than {MAX_PIXELS:,} pixels") from None
    # A damaged file can make a decoder raise anything (struct.error, IndexError, zlib.error, MemoryError, ...).
    except Exception as error:
        reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "damaged"
        raise UnreadableImageError(path, f"{reason} ({_describe(content)})") from None


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


def _decode(path: Path, content: bytes) -> Decoded:
    opened = Image.open(io.BytesIO(content), formats=_FORMATS)
    image: Image.Image = opened
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(path, f"decompression bomb: {image.width} x {image.height} pixels")
    file_format = str(image.format)
    animated = file_format not in _SEVERAL_PICTURES and bool(getattr(image, "is_animated", False))
    profile = image.info.get("icc_profile")
    # Pillow opens 16-bit colours as 8-bit ones. Only the tiles' raw mode still shows the difference, and only until
    # the image is loaded.
    deep = any(";16" in str(tile.args) for tile in opened.tile) and not image.mode.startswith(("I", "F"))
    opened.load()
    changes = ["animated"] * animated + ["16-bit"] * deep
    if image.getexif().get(_ORIENTATION, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
        changes.append("orientation")
    image, colour_changes = _to_rgb(image, profile)
    return Decoded(image, file_format, (*changes, *colour_changes))


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
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0).clip(0.0)
    full_scale = 65535.0 if image.mode.startswith("I") else 1.0
    scaled = values / max(full_scale, float(values.max())) * 255.0
    return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")


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


def _describe(content: bytes) -> str:
    """Name what an unreadable file appears to be."""
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
