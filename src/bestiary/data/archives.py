"""Images out of zip and tar archives that strangers made: inside the target folder, and inside limits."""

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

MAX_RATIO = 50  # pictures hardly shrink in an archive
MAX_RATIO_BELOW = 64 * 2**20  # so many bytes are harmless at any ratio
MAX_BYTES = 200 * 2**30
MAX_FILE_BYTES = 256 * 2**20
MAX_FILES = 1_000_000
MAX_TAR_HEADER_BYTES = 2**20  # long names and other things said of a member
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
    RuntimeError,  # zipfile's word for an encrypted file, and for a kind of compression that it does not know
    ValueError,  # a name that is no text
    OSError,
    struct.error,
    IndexError,
    OverflowError,
)
_INDEX = "index.csv"
_CHUNK = 2**20


def unpack(archive: Path, target: Path, kind: str) -> tuple[list[tuple[str, Path]], list[str]]:
    """Unpack `archive` (of `kind`, such as ".zip") into `target`, whole or not at all.

    Gives (path in the archive, file on disk) of each file, and the paths of what was refused: links, devices, and
    whatever would lead out of the target. Files are numbered on disk, so that no name from the archive is ever used.
    Raises BestiaryError when the archive is damaged, encrypted, or a bomb.
    """
    if not (target / _INDEX).exists():
        with replacing(target) as fresh:
            _unpack(archive, fresh, kind)
    with (target / _INDEX).open(newline="", encoding="utf-8", errors="surrogatepass") as file:
        rows = list(csv.reader(file))
    return [(path, target / name) for path, name in rows if name], [path for path, name in rows if not name]


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
                        f"The archive {archive.name} holds more than {MAX_FILES:,} files: not unpacked."
                    )
                if content is None or is_hostile(path):
                    index.writerow([path, ""])
                    continue
                name = f"{number:07d}"
                size = _copy(
                    content, target / name, min(MAX_FILE_BYTES, allowed - written, MAX_BYTES - written), archive
                )
                written += size
                index.writerow([path, name])
    except _DAMAGE as error:
        # The disk's trouble is no damage. gzip's and bz2's word for damage is an OSError without a number, a place
        # before the beginning of a file is an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise BestiaryError(f"The archive {archive.name} cannot be unpacked: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    """What an archive's reader says, where it says it in words."""
    spoken = isinstance(error, (zipfile.BadZipFile, tarfile.TarError, zlib.error, RuntimeError))
    return str(error) if spoken and str(error) else "it is damaged"


def _copy(content: IO[bytes], target: Path, limit: int, archive: Path) -> int:
    size = 0
    with content, target.open("wb") as file:
        while chunk := content.read(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise BestiaryError(f"The archive {archive.name} unpacks to far more than pictures do: it is a bomb.")
            file.write(chunk)
    return size


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if not member.filename.endswith("/"):
                yield member.filename, opened.open(member) if kind in (0, stat.S_IFREG) else None


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    with tarfile.open(archive, "r:*", tarinfo=_TarMember) as opened:
        for member in opened:
            if not member.isdir():
                yield member.name, opened.extractfile(member) if member.isreg() else None


class _TarMember(tarfile.TarInfo):
    """A member of a tar whose name is as long as names are: tarfile reads it into memory, where a bomb's are gigabytes.

    Raises TarError for another.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.type in _TAR_HEADERS and member.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.TarError("it is a bomb")
        return member


def kind_of(name: str, kinds: tuple[str, ...] = KINDS) -> str | None:
    """The kind of archive that a file's name says it is."""
    return next((kind for kind in sorted(kinds, key=len, reverse=True) if name.casefold().endswith(kind)), None)
