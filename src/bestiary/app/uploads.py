"""Adapters that browsers upload. They are stored until the server stops, and only the uploader can draw with one."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterable, Iterator
from pathlib import Path

from bestiary.app.errors import RefusedError
from bestiary.app.offers import Offer, Offers

# Together they bound the disk space that uploads can take.
MAX_STORED = 16  # a newer upload replaces the oldest
MAX_ARRIVING = 4  # at the same time

UPLOAD_SECONDS = 300.0  # a file that takes longer to arrive is dropped


class Uploads:
    """Stores uploaded files in a temporary folder and adds them to what the page offers."""

    def __init__(self, offers: Offers, max_mib: int) -> None:
        self._offers = offers
        self._max_mib = max_mib
        self._folder = tempfile.TemporaryDirectory(prefix="bestiary-uploads-")
        self._arriving = 0

    async def receive(self, name: str, chunks: AsyncIterable[bytes]) -> Offer:
        """Store a file while it arrives and offer it under a secret key, which only its uploader learns.

        Raises BestiaryError when the file is not an adapter, is too large or takes too long, or when too many others
        are arriving. Nothing is stored then.
        """
        if not name.lower().endswith(".safetensors"):
            raise RefusedError("onlySafetensors", "Only .safetensors files can be uploaded. Choose another file.")
        if self._arriving >= MAX_ARRIVING:
            raise RefusedError("uploadsFull", "Other files are being uploaded. Try again in a few minutes.")
        secret = secrets.token_urlsafe(16)
        file = Path(self._folder.name, f"{secret}.safetensors")
        self._arriving += 1
        try:
            with _plain_errors(name):
                async with asyncio.timeout(UPLOAD_SECONDS):
                    await self._write(file, name, chunks)
                offer = await asyncio.to_thread(self._offers.add_upload, f"upload:{secret}", name, file)
        except BaseException:  # including a browser that disconnects
            file.unlink(missing_ok=True)
            raise
        finally:
            self._arriving -= 1
        self._drop_oldest()
        return offer

    async def _write(self, file: Path, name: str, chunks: AsyncIterable[bytes]) -> None:
        size = 0
        with file.open("wb") as opened:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._max_mib * 2**20:
                    raise RefusedError(
                        "tooLarge",
                        "{name} is larger than {limit} MiB. Choose a smaller file.",
                        name=name,
                        limit=str(self._max_mib),
                    )
                await asyncio.to_thread(opened.write, chunk)

    def _drop_oldest(self) -> None:
        while len(self._offers.uploads) > MAX_STORED:
            oldest = self._offers.uploads.pop(next(iter(self._offers.uploads)))
            Path(oldest.what).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete every upload."""
        self._folder.cleanup()


@contextlib.contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise RefusedError(
            "late",
            "{name} took longer than {limit} minutes to arrive. Try again with a faster connection.",
            name=name,
            limit=f"{UPLOAD_SECONDS / 60:g}",
        ) from None
    except OSError:
        raise RefusedError(
            "noSpace", "The server could not store {name}. Free some space on its disk, then try again.", name=name
        ) from None
