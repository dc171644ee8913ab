"""Answers a program with the finished pictures of an order, in one response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from bestiary.app.drawing_queue import Drawing
from bestiary.app.errors import InvalidError
from bestiary.app.events import Failed, Picture, Preview

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

FAILED_STATUS = {
    "failure": 500,
    "slowReader": 503,
    "goneImage": 503,
}  # HTTP status of a failed order, by the error's key
TOO_MUCH = "The server has no memory left for finished pictures that wait to be sent. Order fewer pictures at once."

Render = Callable[[Sequence[Picture]], object]  # turns an order's pictures into JSON


class DrawnResponse(Response):
    """Waits for an order's pictures and sends what `render` makes of them. Stops the drawing when the client is gone.

    Until the client has read them, the order counts as open and its pictures as unread. `close` is called at the end.
    """

    def __init__(self, drawing: Drawing, render: Render, close: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._drawing = drawing
        self._render = render
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            pictures = await _finished(self._drawing, receive)
            await JSONResponse(self._render(pictures))(scope, receive, send)
        finally:
            self._drawing.close()
            self._close()


async def _finished(drawing: Drawing, receive: Receive) -> list[Picture]:
    """The pictures of an order that is done. Raises InvalidError when it failed, ClientDisconnect when nobody waits."""
    ended, gone = asyncio.ensure_future(drawing.ended()), asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        gone.cancel()
    if gone.done() or not ended.done():
        raise ClientDisconnect
    events = ended.result()
    last = events[-1]
    if isinstance(last, Failed):
        sentence = TOO_MUCH if last.key == "slowReader" else last.message
        raise InvalidError(sentence, FAILED_STATUS.get(last.key, 422))
    return [event for event in events if isinstance(event, Picture)]


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def image_base64(picture: Picture | Preview) -> str:
    """The image's file in base64, without the data URI around it."""
    return picture.image.partition(",")[2]
