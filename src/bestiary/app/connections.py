"""Limits on connections, so that no client can block others by sending or reading slowly, or by opening many."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from uvicorn.protocols.http.h11_impl import H11Protocol

UPLOAD_PATHS = ("/api/adapters", "/api/images", "/sdapi/v1/img2img")  # requests with large bodies

MAX_CONNECTIONS = 512
MAX_CONNECTIONS_PER_ADDRESS = 64
RESERVED_FILES = 96  # open files that the server needs besides connections
MIN_CONNECTIONS = 8

REQUEST_SECONDS = 10.0  # limit for sending a whole request
UPLOAD_SECONDS = 330.0  # limit for a whole upload, even a refused one; `Uploads` stops sooner, with an error
READING_SECONDS = 20.0  # between two checks of how much a client has read
READING_BYTES = 4096 * READING_SECONDS  # least amount to read between two checks

SAME_LINE_SECONDS = 60.0  # between two identical lines in the log
TALKATIVE_LOGGERS = ("asyncio", "uvicorn.error")  # a client's requests make them write lines


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with limits.

    A connection is dropped when it does not send its request in time, or reads its answer too slowly. When there are
    too many connections, in all or from one address, the oldest that has not sent a whole request makes room.
    """

    _request_timer: asyncio.TimerHandle | None = None
    _request_seconds: float | None = None  # the timer's current limit
    _reading_timer: asyncio.TimerHandle | None = None
    max_connections = MAX_CONNECTIONS  # `launch` lowers it if the process may open fewer files

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.opened = self.loop.time()
        others = [other for other in self.connections if isinstance(other, GuardedProtocol) and other is not self]
        same = [other for other in others if other.client and self.client and other.client[0] == self.client[0]]
        if not (_has_room(same, MAX_CONNECTIONS_PER_ADDRESS) and _has_room(others, self.max_connections)):
            transport.abort()
            return
        self._time_request()

    @property
    def is_uploading(self) -> bool:
        """Whether the body of an upload is arriving."""
        return self.cycle is not None and self.cycle.more_body and self.cycle.scope["path"] in UPLOAD_PATHS

    @property
    def awaits_request(self) -> bool:
        """Whether the client has not sent its whole request, and it is no upload."""
        if self.is_uploading:
            return False
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_request()

    def _time_request(self) -> None:
        """Start the timer for what the client has to send, or stop it. More data does not start it again."""
        seconds = UPLOAD_SECONDS if self.is_uploading else REQUEST_SECONDS if self.awaits_request else None
        if seconds == self._request_seconds:
            return
        _cancel(self._request_timer)
        self._request_seconds = seconds
        self._request_timer = self.loop.call_later(seconds, self.transport.abort) if seconds else None

    def pause_writing(self) -> None:
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        self._reading_timer = self.loop.call_later(READING_SECONDS, self._check_reading, size)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._reading_timer)

    def _check_reading(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if before - left < READING_BYTES:
            self.transport.abort()  # close() would wait for the client to read the rest
            return
        self._reading_timer = self.loop.call_later(READING_SECONDS, self._check_reading, left)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        _cancel(self._request_timer)
        _cancel(self._reading_timer)


def _has_room(connections: Iterable[GuardedProtocol], limit: int) -> bool:
    """Whether there are fewer than `limit` connections, or one could be dropped."""
    open_ones = [connection for connection in connections if not connection.transport.is_closing()]
    if len(open_ones) < limit:
        return True
    waiting = (connection for connection in open_ones if connection.awaits_request)
    oldest = min(waiting, key=lambda connection: connection.opened, default=None)
    if oldest is not None:
        oldest.transport.abort()
    return oldest is not None


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def possible_connections() -> int:
    """How many connections this process can hold without running out of files. Raises the limit of open files first."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MAX_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else soft
    return max(MIN_CONNECTIONS, min(MAX_CONNECTIONS, possible - RESERVED_FILES))


class NoRepetition(logging.Filter):
    """Passes equal log lines once a minute, so that no client can fill the disk with them."""

    MAX_LINES = 1000  # number of lines whose time is stored

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        line = f"{record.getMessage()} {record.exc_info and record.exc_info[1]!r}"
        if now - self._last.get(line, -SAME_LINE_SECONDS) < SAME_LINE_SECONDS:
            return False
        if len(self._last) >= self.MAX_LINES:
            self._last.clear()
        self._last[line] = now
        return True
