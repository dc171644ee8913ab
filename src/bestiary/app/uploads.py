"""Adapters and images that browsers upload. They are stored until the server stops; only the uploader can use them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections import Counter
from collections.abc import AsyncIterable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from bestiary.app.bodies import steadily
from bestiary.app.errors import RefusedError
from bestiary.app.offers import Offer, Offers, UploadedImage
from bestiary.errors import BestiaryError

T = TypeVar("T")

# Together, these limit the disk space of uploads.
MAX_STORED = 16  # a newer upload replaces the oldest of the address that has stored the most
MAX_ARRIVING = 4  # simultaneous uploads of one address
MAX_ARRIVING_TOGETHER = 8

HEADER_LENGTH_BYTES = 8
MAX_HEADER_MIB = 4  # of a safetensors file: names, shapes and metadata, which are all parsed
UPLOAD_SECONDS = 300.0  # limit for the arrival of a file

ZIP = b"PK\x03\x04"  # first bytes of a file by torch.save


class Uploads:
    """Stores uploaded files in a temporary folder and adds them to what the page offers."""

    def __init__(self, offers: Offers, max_mib: int) -> None:
        self._offers = offers
        self.max_mib = max_mib
        self._folder = tempfile.TemporaryDirectory(prefix="bestiary-uploads-")
        self._arriving: Counter[str] = Counter()  # number by address
        self._addresses: dict[str, str] = {}  # address by the key of a stored upload
        self._reading = asyncio.Semaphore(1)  # reads one file at a time, to save memory

    async def receive(self, name: str, chunks: AsyncIterable[bytes], address: str = "") -> Offer:
        """Store an adapter while it arrives and offer it under a secret key, which only its uploader learns.

        Raises BestiaryError when the file is not an adapter, is too large or takes too long, or when too many others
        are arriving. Nothing is stored then.
        """
        if not name.lower().endswith(".safetensors"):
            raise RefusedError("onlySafetensors", "Only .safetensors files can be uploaded. Choose another file.")
        return await self._receive(name, chunks, address, self._offers.add_upload, _check_header)

    async def receive_image(self, name: str, chunks: AsyncIterable[bytes], address: str = "") -> UploadedImage:
        """Store an image to start pictures from, under a secret key, which only its uploader learns.

        Raises BestiaryError as `receive` does.
        """
        return await self._receive(name, chunks, address, self._offers.add_image, lambda _start, _name: None)

    @contextlib.contextmanager
    def arriving(self, address: str) -> Iterator[None]:
        """Inside, a large body arrives from this address. Raises BestiaryError when too many others do."""
        if self._arriving[address] >= MAX_ARRIVING or self._arriving.total() >= MAX_ARRIVING_TOGETHER:
            raise RefusedError("uploadsFull", "Other files are being uploaded. Try again in a few minutes.", 503)
        self._arriving[address] += 1
        try:
            yield
        finally:
            self._arriving[address] -= 1
            self._arriving += Counter()  # forgets addresses without an upload

    def forget(self, key: str) -> None:
        """Delete an upload that is no longer needed, unless newer ones have replaced it already."""
        self._addresses.pop(key, None)
        self._offers.forget(key)

    async def _receive(
        self,
        name: str,
        chunks: AsyncIterable[bytes],
        address: str,
        add: Callable[[str, str, Path], T],
        check_start: Callable[[bytes, str], None],
    ) -> T:
        secret = secrets.token_urlsafe(16)
        key, file = f"upload:{secret}", Path(self._folder.name, f"{secret}.safetensors")
        try:
            with self.arriving(address), _plain_errors(name):
                async with asyncio.timeout(UPLOAD_SECONDS):
                    await self._write(file, name, chunks, check_start)
                async with self._reading:
                    added = await asyncio.to_thread(add, key, name, file)
        except BaseException:  # including a disconnected browser
            file.unlink(missing_ok=True)
            raise
        self._addresses[key] = address
        self._drop_oldest()
        return added

    async def _write(
        self, file: Path, name: str, chunks: AsyncIterable[bytes], check_start: Callable[[bytes, str], None]
    ) -> None:
        size, start = 0, b""
        with file.open("wb") as opened:
            async for chunk in steadily(chunks):
                size += len(chunk)
                if size > self.max_mib * 2**20:
                    raise RefusedError(
                        "tooLarge",
                        "{name} is larger than {limit} MiB. Choose a smaller file.",
                        name=name,
                        limit=str(self.max_mib),
                    )
                if len(start) < HEADER_LENGTH_BYTES:
                    start = (start + chunk)[:HEADER_LENGTH_BYTES]
                    check_start(start, name)
                await asyncio.to_thread(opened.write, chunk)

    def _drop_oldest(self) -> None:
        while len(self._addresses) > MAX_STORED:
            (most, _), *_others = Counter(self._addresses.values()).most_common()
            oldest = next(key for key, address in self._addresses.items() if address == most)
            self.forget(oldest)

    def close(self) -> None:
        """Delete every upload."""
        self._folder.cleanup()


def _check_header(start: bytes, name: str) -> None:
    """Refuse a file by its first bytes before anything parses it: a torch pickle, or a header that is too long."""
    if start.startswith(ZIP):
        raise BestiaryError(f"{name} is a torch pickle. Convert it with `bestiary adapter convert`.")
    if len(start) == HEADER_LENGTH_BYTES and int.from_bytes(start, "little") > MAX_HEADER_MIB * 2**20:
        raise RefusedError(
            "longHeader",
            "{name} is not an adapter, or carries more than {limit} MiB of metadata. Choose another file.",
            name=name,
            limit=str(MAX_HEADER_MIB),
        )


@contextlib.contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise RefusedError(
            "late",
            "{name} took longer than {limit} minutes to arrive, or stopped arriving. Try again with a faster "
            "connection.",
            name=name,
            limit=f"{UPLOAD_SECONDS / 60:g}",
        ) from None
    except OSError:
        raise RefusedError(
            "noSpace", "The server could not store {name}. Free some space on its disk, then try again.", name=name
        ) from None
