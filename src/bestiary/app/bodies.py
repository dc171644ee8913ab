"""Reads a request's body, within limits of time and size."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from bestiary.app.access import check_json
from bestiary.app.errors import RefusedError

MAX_ORDER_BYTES = 64 * 1024
ORDER_SECONDS = 10.0  # within which an order must have arrived


async def read_json(request: Request, most: int = MAX_ORDER_BYTES) -> bytes:
    """The body of a request that is declared as JSON, at most so many bytes.

    Raises RefusedError when it is not, is too long, or does not arrive in time.
    """
    check_json(request.headers)
    data = b""
    try:
        async with asyncio.timeout(ORDER_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise RefusedError("longOrder", "The request is too long. Write a shorter prompt.")
    except TimeoutError:
        raise RefusedError("lateOrder", "The request did not arrive in time. Try again.", 408) from None
    return data
