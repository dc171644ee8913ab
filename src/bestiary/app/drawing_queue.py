"""The queue of orders: the device draws one picture at a time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from bestiary.app.errors import RefusedError, Stopped
from bestiary.app.events import Done, Event, Failed, Waiting
from bestiary.app.orders import Order
from bestiary.app.studio import Studio, Tell
from bestiary.errors import BestiaryError

MAX_WAITING = 32  # orders, including the one that is drawn
POLL_SECONDS = 0.2  # between two checks of an order's place in the queue

log = logging.getLogger(__name__)


class DrawingQueue:
    """Draws orders one after the other, in a separate thread."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._tickets: list[object] = []  # one for each order; the first order is being drawn
        self._worker = ThreadPoolExecutor(1, "draw")
        self._closing = threading.Event()

    def warm_up(self) -> None:
        """Start to load the default base, before the first order."""
        self._worker.submit(self._studio.warm)

    def check_room(self) -> None:
        """Raise BestiaryError when too many orders are waiting."""
        if len(self._tickets) >= MAX_WAITING:
            raise RefusedError("queueFull", "Too many people are waiting. Try again in a few minutes.")

    async def draw(self, order: Order) -> AsyncGenerator[Event, None]:
        """Yield what happens to an order until it is done or has failed. Closing the iterator stops the drawing."""
        ticket, stopped = object(), threading.Event()
        self._tickets.append(ticket)
        try:
            async for waiting in self._wait(ticket):
                yield waiting
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[Event] = asyncio.Queue()

            def tell(event: Event) -> None:
                if self._closing.is_set():
                    raise Stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

            self._worker.submit(_draw, self._studio, order, tell, stopped)
            while True:
                event = await events.get()
                yield event
                if isinstance(event, Done | Failed):
                    return
        finally:
            stopped.set()
            self._tickets.remove(ticket)

    async def _wait(self, ticket: object) -> AsyncIterator[Waiting]:
        """Wait until the ticket is the first one; yield its place whenever that changes."""
        ahead = None
        while self._tickets[0] is not ticket:
            if ahead != self._tickets.index(ticket):
                ahead = self._tickets.index(ticket)
                yield Waiting(ahead)
            await asyncio.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Stop the current drawing and drop the orders that wait."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)


def _draw(studio: Studio, order: Order, tell: Tell, stopped: threading.Event) -> None:
    """Draw in the worker thread. Whatever happens, the last event is Done or Failed."""
    last: Event = Done()
    try:
        studio.draw(order, tell, stopped)
    except Stopped:
        pass
    except BestiaryError as error:
        last = Failed.by(error)
    except Exception as error:
        log.exception("A drawing failed.")
        last = Failed.by(_explained(error))
    with contextlib.suppress(Stopped, RuntimeError):  # the server is closing
        tell(last)


def _explained(error: Exception) -> RefusedError:
    if "memory" in f"{type(error).__name__} {error}".lower():
        return RefusedError(
            "memory", "The device has too little memory for a picture of this size. Choose a smaller size."
        )
    return RefusedError("failure", "The picture could not be drawn. The server's log has the details.")
