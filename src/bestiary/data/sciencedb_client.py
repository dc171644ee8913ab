"""Science Data Bank over HTTP: listing the files of a dataset, and downloading them with retries and resume."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import tenacity

from bestiary import params
from bestiary.data.archives import kind_of
from bestiary.errors import BestiaryError

API_HOST = "https://www.scidb.cn"
DOWNLOAD_HOST = "https://download.scidb.cn"
PAGE_SIZE = 5000
MAX_DEPTH = 16  # of folders
FIRST_PAUSE_SECONDS = 1.0  # upper limit of the first pause between attempts; it doubles with every further pause
MAX_PAUSE_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 600.0
MAX_IMAGE_BYTES = 256 * 2**20  # where the listing gives no size
_WRITE_BUFFER = 2**17  # bytes

_MAGIC = (  # how images and archives start
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\x00",
    b"MM\x00*",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"BZh",
)
_QUERY = re.compile(r"(?:^|&)(fileId|path|fileName)=(.*?)(?=&(?:fileId|path|fileName)=|$)")
_RETRIED_STATUS = {403, 408, 425, 429}  # and all 5xx; a delivery network answers 403 to an expired link

Sleep = Callable[[float], object]


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
class _Entry:
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


class PermanentError(Exception):
    """The service failed in a way that no retry fixes."""


# What a request to the service can raise once its retries are used up.
SERVICE_ERRORS = (TemporaryError, PermanentError, httpx.HTTPError, httpx.InvalidURL)


class Client:
    """A client of Science Data Bank: at most `settings.connections` requests at once, each with retries.

    Set `stop` to end pauses and downloads early. Raises BestiaryError when an address in the environment is invalid.
    """

    def __init__(self, settings: params.ScienceDB, sleep: Sleep | None = None) -> None:
        self.settings = settings
        self.stop = threading.Event()
        self._sleep = sleep or self.stop.wait  # setting `stop` ends the pause
        self.api = _host("SCIENCEDB_API_URL", API_HOST)
        self.downloads = _host("SCIENCEDB_DOWNLOAD_URL", DOWNLOAD_HOST)
        self.http = httpx.Client(
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=settings.connections, max_keepalive_connections=settings.connections),
            follow_redirects=True,
            # Sizes and ranges count the bytes of the file, not of a compressed response.
            headers={"User-Agent": "bestiary", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def list_files(self) -> list[RemoteFile]:
        """Return all files of the dataset, sorted by path: from the folder listing, or else from the address list.

        The folder listing has sizes and checksums; the address list is the fallback. Raises BestiaryError when neither
        can be used.
        """
        problems = []
        for listing in (self._list_folders, self._list_addresses):
            try:
                files = listing()
            except SERVICE_ERRORS as error:
                problems.append(reason_of(error))
                continue
            if files:
                return sorted(files, key=lambda file: (file.path, file.file_id))
            problems.append("it is empty")
        raise BestiaryError(
            f"{self.api} does not list the files of dataset {self.settings.dataset_id}, version "
            f"{self.settings.version}. Folder listing: {problems[0]}. Address list: {problems[1]}. "
            "Check dataset.sciencedb.dataset_id and dataset.sciencedb.version, or try again later."
        )

    def fetch(self, file: RemoteFile, target: Path, report: Callable[[int], object]) -> None:
        """Download `file` to `target`, through `target`.part, from which a later call resumes.

        `report` is called with the number of bytes that are there. Raises one of SERVICE_ERRORS when the retries are
        used up.
        """
        part = target.with_name(f"{target.name}.part")
        furthest, seen = 0, 0

        def note(there: int) -> None:
            nonlocal furthest
            furthest = max(furthest, there)
            report(there)

        def made_progress() -> bool:
            nonlocal seen
            before, seen = seen, furthest
            return seen > before

        self._retrying(made_progress)(self._fetch_once, file, part, note)
        part.replace(target)

    def _retrying(self, made_progress: Callable[[], bool] = lambda: False) -> tenacity.Retrying:
        """Retry `settings.retries` times, counted from the last progress; wait as long as Retry-After says."""
        last_progress = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal last_progress
            if made_progress():
                last_progress = state.attempt_number
            return self.stop.is_set() or state.attempt_number - last_progress > self.settings.retries

        exponential = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=MAX_PAUSE_SECONDS)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome and state.outcome.exception()
            retry_after = error.retry_after_seconds if isinstance(error, TemporaryError) else None
            return exponential(state) if retry_after is None else min(retry_after, MAX_RETRY_AFTER_SECONDS)

        def pause(seconds: float) -> None:
            self._sleep(seconds)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((TemporaryError, httpx.RequestError)),
            stop=stop,
            wait=wait,
            sleep=pause,
            reraise=True,
        )

    def _list_folders(self) -> list[RemoteFile]:
        """Return the files of all folders, starting from the version's root folder."""
        files: dict[tuple[str, str], RemoteFile] = {}
        seen: set[str] = set()
        waiting = [f"/{self.settings.version}"]
        while waiting:
            folder = waiting.pop()
            if folder in seen:
                continue
            if folder.count("/") > MAX_DEPTH:
                raise PermanentError(f"its folders are nested deeper than {MAX_DEPTH} levels")
            seen.add(folder)
            for entry in self._list_folder(folder):
                if entry.is_folder and entry.path:
                    waiting.append(entry.path)
                elif entry.path and entry.id:
                    files[entry.id, entry.path] = RemoteFile(entry.id, entry.path, entry.size, entry.md5)
                else:
                    raise PermanentError(f"{folder} has an entry without a path or an id")
        return list(files.values())

    def _list_folder(self, folder: str) -> list[_Entry]:
        """Return the entries of a folder, page by page. A server that ignores the page number is an error."""
        entries: dict[tuple[str, str], _Entry] = {}
        last, index = "*", 0
        while True:
            page = self._request_page(folder, last, index)
            fresh = {(entry.id, entry.path): entry for entry in page if (entry.id, entry.path) not in entries}
            entries.update(fresh)
            # The server may cap the page size at a round number, so such a page may not be the last one.
            if len(page) < PAGE_SIZE and (len(page) % 100 or not fresh):
                return list(entries.values())
            if not fresh:
                raise PermanentError(f"it repeats the first {PAGE_SIZE} entries of {folder} and never shows the others")
            last, index = page[-1].id, index + len(page)

    def _request_page(self, folder: str, last: str, index: int) -> list[_Entry]:
        query = {
            "dataSetId": self.settings.dataset_id,
            "version": self.settings.version,
            "path": folder,
            "lastFileId": last,
            "lastIndex": index,
            "pageSize": PAGE_SIZE,
        }

        def request() -> list[_Entry]:
            response = self.http.post(f"{self.api}/api/gin-sdb-filetree/public/file/childrenFileListByPath", json=query)
            _check_status(response)
            return _read_page(response, folder)

        return self._retrying()(request)

    def _list_addresses(self) -> list[RemoteFile]:
        """Return the files of the plain list of download addresses, without sizes and checksums."""
        query = {"dataSetId": self.settings.dataset_id, "type": "", "version": self.settings.version, "global": "en"}

        def request() -> list[RemoteFile]:
            response = self.http.get(f"{self.api}/api/sdb-filetree-service/getAllUrl", params=query)
            _check_status(response)
            text = response.content.decode("utf-8", "replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if not all(line.startswith(("http://", "https://")) and _from_address(line).file_id for line in lines):
                raise TemporaryError("it holds lines that are no addresses")
            return [_from_address(line) for line in lines]

        return list({(file.file_id, file.path): file for file in self._retrying()(request)}.values())

    def _fetch_once(self, file: RemoteFile, part: Path, report: Callable[[int], object]) -> None:
        have = size_of(part) or 0
        if have and file.size is not None and have >= file.size:
            if problem_of(file, part, have) is None:
                return
            have = 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        address = f"{self.downloads}/download"
        with self.http.stream("GET", address, params={"fileId": file.file_id}, headers=headers) as response:
            if response.status_code == 416:
                part.unlink(missing_ok=True)
                raise TemporaryError("it has no bytes after those already downloaded")
            _check_status(response)
            content_range = response.headers.get("Content-Range", "")
            resumes = response.status_code == 206 and _continues(content_range, have, file.size)
            if response.status_code == 206 and not resumes:
                part.unlink(missing_ok=True)
                raise TemporaryError("it sent a different range of the file than requested")
            size, md5 = self._store(response, part, have if resumes else 0, file, report)
        problem = problem_of(file, part, size, md5)
        if problem:
            part.unlink()
            raise TemporaryError(problem)

    def _store(
        self, response: httpx.Response, part: Path, have: int, file: RemoteFile, report: Callable[[int], object]
    ) -> tuple[int, str | None]:
        """Write the response after the first `have` bytes of `part`; return the size, and the md5 of the whole file.

        The md5 is None if it is not needed, or not known because the download was resumed.
        """
        limit = file.size if file.size is not None else None if kind_of(file.path) else MAX_IMAGE_BYTES
        digest = None if have or file.md5 is None else hashlib.md5(usedforsecurity=False)
        with part.open("ab" if have else "wb", buffering=_WRITE_BUFFER) as writing:
            for chunk in response.iter_bytes():
                if self.stop.is_set():
                    raise PermanentError("stopped")
                have += len(chunk)
                if limit is not None and have > limit:
                    break
                writing.write(chunk)
                if digest:
                    digest.update(chunk)
                report(have)
        if limit is not None and have > limit:
            part.unlink()
            raise TemporaryError(f"it is longer than {limit} bytes")
        return have, digest.hexdigest() if digest else None


def size_of(path: Path) -> int | None:
    """Return the size of a file in bytes, or None if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def problem_of(file: RemoteFile, path: Path, size: int, md5: str | None = None) -> str | None:
    """Return what is wrong with the complete download of `file` at `path`, or None.

    Size and md5 decide if the listing has them; otherwise the first bytes do. `size` is the size of the download, `md5`
    its checksum if the caller knows it.
    """
    if file.size is not None and size != file.size:
        return f"it has {size} bytes instead of {file.size}"
    if file.md5 is not None:
        if md5 is None:
            with path.open("rb") as reading:
                md5 = hashlib.file_digest(reading, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return None if md5 == file.md5 else "its md5 is wrong"
    with path.open("rb") as reading:
        head = reading.read(512)
    is_tar = head[257:262] == b"ustar" or kind_of(file.path) in (".tar.xz", ".txz")
    if file.size is None and not (head.startswith(_MAGIC) or is_tar or head[4:8] == b"ftyp"):
        return "it is neither an image nor an archive"
    return None


def reason_of(error: BaseException) -> str:
    """Return the message of an error, or its type if it has none."""
    return str(error) or type(error).__name__


def _host(variable: str, default: str) -> str:
    host = (os.environ.get(variable) or default).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise BestiaryError(f"The environment variable {variable} is {host!r}. Begin it with http:// or https://.")
    return host


def _check_status(response: httpx.Response) -> None:
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


def _continues(content_range: str, have: int, size: int | None) -> bool:
    """Return whether a Content-Range such as "bytes 100-199/200" starts exactly after the first `have` bytes."""
    unit, _, rest = content_range.partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdigit() and last.isdigit()) or int(first) != have:
        return False
    return not total.isdigit() or (int(last) + 1 == int(total) and (size is None or int(total) == size))


def _read_page(response: httpx.Response, folder: str) -> list[_Entry]:
    try:
        content = response.json()
    except ValueError:
        raise TemporaryError("the response is not JSON") from None
    if not isinstance(content, dict) or content.get("code") != 20000:
        detail = content if not isinstance(content, dict) else content.get("message") or content.get("msg")
        code = content.get("code") if isinstance(content, dict) else None
        raise TemporaryError(f"code {code}, {str(detail)[:80]}")
    data = content.get("data")
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise TemporaryError(f"no entries for {folder}")
    return [_read_entry(entry) for entry in data]


def _read_entry(entry: Mapping[str, Any]) -> _Entry:  # the service's JSON: any key may be missing or of another type
    size, md5 = entry.get("size"), str(entry.get("md5") or "").strip().lower()
    return _Entry(
        id=str(entry.get("id") or ""),
        path=str(entry.get("path") or ""),
        is_folder=bool(entry.get("dir")),
        size=size if isinstance(size, int) and size >= 0 else None,
        md5=md5 if len(md5) == 32 else None,
    )


def _from_address(address: str) -> RemoteFile:
    # Not urllib's parse_qs: an unquoted path may contain any of &, = and +.
    found = dict(_QUERY.findall(address.partition("?")[2]))
    return RemoteFile(found.get("fileId", ""), unquote(found.get("path", "")))
