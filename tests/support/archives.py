"""Archives in memory."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}
ARCHIVE_KINDS = (".zip", *COMPRESS)


def make_archive(kind: str, files: Mapping[str, bytes]) -> bytes:
    """Return an archive of `files` (path to content) of one of ARCHIVE_KINDS."""
    buffer = io.BytesIO()
    if kind == ".zip":
        with zipfile.ZipFile(buffer, "w") as zipped:
            for path, content in files.items():
                zipped.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as tarred:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tarred.addfile(member, io.BytesIO(content))
    return COMPRESS[kind](buffer.getvalue())
