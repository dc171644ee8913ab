"""What Science Data Bank answers: the files of a dataset, and what went wrong with a request."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import httpx

from bestiary.errors import printable

_QUERY = re.compile(r"(?:^|&)(fileId|path|fileName)=(.*?)(?=&(?:fileId|path|fileName)=|$)")
_RETRIED_STATUS = {403, 408, 425, 429}  # and all 5xx; a delivery network answers 403 to an expired link


@dataclass(frozen=True)
class RemoteFile:
    """A file of the dataset as a listing describes it."""

    file_id: str
    path: str
    size: int | None = None  # bytes
    md5: str | None = None

    @cached_property
    def key(self) -> str:
        """The file's name in the cache. It is the same for both listings."""
        return hashlib.sha256(repr((self.file_id, self.path)).encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Entry:
    """An entry of a folder listing; empty strings stand for what the service left out."""

    id: str
    path: str
    is_folder: bool
    size: int | None
    md5: str | None


class TemporaryError(Exception):
    """The service failed in a way that a retry may fix."""

    def __init__(self, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class SlowError(TemporaryError):
    """An answer came at less than MIN_BYTES_PER_SECOND."""


class PermanentError(Exception):
    """The service failed in a way that no retry fixes."""


class OfflineError(PermanentError):
    """This machine has no connection to the service: the host's name has no address, or no route leads there."""


# What a request to the service can raise once its retries are used up.
SERVICE_ERRORS = (TemporaryError, PermanentError, httpx.HTTPError, httpx.InvalidURL)


def read_page(body: bytes, folder: str) -> list[Entry]:
    """Return the entries of a page of a folder listing. Raises TemporaryError when it is not one."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise TemporaryError("the response is not JSON") from None
    if not isinstance(content, dict) or content.get("code") != 20000:
        detail = content if not isinstance(content, dict) else content.get("message") or content.get("msg")
        code = content.get("code") if isinstance(content, dict) else None
        raise TemporaryError(f"code {code}, {str(detail)[:80]}")
    data = content.get("data")
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise TemporaryError(f"no entries for {folder}")
    return [_read_entry(entry) for entry in data]


def _read_entry(entry: Mapping[str, Any]) -> Entry:  # the service's JSON: any key may be missing or of another type
    size, md5 = entry.get("size"), str(entry.get("md5") or "").strip().lower()
    return Entry(
        id=str(entry.get("id") or ""),
        path=str(entry.get("path") or ""),
        is_folder=bool(entry.get("dir")),
        size=size if isinstance(size, int) and size >= 0 else None,
        md5=md5 if len(md5) == 32 else None,
    )


def from_address(address: str) -> RemoteFile:
    """Return the file that an address of the address list leads to."""
    # Not urllib's parse_qs: an unquoted path may contain any of &, = and +.
    found = dict(_QUERY.findall(address.partition("?")[2]))
    return RemoteFile(found.get("fileId", ""), unquote(found.get("path", "")))


def check_status(response: httpx.Response) -> None:
    """Raise TemporaryError or PermanentError unless the answer is complete or part of a file."""
    status = response.status_code
    if status in _RETRIED_STATUS or status >= 500:
        raise TemporaryError(f"HTTP {status}", _retry_after(response.headers.get("Retry-After")))
    if status not in (200, 206):
        raise PermanentError(f"HTTP {status}")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds to wait from a Retry-After header, which holds seconds or a date."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def continues(content_range: str, have: int, size: int | None) -> bool:
    """Return whether a Content-Range such as "bytes 100-199/200" starts exactly after the first `have` bytes."""
    unit, _, rest = content_range.partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdigit() and last.isdigit()) or int(first) != have:
        return False
    return not total.isdigit() or (int(last) + 1 == int(total) and (size is None or int(total) == size))


def reason_of(error: BaseException) -> str:
    """Return what went wrong in a few words that people understand."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError) and _cause(error, socket.gaierror):
        return "the host's name has no address, or there is no network"
    if isinstance(error, httpx.ConnectError):
        return f"no connection ({str(error).rpartition('] ')[2] or 'refused'})"
    if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)):
        return "the connection ended before the answer did"
    return printable(str(error)[:300]) or type(error).__name__


def _cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """Return the first error of `kind` among `error` and what caused it."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def is_offline(error: BaseException) -> bool:
    """Whether a request failed because this machine has no connection to the service."""
    cause = _cause(error, OSError)
    unreachable = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
    return isinstance(cause, socket.gaierror) or (isinstance(cause, OSError) and cause.errno in unreachable)
