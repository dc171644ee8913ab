"""The queue of orders: the device draws one picture at a time, and never waits for a slow reader."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from bestiary.app.errors import RefusedError, Stopped
from bestiary.app.events import Done, Event, Failed, Picture, Preview, Progress, Waiting
from bestiary.app.orders import Order
from bestiary.app.studio import Studio
from bestiary.errors import BestiaryError

PAGE = "page"  # the API whose clients get every step's events
TURN_SECONDS = 5.0  # after this time, an order lets others draw when its current picture is finished
MAX_WAITING = 32  # orders, including the one being drawn
MAX_OPEN_PER_ADDRESS = 8  # orders that wait, are being drawn, or have unread pictures
MAX_UNREAD = 96 * 2**20  # characters of one order's events; a pair of 1024 x 1024 pixels has up to 8 million
MAX_UNREAD_TOGETHER = 256 * 2**20  # characters of all orders' events

log = logging.getLogger(__name__)


class Drawing:
    """An order in the queue, with the events that its reader has not taken yet. For the event loop's thread only."""

    def __init__(self, order: Order, address: str, api: str, leave: Callable[[Drawing], None]) -> None:
        self.order = order
        self.address = address
        self.api = api  # through which the order came
        self.stopped = threading.Event()
        self.place = 0  # number of orders ahead
        self.future: Future[None] | None = None
        self.pictures: Iterator[None] = iter(())  # drawn one by one, in the worker's thread
        self.progress: Progress | None = None  # the latest one
        self.preview: Preview | None = None  # the latest one that a program asked for
        self.wants_preview = threading.Event()  # a program sets it to ask for the next preview
        self._leave = leave
        self._unread: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._is_over = False

    @property
    def unread(self) -> int:
        """Characters of the images that wait for the reader."""
        return sum(len(event.image) for event in self._unread if isinstance(event, Picture | Preview))

    def put(self, event: Event) -> None:
        """Add an event for the reader. It replaces the events that it makes outdated, so only pictures accumulate."""
        if self._is_over:
            return
        if isinstance(event, Waiting | Progress | Preview | Picture):
            outdated = Preview if isinstance(event, Picture) else type(event)
            self._unread = deque(unread for unread in self._unread if not isinstance(unread, outdated))
        self._is_over = isinstance(event, Done | Failed)
        self._unread.append(event)
        self._arrived.set()

    def give_up(self) -> None:
        """Stop the drawing and forget its pictures, because the reader is too slow."""
        self.stopped.set()
        self._unread.clear()
        self._is_over = False
        self.put(Failed.by(RefusedError("slowReader", "Your connection is too slow for these pictures. Order fewer.")))

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens to the order, until it is done or has failed."""
        while True:
            await self._arrived.wait()
            event = self._unread.popleft()
            if not self._unread:
                self._arrived.clear()
            yield event
            if isinstance(event, Done | Failed):
                return

    async def ended(self) -> list[Event]:
        """Wait until the order is done or has failed. Returns the unread events, which keep counting as unread."""
        while not self._is_over:
            self._arrived.clear()
            await self._arrived.wait()
        return list(self._unread)

    def close(self) -> None:
        """Stop the drawing if it is not done, because nobody reads any more."""
        self.stopped.set()
        self._leave(self)


class DrawingQueue:
    """Draws in a separate thread. Orders take turns."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._waiting: list[Drawing] = []  # in the order of their turns; the first is being drawn
        self._open: list[Drawing] = []  # orders with a reader
        self._worker = ThreadPoolExecutor(1, "draw")
        self._closing = threading.Event()

    def warm_up(self) -> None:
        """Start to load the default base, before the first order."""
        self._worker.submit(self._studio.warm)

    def enter(self, order: Order, address: str, api: str = PAGE) -> Drawing:
        """Put an order into the queue. The caller closes the drawing. Raises BestiaryError when there is no room."""
        if sum(drawing.address == address for drawing in self._open) >= MAX_OPEN_PER_ADDRESS:
            raise RefusedError(
                "tooManyOpen",
                "{limit} orders from your address are not finished yet. Wait for one of them.",
                429,
                limit=str(MAX_OPEN_PER_ADDRESS),
            )
        if len(self._waiting) >= MAX_WAITING:
            raise RefusedError("queueFull", "Too many people are waiting. Try again in a few minutes.", 503)
        loop = asyncio.get_running_loop()
        drawing = Drawing(order, address, api, self._close)

        def tell(event: Event) -> None:
            if self._closing.is_set():
                raise Stopped
            if isinstance(event, Progress):
                drawing.progress = event
            if api != PAGE and isinstance(event, Preview):
                drawing.preview = event
                drawing.wants_preview.clear()
            # Programs ask for these: waking the event loop at each step would slow down the drawing.
            if api == PAGE or not isinstance(event, Progress | Preview):
                loop.call_soon_threadsafe(self._put, drawing, event)

        wants_preview = drawing.wants_preview.is_set if api != PAGE else lambda: True
        drawing.pictures = self._studio.draw(order, tell, drawing.stopped, wants_preview)
        self._open.append(drawing)
        self._queue_up(drawing)
        return drawing

    def oldest(self, address: str, api: str) -> Drawing | None:
        """The oldest open order of an address through this API; None when there is none."""
        return next((each for each in self._open if (each.address, each.api) == (address, api)), None)

    def interrupt(self, drawing: Drawing) -> None:
        """End an order early, although its reader waits: it is done, with the pictures that are finished."""
        drawing.stopped.set()
        if self._cancel(drawing):
            drawing.put(Done())

    def _queue_up(self, drawing: Drawing) -> None:
        self._waiting.append(drawing)
        drawing.future = self._worker.submit(self._take_turn, drawing, asyncio.get_running_loop())
        self._tell_places()

    def _take_turn(self, drawing: Drawing, loop: asyncio.AbstractEventLoop) -> None:
        """Draw in the worker's thread."""
        last = _draw(drawing.pictures)
        with contextlib.suppress(RuntimeError):  # the server has closed
            loop.call_soon_threadsafe(self._end_turn, drawing, last)

    def _end_turn(self, drawing: Drawing, last: Event | None) -> None:
        self._waiting.remove(drawing)
        if last is not None:
            drawing.put(last)
            self._tell_places()
        elif not self._closing.is_set():
            self._queue_up(drawing)

    def _put(self, drawing: Drawing, event: Event) -> None:
        drawing.put(event)
        if drawing.unread > MAX_UNREAD:
            drawing.give_up()
        while sum(each.unread for each in self._open) > MAX_UNREAD_TOGETHER:
            max(self._open, key=lambda each: each.unread).give_up()

    def _close(self, drawing: Drawing) -> None:
        if drawing in self._open:
            self._open.remove(drawing)
        self._cancel(drawing)

    def _cancel(self, drawing: Drawing) -> bool:
        """Take an order out of the queue unless it is being drawn. Returns whether it was waiting."""
        if not (drawing.future and drawing.future.cancel()):
            return False
        if drawing not in self._waiting:  # it was cancelled earlier
            return False
        self._waiting.remove(drawing)
        self._tell_places()
        return True

    def _tell_places(self) -> None:
        for place, drawing in enumerate(self._waiting):
            if place and place != drawing.place:
                drawing.put(Waiting(place))
            drawing.place = place

    def close(self) -> None:
        """Stop the current drawing and drop the orders that wait."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)


def _draw(pictures: Iterator[None]) -> Event | None:
    """Draw until the turn or the order is over. Returns Done or Failed, or None when there are more pictures."""
    ends = time.monotonic() + TURN_SECONDS
    try:
        for _ in pictures:
            if time.monotonic() >= ends:
                return None
    except Stopped:
        pass
    except BestiaryError as error:
        return Failed.by(error)
    except Exception as error:
        log.exception("A drawing failed.")
        return Failed.by(_explained(error))
    return Done()


def _explained(error: Exception) -> RefusedError:
    if "memory" in f"{type(error).__name__} {error}".lower():
        return RefusedError(
            "memory", "The device has too little memory for a picture of this size. Choose a smaller size."
        )
    return RefusedError("failure", "The picture could not be drawn. The server's log has the details.")
