"""Opening image files of any origin within limits. Images that this program did not write are opened here."""

from __future__ import annotations

import io
import re
import stat
import warnings
from pathlib import Path
from typing import cast

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from pillow_heif import HeifImageFile, register_heif_opener

from bestiary.errors import BestiaryError

# Cleaning runs one process per core, and of a file's pictures only the first is used.
register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)

# Pillow also opens formats that run other programs (EPS) or that photographs do not use. They stay closed here.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
MAX_FILE_BYTES = 512 * 2**20
MAX_PIXELS = 100_000_000  # a small file that claims more is a decompression bomb
MAX_PHOTO_PIXELS = 250_000_000  # of the formats that cameras write: phones take photos of 200 megapixels
PHOTO_FORMATS = ("JPEG", "MPO", "HEIF")
MAX_SCANS = 100  # of a progressive JPEG; common ones have 10
MAX_SCANNED_PIXELS = 5_000_000_000  # scans x pixels, which is what decoding costs; seconds

_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")  # in a JPEG: a marker, among entropy-coded data as well
_SCAN, _END = 0xDA, 0xD9
_ALONE = frozenset({0x01, 0xD8, *range(0xD0, 0xD8)})  # markers without a length


class UnreadableImageError(BestiaryError):
    """The file holds no usable image; `reason` says why in a few words."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}. Replace or remove the file.")
        self.reason = reason


def read_image(path: Path) -> bytes:
    """Return the content of an image file.

    Raises BestiaryError when it does not exist, UnreadableImageError when it is too large or not a file.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise BestiaryError(f"The image {path} does not exist. Check the path.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError(path, "not a file")
    if status.st_size > MAX_FILE_BYTES:
        raise UnreadableImageError(path, f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def open_image(path: Path, content: bytes | None = None, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Return the image in `content`, or in the file at `path`, opened but not decoded yet.

    Raises UnreadableImageError when it is none of `formats` or beyond a limit, BestiaryError when the file does not
    exist.
    """
    content = read_image(path) if content is None else content
    if not content:
        raise UnreadableImageError(path, "zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata
            image = _open(content, formats)
    except UnidentifiedImageError:
        raise UnreadableImageError(path, describe(content)) from None
    except Image.DecompressionBombError:
        raise UnreadableImageError(path, f"decompression bomb: more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # a damaged header can make a decoder raise anything (struct.error, IndexError, ...)
        raise UnreadableImageError(path, damage(error, content)) from None
    pixels = image.width * image.height
    if pixels > (MAX_PHOTO_PIXELS if image.format in PHOTO_FORMATS else MAX_PIXELS):
        raise UnreadableImageError(path, f"decompression bomb: {image.width} x {image.height} pixels")
    if isinstance(image, JpegImageFile):
        scans = count_scans(content)
        if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
            raise UnreadableImageError(path, f"decompression bomb: a JPEG of {scans} scans")
    return image


def count_scans(content: bytes) -> int:
    """Return how many scans the first picture of a JPEG has: each makes a decoder visit every pixel.

    >>> buffer = io.BytesIO()
    >>> Image.new("RGB", (8, 8)).save(buffer, "JPEG", progressive=True)
    >>> count_scans(buffer.getvalue())
    10
    """
    scans, position = 0, 2
    while (found := _SEGMENT.search(content, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == _END:
            break
        scans += marker == _SCAN
        if marker not in _ALONE:
            position += int.from_bytes(content[position : position + 2], "big")
    return scans


def describe(content: bytes) -> str:
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


def damage(error: Exception, content: bytes) -> str:
    """Return what is wrong with an image whose decoder raised `error`."""
    reason = "truncated" if "truncated" in str(error) or isinstance(error, EOFError) else "damaged"
    return f"{reason} ({describe(content)})"


def _open(content: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError:  # Pillow's own limit is below the size of large photos
        if content.startswith(b"\xff\xd8\xff") and "JPEG" in formats:
            return JpegImageFile(io.BytesIO(content))
        if content[4:8] == b"ftyp" and "HEIF" in formats:
            return cast(Image.Image, HeifImageFile(io.BytesIO(content)))  # type: ignore[no-untyped-call]
        raise
