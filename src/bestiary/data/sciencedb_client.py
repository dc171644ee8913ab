"""Science Data Bank over HTTP: listing the files of a dataset, and downloading them with retries and resume."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import tenacity

from bestiary import params
from bestiary.data.archives import MAX_BYTES, kind_of
from bestiary.data.sciencedb_answers import (
    SERVICE_ERRORS,
    Entry,
    OfflineError,
    PermanentError,
    RemoteFile,
    SlowError,
    TemporaryError,
    check_status,
    continues,
    from_address,
    is_offline,
    read_page,
    reason_of,
)
from bestiary.errors import BestiaryError, printable

API_HOST = "https://www.scidb.cn"
DOWNLOAD_HOST = "https://download.scidb.cn"
PAGE_SIZE = 5000
MAX_DEPTH = 16  # of folders
FIRST_PAUSE_SECONDS = 1.0  # upper limit of the first pause between attempts; it doubles with every further pause
MAX_PAUSE_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 600.0
MAX_IMAGE_BYTES = 256 * 2**20  # where the listing gives no size
MAX_UNSIZED_BYTES = 512 * 2**20  # of an archive, where neither the listing nor the answer gives a size
MAX_PAGE_BYTES = 8 * 2**20  # of the folder listing: 5,000 entries are about 2 MB
MAX_ADDRESSES_BYTES = 32 * 2**20  # of the address list: 40,000 files are about 10 MB
MAX_ENTRIES = 1_000_000  # of the whole listing
MIN_PROGRESS_BYTES = 1024  # of an attempt that does not use up a retry
MIN_BYTES_PER_SECOND = 512.0  # over each `timeout_s` of an answer; the slowest modem brings ten times as much
_MIRROR = "name a mirror in SCIENCEDB_API_URL and SCIENCEDB_DOWNLOAD_URL"
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

Sleep = Callable[[float], object]
Tell = Callable[[str], object]
Content = Mapping[str, str | int]
Listed = TypeVar("Listed")


class Client:
    """A client of Science Data Bank: at most `settings.connections` requests at once, each with retries.

    Set `stop` to end pauses and downloads early. `tell` gets a line for each retry; `nameless` counts the entries of
    the listing that have no path or no id. Raises BestiaryError when an address in the environment is invalid.
    """

    def __init__(self, settings: params.ScienceDB, sleep: Sleep | None = None, tell: Tell | None = None) -> None:
        self.settings = settings
        self.nameless = 0
        self._tell = tell or (lambda _: None)
        self._reached = False  # whether any request was answered
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
        files = self._first_that_answers(self._list_folders, self._list_addresses)
        return sorted(files, key=lambda file: (file.path, file.file_id))

    def check(self) -> None:
        """Request the first page of the folder listing, or if that fails the address list.

        Raises BestiaryError as `list_files` does.
        """

        def first_page() -> list[Entry | RemoteFile]:
            return [*self._request_page(f"/{self.settings.version}", "*", 0)]

        def addresses() -> list[Entry | RemoteFile]:
            return [*self._list_addresses()]

        self._first_that_answers(first_page, addresses)

    def _first_that_answers(self, *listings: Callable[[], list[Listed]]) -> list[Listed]:
        """The result of the first listing that is usable and not empty."""
        problems = []
        for listing in listings:
            try:
                files = listing()
            except OfflineError as error:
                raise BestiaryError(
                    f"{self.api} cannot be reached: {error}. Check the network connection, or {_MIRROR}."
                ) from None
            except SERVICE_ERRORS as error:
                problems.append(reason_of(error))
                continue
            if files:
                return files
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
            return seen - before >= MIN_PROGRESS_BYTES

        self._retrying(file.path, made_progress)(self._fetch_once, file, part, note)
        part.replace(target)

    def _retrying(self, what: str, made_progress: Callable[[], bool] = lambda: False) -> tenacity.Retrying:
        """Retry `settings.retries` times, counted from the last progress; wait as long as Retry-After says.

        Each retry is told in a line that names `what` is asked for.
        """
        last_progress = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal last_progress
            slow = state.outcome is not None and isinstance(state.outcome.exception(), SlowError)
            if made_progress() and not slow:
                last_progress = state.attempt_number
            return self.stop.is_set() or state.attempt_number - last_progress > self.settings.retries

        exponential = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=MAX_PAUSE_SECONDS)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome and state.outcome.exception()
            retry_after = error.retry_after_seconds if isinstance(error, TemporaryError) else None
            return exponential(state) if retry_after is None else min(retry_after, MAX_RETRY_AFTER_SECONDS)

        def announce(state: tenacity.RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            reason = reason_of(error) if error else ""
            retry, seconds = state.attempt_number - last_progress, state.upcoming_sleep
            self._tell(f"{what}: {reason}. Retry {retry} of {self.settings.retries} in {seconds:.0f} s.")

        def is_worth_it(error: BaseException) -> bool:
            return isinstance(error, (TemporaryError, httpx.RequestError))

        def pause(seconds: float) -> None:
            self._sleep(seconds)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_worth_it),
            stop=stop,
            wait=wait,
            sleep=pause,
            before_sleep=announce,
            reraise=True,
        )

    @contextmanager
    def _answer(
        self, method: str, url: str, content: Content | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """Give the answer to a request, its body not read yet. `content` is a GET's query or a POST's JSON.

        Raises OfflineError when there is no connection and never was one.
        """
        sent: dict[str, Content | None] = {"params" if method == "GET" else "json": content}
        try:
            with self.http.stream(method, url, headers=headers, **sent) as response:  # type: ignore[arg-type]
                self._reached = True
                yield response
        except httpx.ConnectError as error:
            if not self._reached and is_offline(error):
                raise OfflineError(reason_of(error)) from None
            raise

    def _chunks(self, response: httpx.Response) -> Iterator[bytes]:
        """Give the bytes of an answer as they come. Raises SlowError when they come too slowly."""
        started, counted = time.monotonic(), 0
        for chunk in response.iter_bytes():
            yield chunk
            counted += len(chunk)
            seconds = time.monotonic() - started
            if seconds >= self.settings.timeout_s:
                if counted < MIN_BYTES_PER_SECOND * seconds:
                    raise SlowError(
                        f"{_address(response)} sends {counted / seconds:.0f} bytes a second; "
                        f"at least {MIN_BYTES_PER_SECOND:.0f} are needed"
                    )
                started, counted = time.monotonic(), 0

    def _read_whole(self, response: httpx.Response, limit: int) -> bytes:
        """Return the body of an answer. Raises PermanentError beyond `limit` bytes, SlowError below the lowest rate."""
        body = bytearray()
        for chunk in self._chunks(response):
            body += chunk
            if len(body) > limit:
                raise PermanentError(
                    f"{_address(response)} sends more than the {limit >> 20} MiB that a listing may have"
                )
        return bytes(body)

    def _list_folders(self) -> list[RemoteFile]:
        """Return the files of all folders, starting from the version's root folder."""
        files: dict[tuple[str, str], RemoteFile] = {}
        seen: set[str] = set()
        self.nameless = 0
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
                    self.nameless += 1
            if len(files) + len(waiting) + len(seen) > MAX_ENTRIES:
                raise PermanentError(f"it has more than {MAX_ENTRIES:,} entries")
        return list(files.values())

    def _list_folder(self, folder: str) -> list[Entry]:
        """Return the entries of a folder, page by page. A server that ignores the page number is an error."""
        entries: dict[tuple[str, str], Entry] = {}
        last, index = "*", 0
        while True:
            page = self._request_page(folder, last, index)
            fresh = {(entry.id, entry.path): entry for entry in page if (entry.id, entry.path) not in entries}
            entries.update(fresh)
            if len(entries) > MAX_ENTRIES:
                raise PermanentError(f"{folder} has more than {MAX_ENTRIES:,} entries")
            # The server may cap the page size at a round number, so such a page may not be the last one.
            if len(page) < PAGE_SIZE and (len(page) % 100 or not fresh):
                return list(entries.values())
            if not fresh:
                raise PermanentError(f"it repeats the first {PAGE_SIZE} entries of {folder} and never shows the others")
            last, index = page[-1].id, index + len(page)

    def _request_page(self, folder: str, last: str, index: int) -> list[Entry]:
        query: Content = {
            "dataSetId": self.settings.dataset_id,
            "version": self.settings.version,
            "path": folder,
            "lastFileId": last,
            "lastIndex": index,
            "pageSize": PAGE_SIZE,
        }

        def request() -> list[Entry]:
            address = f"{self.api}/api/gin-sdb-filetree/public/file/childrenFileListByPath"
            with self._answer("POST", address, query) as response:
                check_status(response)
                return read_page(self._read_whole(response, MAX_PAGE_BYTES), folder)

        return self._retrying(f"the listing of {folder}")(request)

    def _list_addresses(self) -> list[RemoteFile]:
        """Return the files of the plain list of download addresses, without sizes and checksums."""
        query: Content = {
            "dataSetId": self.settings.dataset_id,
            "type": "",
            "version": self.settings.version,
            "global": "en",
        }

        def request() -> list[RemoteFile]:
            with self._answer("GET", f"{self.api}/api/sdb-filetree-service/getAllUrl", query) as response:
                check_status(response)
                text = self._read_whole(response, MAX_ADDRESSES_BYTES).decode("utf-8", "replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if len(lines) > MAX_ENTRIES:
                raise PermanentError(f"it has more than {MAX_ENTRIES:,} entries")
            if not all(line.startswith(("http://", "https://")) and from_address(line).file_id for line in lines):
                raise TemporaryError("it holds lines that are no addresses")
            return [from_address(line) for line in lines]

        return list(
            {(file.file_id, file.path): file for file in self._retrying("the list of addresses")(request)}.values()
        )

    def _fetch_once(self, file: RemoteFile, part: Path, report: Callable[[int], object]) -> None:
        have = size_of(part) or 0
        if have and file.size is not None and have >= file.size:
            if problem_of(file, part, have) is None:
                return
            have = 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        address = f"{self.downloads}/download"
        with self._answer("GET", address, {"fileId": file.file_id}, headers) as response:
            if response.status_code == 416:
                part.unlink(missing_ok=True)
                raise TemporaryError("it has no bytes after those already downloaded")
            check_status(response)
            content_range = response.headers.get("Content-Range", "")
            resumes = response.status_code == 206 and continues(content_range, have, file.size)
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
        limit = _limit(response, have, file)
        digest = None if have or file.md5 is None else hashlib.md5(usedforsecurity=False)
        with part.open("ab" if have else "wb", buffering=_WRITE_BUFFER) as writing:
            for chunk in self._chunks(response):
                if self.stop.is_set():
                    raise PermanentError("stopped")
                have += len(chunk)
                if have > limit:
                    break
                writing.write(chunk)
                if digest:
                    digest.update(chunk)
                report(have)
        if have > limit:
            part.unlink()
            if file.size is None:
                raise PermanentError(f"{_address(response)} sends more than {limit:,} bytes for {file.path}")
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


def _address(response: httpx.Response) -> str:
    """Return where an answer came from, without its query."""
    return printable(str(response.url.copy_with(query=None, userinfo=b""))[:200])


def _limit(response: httpx.Response, have: int, file: RemoteFile) -> int:
    """Return how many bytes the file may have, `have` of which are there, by the listing or else by the answer."""
    if file.size is not None:
        return file.size
    if not kind_of(file.path):
        return MAX_IMAGE_BYTES
    length = response.headers.get("Content-Length", "")
    return min(have + int(length), MAX_BYTES) if length.isdecimal() else MAX_UNSIZED_BYTES


def _host(variable: str, default: str) -> str:
    host = (os.environ.get(variable) or default).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise BestiaryError(f"The environment variable {variable} is {host!r}. Begin it with http:// or https://.")
    return host
