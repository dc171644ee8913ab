"""The 100-animal dataset from Science Data Bank: listed, downloaded and laid out as class folders.

What is down stays in a cache folder, so that a run that was stopped at any moment goes on where it was.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import tenacity
from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from tqdm import tqdm

from bestiary import params
from bestiary.data.archives import OTHER_KINDS, kind_of, unpack
from bestiary.data.folder import check_classes, link, replacing
from bestiary.data.names import class_of, parts, safe_names
from bestiary.errors import BestiaryError
from bestiary.subjects import ANIMALS

API_HOST = "https://www.scidb.cn"
DOWNLOAD_HOST = "https://download.scidb.cn"
PAGE_SIZE = 5000
MAX_DEPTH = 16
FIRST_PAUSE_SECONDS = 1.0  # at most; each further one at most twice as long
MAX_IMAGE_BYTES = 256 * 2**20  # where the listing gives no size
_BUFFER = 2**17  # bytes written at once
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

_MAGIC = (
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
_RETRIED = {403, 408, 425, 429}  # and all 5xx; 403 is what an expired link of a CDN answers

Sleep = Callable[[float], object]


@dataclass(frozen=True)
class RemoteFile:
    """A file of the dataset as its listing has it."""

    file_id: str
    path: str
    size: int | None = None  # bytes
    md5: str | None = None

    @cached_property
    def key(self) -> str:
        """Where the cache keeps it, whichever of the listings names it."""
        return hashlib.sha256(repr((self.file_id, self.path)).encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Downloaded:
    """What a download brought."""

    per_class: dict[str, int]
    fetched_files: int  # the others were in the cache
    missing_files: int
    missing_classes: list[str]
    unknown_classes: list[str]
    refused: list[str]  # paths in archives that were links, devices, or led outside


class _ServiceError(Exception):
    """The service answered with something that is no answer."""

    def __init__(self, reason: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class _FinalError(Exception):
    """The service answered, and asking again will not change it."""


def cache_folder() -> Path:
    """Where downloads are kept: BESTIARY_CACHE, or `bestiary` in the user's cache folder."""
    return Path(os.environ.get("BESTIARY_CACHE") or user_cache_path("bestiary")) / "sciencedb"


def download(
    target: Path,
    settings: params.ScienceDB,
    *,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    cache: Path | None = None,
    sleep: Sleep | None = None,
) -> Downloaded:
    """Bring the dataset to `target`/<class>/<file>, fetching only what the cache does not have.

    Raises BestiaryError when the service cannot be used, when its archives cannot be, when more than
    `settings.allow_missing` of the files cannot be had, and when it is stopped with Ctrl-C.
    """
    cache = cache or cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache), _Service(settings, sleep) as service:
        listing = service.list_files()
        wanted = _select(listing, classes, images_per_class)
        fetched, missing = _fetch_all(service, wanted, cache, settings)
        images, refused = _collect(wanted, missing, cache)
        chosen = _by_class(images, classes, images_per_class)
        unknown = _unknown_classes([*(file.path for file in listing), *(path for path, _ in images)])
        absent = sorted(set(_known(classes).values()) - set(chosen))
        if classes and absent:
            raise BestiaryError(
                f"dataset.classes names {', '.join(absent)}, which the dataset on ScienceDB does not have."
            )
        counts = {name: len(files) for name, files in chosen.items()}
        if not counts:
            raise BestiaryError(f"None of the {len(listing)} files on ScienceDB is an image of one of the 100 animals.")
        check_classes(counts, "the dataset on ScienceDB")
        _lay_out(target, chosen)
    return Downloaded(counts, fetched, len(missing), absent, unknown, refused)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    try:
        with FileLock(cache / "lock", timeout=0):
            yield
    except Timeout:
        raise BestiaryError(f"Another download is using {cache}: wait for it, or set BESTIARY_CACHE.") from None


def _host(variable: str, default: str) -> str:
    host = (os.environ.get(variable) or default).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise BestiaryError(f"{variable} is {host}: it must begin with http:// or https://.")
    return host


class _Service:
    """Science Data Bank over HTTP: never more than `connections` requests at once, each retried."""

    def __init__(self, settings: params.ScienceDB, sleep: Sleep | None) -> None:
        self.settings = settings
        self.stop = threading.Event()
        self._sleep = sleep or self.stop.wait  # Ctrl-C ends the pause
        self.api = _host("SCIENCEDB_API_URL", API_HOST)
        self.downloads = _host("SCIENCEDB_DOWNLOAD_URL", DOWNLOAD_HOST)
        self.client = httpx.Client(
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=settings.connections, max_keepalive_connections=settings.connections),
            follow_redirects=True,
            # Sizes and ranges count the bytes of the file, not of a compressed answer.
            headers={"User-Agent": "bestiary", "Accept-Encoding": "identity"},
        )

    def __enter__(self) -> _Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def retrying(self, made_progress: Callable[[], bool] = lambda: False) -> tenacity.Retrying:
        """Try `retries` times more, counted from the last progress on; wait as long as Retry-After says."""
        last_progress = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal last_progress
            if made_progress():
                last_progress = state.attempt_number
            return self.stop.is_set() or state.attempt_number - last_progress > self.settings.retries

        exponential = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=60)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome and state.outcome.exception()
            asked = error.retry_after_seconds if isinstance(error, _ServiceError) else None
            return exponential(state) if asked is None else min(asked, 600.0)

        def pause(seconds: float) -> None:
            self._sleep(seconds)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((_ServiceError, httpx.RequestError)),
            stop=stop,
            wait=wait,
            sleep=pause,
            reraise=True,
        )

    def list_files(self) -> list[RemoteFile]:
        """All files of the dataset: by the listing with checksums, or else by the plain list of addresses."""
        problems = []
        for listing in (self._list_tree, self._list_addresses):
            try:
                files = listing()
            except (_ServiceError, _FinalError, httpx.HTTPError, httpx.InvalidURL) as error:
                problems.append(_say(error))
                continue
            if files:
                return sorted(files, key=lambda file: (file.path, file.file_id))
            problems.append("it lists no files")
        dataset = f"{self.settings.dataset_id} {self.settings.version}"
        raise BestiaryError(
            f"{self.api} does not list the dataset {dataset}: {problems[0]}; nor its addresses: {problems[1]}."
        )

    def _list_tree(self) -> list[RemoteFile]:
        files: dict[tuple[str, str], RemoteFile] = {}
        seen: set[str] = set()
        waiting = [f"/{self.settings.version}"]
        while waiting:
            folder = waiting.pop()
            if folder in seen:
                continue
            if folder.count("/") > MAX_DEPTH:
                raise _FinalError(f"folders lie deeper than {MAX_DEPTH} levels")
            seen.add(folder)
            for entry in self._list_folder(folder):
                path, file_id = str(entry.get("path") or ""), str(entry.get("id") or "")
                if entry.get("dir") and path:
                    waiting.append(path)
                elif path and file_id:
                    size, md5 = entry.get("size"), str(entry.get("md5") or "").strip().lower()
                    size = size if isinstance(size, int) and size >= 0 else None
                    files[file_id, path] = RemoteFile(file_id, path, size, md5 if len(md5) == 32 else None)
                else:
                    raise _FinalError(f"{folder} has an entry without a path or an id")
        return list(files.values())

    def _list_folder(self, folder: str) -> list[Mapping[str, Any]]:
        """The entries of a folder, page by page. A server that ignores the page it is asked for is an error."""
        entries: dict[str, Mapping[str, Any]] = {}
        last, index = "*", 0
        while True:
            page = self._ask_page(folder, last, index)
            fresh = {f"{entry.get('id')} {entry.get('path')}": entry for entry in page}
            fresh = {key: entry for key, entry in fresh.items() if key not in entries}
            entries.update(fresh)
            # A page of a round length may be one that the server cut: only the next one shows.
            if len(page) < PAGE_SIZE and (len(page) % 100 or not fresh):
                return list(entries.values())
            if not fresh:
                raise _FinalError(f"it repeats the first {PAGE_SIZE} entries of {folder} and never shows the others")
            last, index = str(page[-1].get("id")), index + len(page)

    def _ask_page(self, folder: str, last: str, index: int) -> list[Mapping[str, Any]]:
        question = {
            "dataSetId": self.settings.dataset_id,
            "version": self.settings.version,
            "path": folder,
            "lastFileId": last,
            "lastIndex": index,
            "pageSize": PAGE_SIZE,
        }

        def ask() -> list[Mapping[str, Any]]:
            answer = self.client.post(
                f"{self.api}/api/gin-sdb-filetree/public/file/childrenFileListByPath", json=question
            )
            _check_status(answer)
            try:
                content = answer.json()
            except ValueError:
                raise _ServiceError("the listing is no JSON") from None
            if not isinstance(content, dict) or content.get("code") != 20000:
                detail = content if not isinstance(content, dict) else content.get("message") or content.get("msg")
                code = content.get("code") if isinstance(content, dict) else None
                raise _ServiceError(f"code {code}, {str(detail)[:80]}")
            data = content.get("data")
            if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
                raise _ServiceError(f"no entries for {folder}")
            return data

        return self.retrying()(ask)

    def _list_addresses(self) -> list[RemoteFile]:
        query = {"dataSetId": self.settings.dataset_id, "type": "", "version": self.settings.version, "global": "en"}

        def ask() -> list[RemoteFile]:
            answer = self.client.get(f"{self.api}/api/sdb-filetree-service/getAllUrl", params=query)
            _check_status(answer)
            lines = [line.strip() for line in answer.content.decode("utf-8", "replace").splitlines() if line.strip()]
            if not all(line.startswith(("http://", "https://")) and _from_address(line).file_id for line in lines):
                raise _ServiceError("the list of addresses holds something else")
            return [_from_address(line) for line in lines]

        return list({(file.file_id, file.path): file for file in self.retrying()(ask)}.values())

    def fetch(self, file: RemoteFile, target: Path, report: Callable[[int], object]) -> None:
        """Bring a file to `target` through `target`.part, which a later call continues; `report` gets its bytes."""
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

        self.retrying(made_progress)(self._fetch_once, file, part, note)
        part.replace(target)

    def _fetch_once(self, file: RemoteFile, part: Path, report: Callable[[int], object]) -> None:
        have = _size(part) or 0
        if have and file.size is not None and have >= file.size:
            if _problem(file, part, have) is None:
                return
            have = 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        address = f"{self.downloads}/download"
        with self.client.stream("GET", address, params={"fileId": file.file_id}, headers=headers) as answer:
            if answer.status_code == 416:
                part.unlink(missing_ok=True)
                raise _ServiceError("it has nothing after what is already here")
            _check_status(answer)
            continues = answer.status_code == 206 and _fits(answer.headers.get("Content-Range", ""), have, file.size)
            if answer.status_code == 206 and not continues:
                part.unlink(missing_ok=True)
                raise _ServiceError("it sent another part of the file than was asked for")
            size, md5 = self._store(answer, part, have if continues else 0, file, report)
        problem = _problem(file, part, size, md5)
        if problem:
            part.unlink()
            raise _ServiceError(problem)

    def _store(
        self, answer: httpx.Response, part: Path, have: int, file: RemoteFile, report: Callable[[int], object]
    ) -> tuple[int, str | None]:
        """Write the answer behind the `have` bytes of `part`; how many there are then, and the md5 of the whole, where
        it is needed and known."""
        limit = file.size if file.size is not None else None if kind_of(file.path) else MAX_IMAGE_BYTES
        digest = None if have or file.md5 is None else hashlib.md5(usedforsecurity=False)
        with part.open("ab" if have else "wb", buffering=_BUFFER) as writing:
            for chunk in answer.iter_bytes():
                if self.stop.is_set():
                    raise _FinalError("stopped")
                have += len(chunk)
                if limit is not None and have > limit:
                    break  # too long: what is there fails the check of its size
                writing.write(chunk)
                if digest:
                    digest.update(chunk)
                report(have)
        if limit is not None and have > limit:
            part.unlink()
            raise _ServiceError(f"it is longer than {limit} bytes")
        return have, digest.hexdigest() if digest else None


def _check_status(answer: httpx.Response) -> None:
    status = answer.status_code
    if status in _RETRIED or status >= 500:
        raise _ServiceError(f"HTTP {status}", _retry_after(answer.headers.get("Retry-After")))
    if status not in (200, 206):
        raise _FinalError(f"HTTP {status}")


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a header that holds seconds or a date."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _fits(content_range: str, have: int, size: int | None) -> bool:
    """Whether a Content-Range such as "bytes 100-199/200" goes on exactly where the part ends."""
    unit, _, rest = content_range.partition(" ")
    span, _, total = rest.partition("/")
    first, _, last = span.partition("-")
    if unit != "bytes" or not (first.isdigit() and last.isdigit()) or int(first) != have:
        return False
    return not total.isdigit() or (int(last) + 1 == int(total) and (size is None or int(total) == size))


def _size(path: Path) -> int | None:
    """In bytes; None where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _problem(file: RemoteFile, part: Path, size: int, md5: str | None = None) -> str | None:
    """What is wrong with a finished file: by its size and md5 where they are listed, by its first bytes otherwise.

    `size` and `md5` are the file's, the latter where the caller knows it.
    """
    if file.size is not None and size != file.size:
        return f"it has {size} bytes instead of {file.size}"
    if file.md5 is not None:
        if md5 is None:
            with part.open("rb") as reading:
                md5 = hashlib.file_digest(reading, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return None if md5 == file.md5 else "its md5 is wrong"
    with part.open("rb") as reading:
        head = reading.read(512)
    is_tar = head[257:262] == b"ustar" or kind_of(file.path) in (".tar.xz", ".txz")
    if file.size is None and not (head.startswith(_MAGIC) or is_tar or head[4:8] == b"ftyp"):
        return "it is no image and no archive"
    return None


def _from_address(line: str) -> RemoteFile:
    # Not urllib's parse_qs: a path that comes raw may hold any of &, = and +.
    found = dict(_QUERY.findall(line.partition("?")[2]))
    return RemoteFile(found.get("fileId", ""), unquote(found.get("path", "")))


def _select(
    listing: Sequence[RemoteFile], classes: Sequence[str] | None, images_per_class: int | None
) -> list[RemoteFile]:
    """The files to fetch. Class folders are found wherever they are; archives are all fetched, since what they hold
    shows when they are open. Raises BestiaryError when there are only archives of a kind that cannot be unpacked.
    """
    known = _known(classes)
    selected: list[RemoteFile] = []
    others: list[str] = []
    taken: Counter[str] = Counter()
    for file in listing:
        if kind_of(file.path):
            selected.append(file)
        elif kind_of(file.path, OTHER_KINDS):
            others.append(file.path)
        elif _is_image(file.path):
            name = class_of(file.path, known)
            if name and (images_per_class is None or taken[name] < images_per_class):
                taken[name] += 1
                selected.append(file)
    if not selected and others:
        raise BestiaryError(
            f"The dataset comes as {', '.join(others[:3])}, which cannot be unpacked here: "
            "download and unpack it by hand into data/<class>/<file> and set dataset.source to folder."
        )
    return selected


def _is_image(path: str) -> bool:
    """By its name, and none of the `._name.jpg` that a Mac puts into an archive beside each `name.jpg`."""
    return path.casefold().endswith(IMAGE_SUFFIXES) and not parts(path)[-1].startswith("._")


def _unknown_classes(paths: Iterable[str]) -> list[str]:
    """The folders of images that are none of the 100 classes."""
    known = _known(None)
    strange = (path for path in paths if _is_image(path) and class_of(path, known) is None)
    return sorted({folder for path in strange for folder in parts(path)[-2:-1]})


def _known(classes: Sequence[str] | None) -> dict[str, str]:
    return {name.casefold(): name for name in (classes or [animal.folder for animal in ANIMALS])}


def _fetch_all(
    service: _Service, wanted: Sequence[RemoteFile], cache: Path, settings: params.ScienceDB
) -> tuple[int, dict[RemoteFile, str]]:
    """Fetch what the cache does not have: how many files that was, and those that cannot be had, and why."""
    todo = _not_in(cache, wanted)
    failed: dict[RemoteFile, str] = {}
    sized = all(file.size is not None for file in todo)
    total = sum(file.size or 0 for file in todo) if sized else None
    done, lock = len(wanted) - len(todo), threading.Lock()
    for folder in {_cached(cache, file).parent for file in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    with tqdm(
        desc=f"download {done}/{len(wanted)} files", total=total, unit="B", unit_scale=True, mininterval=0.5
    ) as bar:

        def fetch(file: RemoteFile) -> None:
            counted = 0

            def report(there: int) -> None:
                nonlocal counted
                with lock:
                    bar.update(there - counted)
                counted = there

            if not service.stop.is_set():
                service.fetch(file, _cached(cache, file), report)

        pool = ThreadPoolExecutor(settings.connections, thread_name_prefix="download")
        try:
            running = {pool.submit(fetch, file): file for file in todo}
            for future in as_completed(running):
                error = future.exception()
                if isinstance(error, (_ServiceError, _FinalError, httpx.HTTPError, httpx.InvalidURL)):
                    failed[running[future]] = _say(error)
                elif error is not None:
                    raise error
                done += 1
                if not sized:  # as large as those that are there, for the time left
                    bar.total = bar.n * len(todo) // (done - len(wanted) + len(todo))
                bar.set_description_str(f"download {done}/{len(wanted)} files", refresh=False)
        except BaseException as error:
            service.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise BestiaryError(
                    f"Stopped with {done} of {len(wanted)} files, kept in {cache}: run the same again to go on."
                ) from None
            raise
        pool.shutdown()
    _check_missing(failed, len(wanted), cache, settings)
    return len(todo) - len(failed), failed


def _check_missing(failed: Mapping[RemoteFile, str], total: int, cache: Path, settings: params.ScienceDB) -> None:
    path = cache / "missing.csv"
    path.unlink(missing_ok=True)
    if not failed:
        return
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(["path", "file_id", "reason"])
        table.writerows(sorted((missing.path, missing.file_id, reason) for missing, reason in failed.items()))
    if len(failed) > settings.allow_missing * total:
        raise BestiaryError(
            f"{len(failed)} of {total} files could not be had ({next(iter(failed.values()))}); {path} lists them. "
            "Run the same again to try only those, or set dataset.sciencedb.allow_missing."
        )


def _cached(cache: Path, file: RemoteFile) -> Path:
    return cache / "files" / file.key[:2] / file.key


def _not_in(cache: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Those of `files` that the cache lacks, or holds with other content than is listed now."""

    if not (cache / "files").exists():
        return list(files)

    def is_there(file: RemoteFile) -> bool:
        path = _cached(cache, file)
        size = _size(path)
        return size is not None and _problem(file, path, size) is None

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        checked = tqdm(pool.map(is_there, files), "check", len(files), leave=False, unit="file")
        return [file for file, there in zip(files, checked, strict=True) if not there]


def _collect(
    wanted: Sequence[RemoteFile], missing: Mapping[RemoteFile, str], cache: Path
) -> tuple[list[tuple[str, Path]], list[str]]:
    """(path in the dataset, file in the cache) of every image, those in archives included; and what was refused."""
    images: list[tuple[str, Path]] = []
    refused: list[str] = []
    for file in wanted:
        if file in missing:
            continue
        kind = kind_of(file.path)
        if kind is None:
            images.append((file.path, _cached(cache, file)))
            continue
        try:
            archive = _cached(cache, file)
            inside, bad = unpack(archive, cache / "unpacked" / f"{file.key}-{archive.stat().st_mtime_ns}", kind)
        except BestiaryError as error:
            raise BestiaryError(str(error).replace(file.key, file.path)) from None
        images += [(f"{file.path[: -len(kind)]}/{path}", found) for path, found in inside]
        refused += bad
    return [(path, found) for path, found in images if _is_image(path)], sorted(refused)


def _by_class(
    images: Iterable[tuple[str, Path]], classes: Sequence[str] | None, images_per_class: int | None
) -> dict[str, list[tuple[str, Path]]]:
    """The images of each class folder, the first `images_per_class` of them in the order of their paths."""
    known = _known(classes)
    found: defaultdict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path, file in images:
        name = class_of(path, known)
        if name:
            found[name].append((path, file))
    return {name: sorted(found[name])[:images_per_class] for name in sorted(found)}


def _lay_out(target: Path, chosen: Mapping[str, Sequence[tuple[str, Path]]]) -> None:
    with replacing(target) as fresh:
        for name, files in tqdm(chosen.items(), desc="link", unit="class"):
            (fresh / name).mkdir()
            for safe, (_, file) in zip(safe_names(path for path, _ in files), files, strict=True):
                link(file, fresh / name / safe)


def _say(error: BaseException) -> str:
    return str(error) or type(error).__name__
