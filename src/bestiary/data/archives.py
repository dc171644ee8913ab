"""Unpacking zip and tar archives from strangers, inside the target folder and within size limits."""

from __future__ import annotations

import csv
import errno
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from bestiary.data.folder import replacing
from bestiary.data.names import is_hostile
from bestiary.errors import BestiaryError

KINDS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
OTHER_KINDS = (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst", ".lzh", ".iso")

MAX_RATIO = 50  # unpacked to packed bytes; images hardly shrink in an archive
MAX_RATIO_BELOW = 64 * 2**20  # bytes that are harmless at any ratio
MAX_BYTES = 200 * 2**30
MAX_FILE_BYTES = 256 * 2**20
MAX_FILES = 1_000_000
MAX_TAR_HEADER_BYTES = 2**20  # for long names and other metadata of one member
_TAR_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # zipfile raises it for encrypted files and for unknown compression methods
    ValueError,  # a name that cannot be decoded
    OSError,
    struct.error,
    IndexError,
    OverflowError,
)
_INDEX = "index.csv"
_CHUNK = 2**20


def unpack(archive: Path, target: Path, kind: str) -> tuple[list[tuple[str, Path]], list[str]]:
    """Unpack `archive` (of `kind`, such as ".zip") into `target`, completely or not at all.

    Returns (path in the archive, file on disk) of each file, and the paths that were refused: links, devices, and paths
    that lead out of the target. Files on disk are numbered, so no name from the archive is ever used.

    Raises BestiaryError when the archive is damaged, encrypted, or a bomb.
    """
    if not (target / _INDEX).exists():
        with replacing(target) as fresh:
            _unpack(archive, fresh, kind)
    with (target / _INDEX).open(newline="", encoding="utf-8", errors="surrogatepass") as file:
        rows = list(csv.reader(file))
    return [(path, target / name) for path, name in rows if name], [path for path, name in rows if not name]


def kind_of(name: str, kinds: tuple[str, ...] = KINDS) -> str | None:
    """Return the kind of archive that a file's name stands for, or None.

    >>> kind_of("Animal.TAR.GZ"), kind_of("cat.jpg")
    ('.tar.gz', None)
    """
    return next((kind for kind in sorted(kinds, key=len, reverse=True) if name.casefold().endswith(kind)), None)


def _unpack(archive: Path, target: Path, kind: str) -> None:
    allowed = max(MAX_RATIO_BELOW, MAX_RATIO * archive.stat().st_size)
    written = 0
    members = _zip_members(archive) if kind == ".zip" else _tar_members(archive)
    try:
        with (target / _INDEX).open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            index = csv.writer(file)
            for number, (path, content) in enumerate(members):
                if number >= MAX_FILES:
                    raise BestiaryError(
                        f"The archive {archive.name} holds more than {MAX_FILES:,} files, so it is not unpacked. "
                        "Split it into smaller archives."
                    )
                if content is None or is_hostile(path):
                    index.writerow([path, ""])
                    continue
                name = f"{number:07d}"
                limit = min(MAX_FILE_BYTES, allowed - written, MAX_BYTES - written)
                written += _copy(content, target / name, limit, archive)
                index.writerow([path, name])
    except _DAMAGE as error:
        # A full disk is not a damaged archive. gzip and bz2 report damage as an OSError without a number, and a seek
        # to before a file's start is EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise BestiaryError(
            f"The archive {archive.name} cannot be unpacked: {_reason(error)}. Replace it with an intact copy."
        ) from None


def _reason(error: Exception) -> str:
    """Return the archive reader's own message where it is readable."""
    has_message = isinstance(error, (zipfile.BadZipFile, tarfile.TarError, zlib.error, RuntimeError))
    return str(error) if has_message and str(error) else "it is damaged"


def _copy(content: IO[bytes], target: Path, limit: int, archive: Path) -> int:
    size = 0
    with content, target.open("wb") as file:
        while chunk := content.read(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise BestiaryError(
                    f"The archive {archive.name} is a bomb: it unpacks to far more bytes than images do. "
                    "Unpack it by hand if you trust it."
                )
            file.write(chunk)
    return size


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Give path and content of each member; no content for anything but a regular file."""
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if not member.filename.endswith("/"):
                yield member.filename, opened.open(member) if kind in (0, stat.S_IFREG) else None


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Give path and content of each member; no content for anything but a regular file."""
    with tarfile.open(archive, "r:*", tarinfo=_TarMember) as opened:
        for member in opened:
            if not member.isdir():
                yield member.name, opened.extractfile(member) if member.isreg() else None


class _TarMember(tarfile.TarInfo):
    """A tar member whose metadata is limited: tarfile reads it into memory, and in a bomb it can be gigabytes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _TAR_HEADERS and member.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.TarError("it is a bomb")
        return member
