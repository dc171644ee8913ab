"""Reads a request's body, within limits of time and size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator

from starlette.requests import Request

from bestiary.app.access import check_json
from bestiary.app.errors import RefusedError
from bestiary.errors import BestiaryError

MAX_ORDER_BYTES = 64 * 1024
ORDER_SECONDS = 10.0  # limit for the arrival of a whole order
STALL_SECONDS = 20.0  # a body is dropped after this time without data


async def read_json(
    request: Request,
    most: int = MAX_ORDER_BYTES,
    seconds: float = ORDER_SECONDS,
    too_long: BestiaryError | None = None,
) -> bytes:
    """The body of a request that is declared as JSON, at most so many bytes.

    Raises RefusedError when it is not, or does not arrive in time; when it is too long, `too_long` if that is given.
    """
    check_json(request.headers)
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in steadily(request.stream()):
                data += chunk
                if len(data) > most:
                    raise too_long or RefusedError("longOrder", "The request is too long. Write a shorter prompt.")
    except TimeoutError:
        raise RefusedError("lateOrder", "The request did not arrive in time. Try again.", 408) from None
    return bytes(data)


async def steadily(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the parts of a body as they arrive. Raises TimeoutError when none arrives for STALL_SECONDS."""
    arriving = aiter(chunks)
    while True:
        async with asyncio.timeout(STALL_SECONDS):
            chunk = await anext(arriving, None)
        if chunk is None:
            return
        yield chunk
