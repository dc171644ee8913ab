"""The 100-animal dataset from Science Data Bank: downloaded into a cache, and laid out as class folders.

The cache keeps every finished and unfinished file, so a download that was stopped at any moment resumes.
"""

from __future__ import annotations

import csv
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from tqdm import tqdm

from bestiary import params
from bestiary.data.archives import OTHER_KINDS, kind_of, unpack
from bestiary.data.folder import check_classes, link, replacing
from bestiary.data.images import EXTENSIONS
from bestiary.data.listing import LeftOut, write_left_out
from bestiary.data.names import class_of, parts, safe_names
from bestiary.data.sciencedb_answers import SERVICE_ERRORS, RemoteFile, reason_of
from bestiary.data.sciencedb_client import Client, Sleep, Tell, problem_of, size_of
from bestiary.errors import BestiaryError
from bestiary.subjects import ANIMALS

IMAGE_SUFFIXES = tuple(sorted({suffix for suffixes in EXTENSIONS.values() for suffix in suffixes}))


@dataclass(frozen=True)
class Downloaded:
    """What a download gave."""

    per_class: dict[str, int]  # images
    fetched_files: int  # the other files were in the cache
    missing_files: int
    missing_classes: list[str]
    unknown_classes: list[str]
    refused: list[str]  # paths in archives that are links or devices, or that lead outside
    left_out: list[LeftOut]  # entries of the listing and files in archives that are not used


def cache_folder() -> Path:
    """Return the folder for downloads: below BESTIARY_CACHE, or below `bestiary` in the user's cache folder."""
    return Path(os.environ.get("BESTIARY_CACHE") or user_cache_path("bestiary")) / "sciencedb"


def download(
    target: Path,
    settings: params.ScienceDB,
    *,
    classes: Sequence[str] | None = None,
    images_per_class: int | None = None,
    cache: Path | None = None,
    sleep: Sleep | None = None,
    tell: Tell | None = None,
) -> Downloaded:
    """Download the dataset to `target`/<class>/<file>, fetching only what the cache does not have.

    `tell` gets a line for each retry.

    Raises BestiaryError when the service or one of its archives cannot be used, when more than
    `settings.allow_missing` of the files cannot be downloaded, and when Ctrl-C stops it.
    """
    cache = cache or cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache), Client(settings, sleep, tell) as client:
        listing = client.list_files()
        wanted = _select(listing, classes, images_per_class)
        fetched, missing = _fetch_all(client, wanted, cache)
        _check_missing(missing, len(wanted), cache, settings.allow_missing)
        images, refused, unused = _collect(wanted, missing, cache)
        left_out = [*_left_out(file.path for file in listing), *_left_out(unused)]
        left_out += [LeftOut("", "", "listed without a path or an id", "")] * client.nameless
        chosen = _by_class(images, classes, images_per_class)
        unknown = _unknown_classes([*(file.path for file in listing), *(path for path, _ in images)])
        absent = sorted(set(_class_names(classes).values()) - set(chosen))
        if classes and absent:
            raise BestiaryError(
                f"dataset.classes names {', '.join(absent)}, but the dataset on ScienceDB has no images of this class. "
                "Correct the name or remove it."
            )
        counts = {name: len(files) for name, files in chosen.items()}
        if not counts:
            raise BestiaryError(
                f"None of the {len(listing)} files of {settings.dataset_id} on ScienceDB is an image of one of the 100 "
                "animals. Check dataset.sciencedb.dataset_id."
            )
        check_classes(counts, "in the dataset on ScienceDB")
        _lay_out(target, chosen, left_out)
    return Downloaded(counts, fetched, len(missing), absent, unknown, refused, left_out)


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    try:
        with FileLock(cache / "lock", timeout=0):
            yield
    except Timeout:
        raise BestiaryError(
            f"Another download is using the cache {cache}. Wait until it ends, or set BESTIARY_CACHE to another folder."
        ) from None


def _select(
    listing: Sequence[RemoteFile], classes: Sequence[str] | None, images_per_class: int | None
) -> list[RemoteFile]:
    """Return the files to fetch: images in class folders at any depth, and all archives.

    Archives are all fetched because only their content shows which classes they hold. Raises BestiaryError when there
    are only archives that cannot be unpacked.
    """
    known = _class_names(classes)
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
            f"The dataset on ScienceDB comes as {', '.join(others[:3])}, which bestiary cannot unpack. Download and "
            "unpack it by hand into data/<class>/<file>, and set dataset.source to folder."
        )
    return selected


def _is_image(path: str) -> bool:
    """Judge by the name. Archives made on a Mac hold a `._name.jpg` beside each `name.jpg`, which is not an image."""
    return path.casefold().endswith(IMAGE_SUFFIXES) and not parts(path)[-1].startswith("._")


def _left_out(paths: Iterable[str]) -> list[LeftOut]:
    """Return the paths that no settings could make an image of a class, each with the reason."""
    known = _class_names(None)
    found = []
    for path in paths:
        if kind_of(path, OTHER_KINDS) and not kind_of(path):
            found.append(LeftOut(path, "", "an archive of a kind that bestiary cannot unpack", ""))
        elif not kind_of(path) and not _is_image(path):
            found.append(LeftOut(path, class_of(path, known) or "", "not an image", ""))
        elif _is_image(path) and class_of(path, known) is None:
            found.append(LeftOut(path, "", "in no folder of the 100 animals", ""))
    return found


def _unknown_classes(paths: Iterable[str]) -> list[str]:
    """Return the folders that hold images but are none of the 100 classes."""
    known = _class_names(None)
    strange = (path for path in paths if _is_image(path) and class_of(path, known) is None)
    return sorted({folder for path in strange for folder in parts(path)[-2:-1]})


def _class_names(classes: Sequence[str] | None) -> dict[str, str]:
    """Map casefolded names to class folders, of `classes` or of all 100."""
    return {name.casefold(): name for name in (classes or [animal.folder for animal in ANIMALS])}


def _fetch_all(client: Client, wanted: Sequence[RemoteFile], cache: Path) -> tuple[int, dict[RemoteFile, str]]:
    """Fetch what the cache lacks; return how many files that was, and why each of the others could not be fetched."""
    todo = _not_cached(cache, wanted)
    failed: dict[RemoteFile, str] = {}
    all_sized = all(file.size is not None for file in todo)
    total = sum(file.size or 0 for file in todo) if all_sized else None
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

            if not client.stop.is_set():
                client.fetch(file, _cached(cache, file), report)

        pool = ThreadPoolExecutor(client.settings.connections, thread_name_prefix="download")
        try:
            running = {pool.submit(fetch, file): file for file in todo}
            for future in as_completed(running):
                error = future.exception()
                if isinstance(error, SERVICE_ERRORS):
                    failed[running[future]] = reason_of(error)
                elif error is not None:
                    raise error
                done += 1
                if not all_sized:  # estimate the total from the files that are done, for the remaining time
                    bar.total = bar.n * len(todo) // (done - len(wanted) + len(todo))
                bar.set_description_str(f"download {done}/{len(wanted)} files", refresh=False)
        except BaseException as error:
            client.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                raise BestiaryError(
                    f"The download was stopped after {done} of {len(wanted)} files, which are in {cache}. "
                    "Run the same command again to resume."
                ) from None
            raise
        pool.shutdown()
    return len(todo) - len(failed), failed


def _check_missing(missing: Mapping[RemoteFile, str], total: int, cache: Path, allow_missing: float) -> None:
    """List the missing files in `cache`/missing.csv. Raises BestiaryError when they exceed the allowed share."""
    path = cache / "missing.csv"
    path.unlink(missing_ok=True)
    if not missing:
        return
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.writer(file)
        table.writerow(["path", "file_id", "reason"])
        table.writerows(sorted((file.path, file.file_id, reason) for file, reason in missing.items()))
    if len(missing) > allow_missing * total:
        raise BestiaryError(
            f"{len(missing)} of {total} files could not be downloaded ({next(iter(missing.values()))}), more than "
            f"dataset.sciencedb.allow_missing = {allow_missing} allows. {path} lists them. Run the same command again "
            "to retry only these files, or raise dataset.sciencedb.allow_missing."
        )


def _cached(cache: Path, file: RemoteFile) -> Path:
    return cache / "files" / file.key[:2] / file.key


def _not_cached(cache: Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Return the files that the cache lacks, or whose cached content differs from the current listing."""
    if not (cache / "files").exists():
        return list(files)

    def is_cached(file: RemoteFile) -> bool:
        path = _cached(cache, file)
        size = size_of(path)
        return size is not None and problem_of(file, path, size) is None

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        checked = tqdm(pool.map(is_cached, files), "check downloaded files", len(files), leave=False, unit="file")
        return [file for file, cached in zip(files, checked, strict=True) if not cached]


def _collect(
    wanted: Sequence[RemoteFile], missing: Mapping[RemoteFile, str], cache: Path
) -> tuple[list[tuple[str, Path]], list[str], list[str]]:
    """Return (path in the dataset, file in the cache) of every image, also of those in archives.

    Also returns the paths in archives that were refused, and those in archives that are no images of a class.
    """
    images: list[tuple[str, Path]] = []
    refused: list[str] = []
    unused: list[str] = []
    known = _class_names(None)
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
        unpacked = [(f"{file.path[: -len(kind)]}/{path}", found) for path, found in inside]
        images += [(path, found) for path, found in unpacked if _is_image(path)]
        unused += [path for path, _ in unpacked if not _is_image(path) or class_of(path, known) is None]
        refused += bad
    return images, sorted(refused), sorted(unused)


def _by_class(
    images: Iterable[tuple[str, Path]], classes: Sequence[str] | None, images_per_class: int | None
) -> dict[str, list[tuple[str, Path]]]:
    """Return the images of each class folder, sorted by path, the first `images_per_class` of them."""
    known = _class_names(classes)
    found: defaultdict[str, list[tuple[str, Path]]] = defaultdict(list)
    for path, file in images:
        name = class_of(path, known)
        if name:
            found[name].append((path, file))
    return {name: sorted(found[name])[:images_per_class] for name in sorted(found)}


def _lay_out(target: Path, chosen: Mapping[str, Sequence[tuple[str, Path]]], left_out: Sequence[LeftOut]) -> None:
    with replacing(target) as fresh:
        write_left_out(fresh, left_out)
        for name, files in tqdm(chosen.items(), desc="link images", unit="class"):
            (fresh / name).mkdir()
            for safe, (_, file) in zip(safe_names(path for path, _ in files), files, strict=True):
                link(file, fresh / name / safe)
