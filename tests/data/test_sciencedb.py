import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
from filelock import FileLock
from support.archives import ARCHIVE_KINDS, make_archive
from support.sciencedb_server import HTML, ScienceDB, serving

from bestiary import params
from bestiary.data import sciencedb_client
from bestiary.data.listing import read_left_out
from bestiary.data.sciencedb import Downloaded, download
from bestiary.errors import BestiaryError

SETTINGS = params.ScienceDB(dataset_id="abc", version="V1", connections=4, retries=3, timeout_s=1.0, allow_missing=0.0)


def image(name: str, size: int = 2000) -> bytes:
    """Return bytes that start like a JPEG."""
    return b"\xff\xd8\xff\xe0" + random.Random(name).randbytes(size)


def dataset(count: int = 3) -> dict[str, bytes]:
    paths = [f"/V1/Animal/{name}/{name} {number} 图.jpg" for name in ("cat", "owl") for number in range(count)]
    return {"/V1/readme.txt": b"hello", **{path: image(path) for path in paths}}


Serve = Callable[[dict[str, bytes]], AbstractContextManager[ScienceDB]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Start a server for files and point the client at it."""

    @contextmanager
    def start(files: dict[str, bytes]) -> Iterator[ScienceDB]:
        with serving(files) as server:
            monkeypatch.setenv("SCIENCEDB_API_URL", server.url)
            monkeypatch.setenv("SCIENCEDB_DOWNLOAD_URL", server.url)
            yield server

    return start


@pytest.fixture
def server(serve: Serve) -> Iterator[ScienceDB]:
    with serve(dataset()) as server:
        yield server


class Run:
    """Downloads into a folder, and records pauses instead of sleeping."""

    def __init__(self, folder: Path) -> None:
        self.target, self.cache = folder / "raw", folder / "cache"
        self.pauses: list[float] = []
        self.lines: list[str] = []  # what the user was told

    def __call__(
        self,
        settings: params.ScienceDB = SETTINGS,
        classes: Sequence[str] | None = None,
        images_per_class: int | None = None,
    ) -> Downloaded:
        return download(
            self.target,
            settings,
            classes=classes,
            images_per_class=images_per_class,
            cache=self.cache,
            sleep=self.pauses.append,
            tell=self.lines.append,
        )

    @property
    def tree(self) -> dict[str, bytes]:
        return {path.relative_to(self.target).as_posix(): path.read_bytes() for path in self.target.glob("*/*")}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def expected(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"/".join(path.split("/")[-2:]): content for path, content in files.items() if path.endswith("jpg")}


def test_the_dataset_is_laid_out_as_class_folders(server: ScienceDB, run: Run) -> None:
    downloaded = run()
    assert run.tree == expected(server.files)
    assert downloaded.per_class == {"cat": 3, "owl": 3}
    assert downloaded.missing_files == 0
    assert len(downloaded.missing_classes) == 98
    assert "tiger" in downloaded.missing_classes


def test_a_second_run_fetches_nothing(server: ScienceDB, run: Run) -> None:
    run()
    before = server.requests.total()
    run()
    assert server.requests.total() == before
    assert run.tree == expected(server.files)


def test_a_file_that_has_changed_is_fetched_again(server: ScienceDB, run: Run) -> None:
    run()
    path = "/V1/Animal/cat/cat 0 图.jpg"
    server.files[path] = image("another")
    run()
    assert run.tree["cat/cat 0 图.jpg"] == image("another")


def test_a_cached_file_that_was_damaged_is_fetched_again(server: ScienceDB, run: Run) -> None:
    run()
    damaged = next(
        path for path in (run.cache / "files").glob("*/*") if path.read_bytes() == image("/V1/Animal/cat/cat 1 图.jpg")
    )
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.unlink()  # it may be the same file as the one in build/raw
    damaged.write_bytes(content)
    assert run().fetched_files == 1
    assert run.tree == expected(server.files)


def test_both_listings_share_the_cache(server: ScienceDB, run: Run) -> None:
    assert run().fetched_files == 6
    server.folder_faults = ["always 50000"]
    assert run().fetched_files == 0
    server.folder_faults.clear()
    assert run().fetched_files == 0
    assert server.requests.total() == 6


def test_the_address_list_is_the_fallback_of_the_folder_listing(server: ScienceDB, run: Run) -> None:
    server.folder_faults = ["always 50000"]
    run()
    assert run.tree == expected(server.files)


@pytest.mark.parametrize("fault", ["null", "50000", "html", "500", "503", "429", "429 after", "hang up", "hang"])
def test_a_failed_listing_is_retried(server: ScienceDB, run: Run, fault: str) -> None:
    server.listing_faults = [fault, fault]
    run()
    assert run.tree == expected(server.files)
    assert len(run.pauses) == 2


def test_without_any_listing_the_error_names_the_dataset_and_the_reason(server: ScienceDB, run: Run) -> None:
    server.listing_faults = ["always 50000"]
    with pytest.raises(BestiaryError, match=r"abc.*V1.*code 50000, internal error.*no addresses") as e:
        run()
    assert "\n" not in str(e.value)
    assert not run.target.exists()


def test_an_unknown_version_is_named(server: ScienceDB, run: Run) -> None:
    server.files.clear()
    server.ids.clear()
    with pytest.raises(BestiaryError, match=r"version V9.*dataset\.sciencedb\.version"):
        run(settings=SETTINGS.model_copy(update={"version": "V9"}))


def test_pages_are_joined(server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sciencedb_client, "PAGE_SIZE", 2)
    run()
    assert run.tree == expected(server.files)


def test_pages_that_the_server_caps_are_joined(run: Run, serve: Serve) -> None:
    with serve(dataset(130)) as server:
        server.max_page = 100
        assert run().per_class == {"cat": 130, "owl": 130}


def test_a_server_that_repeats_a_page_neither_hangs_the_download_nor_loses_files(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sciencedb_client, "PAGE_SIZE", 2)
    server.paging = "repeats"
    run()  # falls back to the address list
    assert run.tree == expected(server.files)
    server.listing_faults = []
    server.ids.clear()
    with pytest.raises(BestiaryError, match="repeats the first 2 entries"):
        run()


@pytest.mark.parametrize(
    "fault", ["500", "503", "429", "403", "html", "truncate", "wrong", "hang up", "wrong range", "hang"]
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_failed_download_is_retried(server: ScienceDB, run: Run, fault: str, ranges: bool) -> None:
    server.ranges = ranges
    path = "/V1/Animal/cat/cat 1 图.jpg"
    server.faults[path] = ["truncate", fault]
    run()
    assert run.tree == expected(server.files)
    assert server.requests[path] in (2, 3)


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("sizes", [True, False])
def test_an_error_page_is_never_taken_for_a_file(server: ScienceDB, run: Run, md5: bool, sizes: bool) -> None:
    server.md5, server.sizes = md5, sizes
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["html", "html"]
    run()
    assert HTML not in run.tree.values()
    assert run.tree == expected(server.files)


def test_retries_of_a_file_that_is_always_damaged_end(server: ScienceDB, run: Run) -> None:
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["truncate", "wrong"] * 50
    with pytest.raises(BestiaryError, match="1 of 6 files"):
        run()
    assert len(run.pauses) < 10


def test_retry_after_is_obeyed(server: ScienceDB, run: Run) -> None:
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["429 after"]
    run()
    assert run.pauses == [7.0]


@pytest.mark.parametrize(("seconds", "least", "most"), [(90, 60, 90), (-90, 0, 0), (9_000, 600, 600)])
def test_retry_after_may_be_a_date_and_is_limited(
    server: ScienceDB, run: Run, seconds: float, least: float, most: float
) -> None:
    server.retry_after = formatdate(time.time() + seconds, usegmt=True)
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["429 after"]
    run()
    (pause,) = run.pauses
    assert least <= pause <= most


def test_a_partial_download_resumes(server: ScienceDB, run: Run) -> None:
    path = "/V1/Animal/cat/cat 1 图.jpg"
    server.files[path] = image(path, 400_000)
    server.faults[path] = ["truncate"]
    run()
    assert run.tree == expected(server.files)
    assert len(server.ranges_requested) == 1
    assert server.served[path] < 1.2 * len(server.files[path])


QUICK = SETTINGS.model_copy(update={"retries": 1, "timeout_s": 0.2})


@pytest.mark.parametrize("fault", ["endless", "drip"])
def test_a_listing_without_end_is_given_up_and_the_address_and_the_limit_are_named(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(sciencedb_client, "MAX_PAGE_BYTES", 2**20)
    monkeypatch.setattr(sciencedb_client, "MAX_ADDRESSES_BYTES", 2**20)
    server.listing_faults = [f"always {fault}"]
    limit = "more than the 1 MiB" if fault == "endless" else "bytes a second; at least 512 are needed"
    with pytest.raises(BestiaryError, match=rf"{server.url}/api/gin.*{limit}.*{server.url}/api/sdb.*{limit}"):
        run(settings=QUICK)
    assert not run.target.exists()


def test_a_listing_of_endlessly_many_pages_or_folders_is_given_up(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sciencedb_client, "MAX_ENTRIES", 5)
    with pytest.raises(BestiaryError, match=r"more than 5 entries.*more than 5 entries"):
        run()


@pytest.mark.parametrize("size", [None, 2000])
def test_a_file_that_comes_at_a_few_bytes_a_second_is_given_up(server: ScienceDB, run: Run, size: int | None) -> None:
    server.sizes = server.md5 = size is not None
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["always drip"]
    with pytest.raises(BestiaryError, match=r"1 of 6 files.*bytes a second; at least 512 are needed"):
        run(settings=QUICK)
    assert server.requests["/V1/Animal/cat/cat 1 图.jpg"] == 2  # the bytes that came are no progress


def test_an_archive_of_unknown_size_without_end_is_given_up(
    run: Run, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sciencedb_client, "MAX_UNSIZED_BYTES", 2**20)
    with serve({"/V1/Animal.zip": b"PK\x03\x04"}) as server:
        server.sizes = server.md5 = False
        server.faults["/V1/Animal.zip"] = ["always endless"]
        with pytest.raises(
            BestiaryError, match=rf"{server.url}/cdn sends more than 1,048,576 bytes for /V1/Animal\.zip"
        ):
            run()
    assert sum(path.stat().st_size for path in run.cache.rglob("*") if path.is_file()) < 2**20


def test_an_archive_may_have_the_size_that_its_answer_names(
    run: Run, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sciencedb_client, "MAX_UNSIZED_BYTES", 2**10)
    files = {path.removeprefix("/V1/"): content for path, content in dataset(2).items()}
    with serve({"/V1/Animal.zip": make_archive(".zip", files)}) as server:
        server.sizes = server.md5 = False
        assert run().per_class == {"cat": 2, "owl": 2}


def test_each_retry_is_told_with_its_reason(server: ScienceDB, run: Run) -> None:
    server.listing_faults = ["503"]
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["429 after", "hang up"]
    run()
    listing, limited, lost = run.lines
    assert listing.startswith("the listing of /V1: HTTP 503. Retry 1 of 3 in ")
    assert limited == "/V1/Animal/cat/cat 1 图.jpg: HTTP 429. Retry 1 of 3 in 7 s."
    assert "the connection ended before the answer did. Retry 2 of 3 in " in lost


def test_without_a_network_the_download_says_so_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCIENCEDB_API_URL", "http://scidb.invalid")

    def offline(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    with pytest.raises(
        BestiaryError, match=r"http://scidb\.invalid cannot be reached: .*no network.*SCIENCEDB_API_URL"
    ):
        run()
    assert run.pauses == []


def test_a_network_that_fails_in_the_middle_is_waited_for(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = socket.getaddrinfo, list[str]()

    def sometimes(host: str, *arguments: object, **named: object) -> object:
        if host == "localhost" and not failed:
            failed.append(host)
            raise socket.gaierror(-3, "Temporary failure in name resolution")
        return real(host, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", sometimes)
    monkeypatch.setenv("SCIENCEDB_DOWNLOAD_URL", server.url.replace("127.0.0.1", "localhost"))
    run()
    assert run.tree == expected(server.files)
    assert len(run.lines) == 1
    assert "no network" in run.lines[0]


def test_what_the_listing_has_beside_the_images_is_counted_by_its_reason(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("/V1/Animal/dragon/1.jpg", image("dragon"))
    server.add("/V1/more.rar", b"Rar!")
    page = [{"id": file_id, "path": path, "size": len(server.files[path])} for file_id, path in server.ids.items()]
    monkeypatch.setattr(server, "page", [*page, {"id": "7"}, {"path": "/V1/Animal/cat/8.jpg"}])
    downloaded = run()
    assert downloaded.per_class == {"cat": 3, "owl": 3}
    assert Counter(each.kind for each in downloaded.left_out) == {
        "not an image": 1,
        "in no folder of the 100 animals": 1,
        "an archive of a kind that bestiary cannot unpack": 1,
        "listed without a path or an id": 2,
    }
    assert sum(each.path == "/V1/readme.txt" for each in read_left_out(run.target)) == 1


def test_requests_at_once_are_limited_by_connections(run: Run, serve: Serve) -> None:
    with serve(dataset(40)) as server:
        server.bytes_per_second = 100_000
        run()
        assert 1 < server.max_at_once <= 4


def test_missing_files_end_the_run_and_are_listed(server: ScienceDB, run: Run) -> None:
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["always 404"]
    server.faults["/V1/Animal/owl/owl 1 图.jpg"] = ["always 500"]
    with pytest.raises(BestiaryError, match=r"2 of 6 files.*dataset\.sciencedb\.allow_missing = 0\.0.*missing\.csv"):
        run()
    rows = list(csv.DictReader((run.cache / "missing.csv").open(encoding="utf-8")))
    assert [(row["path"].split("/")[-2], row["reason"]) for row in rows] == [("cat", "HTTP 404"), ("owl", "HTTP 500")]
    assert not run.target.exists()
    server.faults.clear()
    run()
    assert run.tree == expected(server.files)
    assert not (run.cache / "missing.csv").exists()


def test_a_share_of_missing_files_can_be_allowed(server: ScienceDB, run: Run) -> None:
    server.faults["/V1/Animal/cat/cat 1 图.jpg"] = ["always 404"]
    downloaded = run(settings=SETTINGS.model_copy(update={"allow_missing": 0.2}))
    assert downloaded.missing_files == 1
    assert downloaded.per_class == {"cat": 2, "owl": 3}


def test_classes_and_images_can_be_limited(server: ScienceDB, run: Run) -> None:
    server.files["/V1/Animal/pig/1.jpg"] = image("pig")
    downloaded = run(classes=["cat", "owl"], images_per_class=2)
    assert downloaded.per_class == {"cat": 2, "owl": 2}
    assert server.requests.total() == 4
    with pytest.raises(BestiaryError, match=r"dataset\.classes names tiger"):
        run(classes=["cat", "tiger"])


@pytest.mark.parametrize("top", ["/V1", "/V1/Animal/Animal", "/V1/a/b c/数据"])
def test_class_folders_are_found_at_any_depth(run: Run, serve: Serve, top: str) -> None:
    files = {path.replace("/V1/Animal", top): content for path, content in dataset().items()}
    with serve(files):
        run()
        assert run.tree == expected(dataset())


def test_unknown_class_folders_are_reported(server: ScienceDB, run: Run) -> None:
    server.files["/V1/Animal/dragon/1.jpg"] = image("dragon")
    inside = {"Animal/unicorn/1.jpg": image("unicorn"), "Animal/cat/9.jpg": image("cat")}
    server.add("/V1/more.zip", make_archive(".zip", inside))
    downloaded = run()
    assert downloaded.unknown_classes == ["dragon", "unicorn"]
    assert downloaded.per_class == {"cat": 4, "owl": 3}
    assert sorted(path.name for path in run.target.iterdir() if path.is_dir()) == ["cat", "owl"]


def test_the_extra_files_of_a_mac_archive_are_skipped(run: Run, serve: Serve) -> None:
    inside = {path.removeprefix("/V1/"): content for path, content in dataset().items()}
    with serve({"/V1/Animal.zip": make_archive(".zip", inside | {"__MACOSX/Animal/cat/._cat 0 图.jpg": b"junk"})}):
        run()
    assert run.tree == expected(dataset())


def test_an_archive_that_has_changed_is_unpacked_again(run: Run, serve: Serve) -> None:
    inside = {path.removeprefix("/V1/"): content for path, content in dataset().items()}
    with serve({"/V1/Animal.zip": make_archive(".zip", inside)}) as server:
        run()
        inside = {path.replace("owl", "pig"): image(path) for path in inside}
        server.files["/V1/Animal.zip"] = make_archive(".zip", inside)
        assert run().per_class == {"cat": 3, "pig": 3}


HOSTILE = [
    "/V1/../../cat/outside.jpg",
    "/V1/cat/../../../outside.jpg",
    "C:\\cat\\outside.jpg",
    "/V1/cat/..\\..\\outside.jpg",
    "/V1/cat/a&b=c+d %25.jpg",
    "/V1/cat/" + "x" * 300 + ".jpg",
    "/V1/cat/CON.jpg",
    "/V1/cat/A.jpg",
    "/V1/cat/a.jpg",
    "/V1/cat/a\tb.jpg",
    "/V1/cat/ .jpg",
]


@pytest.mark.parametrize("listing", ["tree", "addresses"])
def test_no_path_from_the_network_leads_out_of_the_target(
    run: Run, tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, listing: str
) -> None:
    files = {path: image(path) for path in HOSTILE}
    with serve({**dataset(2), **files}) as server:
        entries = [
            {"id": file_id, "path": path, "size": len(server.files[path])} for file_id, path in server.ids.items()
        ]
        monkeypatch.setattr(server, "page", entries)
        server.folder_faults = ["always 50000"] * (listing == "addresses")
        run()
    found = {path.name: path.read_bytes() for path in (run.target / "cat").iterdir()}
    assert set(files.values()) <= set(found.values())
    assert len({name.casefold() for name in found}) == len(found)
    assert all(len(name.encode()) < 200 and ".." not in Path(name).parts for name in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "raw"]
    assert {path.parent for path in tmp_path.rglob("*.jpg")} <= {run.target / "cat", run.target / "owl"}


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_no_path_in_an_archive_leads_out_of_the_target(run: Run, tmp_path: Path, serve: Serve, kind: str) -> None:
    files = {path.removeprefix("/V1/"): image(path) for path in HOSTILE}
    files |= {path.removeprefix("/V1/"): content for path, content in dataset(2).items()}
    files |= {"/cat/absolute.jpg": image("absolute"), "cat/NUL": b"", "cat/a.jpg ": image("blank")}
    with serve({f"/V1/Animal{kind}": make_archive(kind, files)}):
        downloaded = run()
    assert len(downloaded.refused) == 5  # three lead upwards, one names a drive, one is absolute
    found = {path.name: path.read_bytes() for path in (run.target / "cat").iterdir()}
    good = {content for path, content in files.items() if path.startswith(("cat/", "Animal/cat/"))}
    assert {content for content in good if content and content != image("blank")} - set(found.values()) <= {
        image("/V1/cat/../../../outside.jpg"),
        image("/V1/cat/..\\..\\outside.jpg"),
    }
    assert len({name.casefold() for name in found}) == len(found)
    assert all(len(name.encode()) < 200 and name.isprintable() for name in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "raw"]
    assert {path.parent for path in run.target.glob("*/*")} == {run.target / "cat", run.target / "owl"}


def test_two_files_listed_under_one_path_are_both_downloaded(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        {"id": file_id, "path": "/V1/Animal/cat/same.jpg" if "cat" in path else path, "size": len(server.files[path])}
        for file_id, path in server.ids.items()
    ]
    monkeypatch.setattr(server, "page", entries)
    assert run().per_class == {"cat": 3, "owl": 3}
    assert {content for name, content in run.tree.items() if name.startswith("cat/")} == {
        content for path, content in server.files.items() if "/cat/" in path
    }


@pytest.mark.parametrize("variable", ["SCIENCEDB_API_URL", "SCIENCEDB_DOWNLOAD_URL"])
def test_a_host_without_http_is_refused_at_once(
    server: ScienceDB, run: Run, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "mirror.example")
    with pytest.raises(BestiaryError, match=rf"{variable}.*mirror\.example"):
        run()
    assert run.pauses == []


@pytest.mark.parametrize("kind", ARCHIVE_KINDS)
@pytest.mark.parametrize("md5", [True, False])
def test_archives_are_unpacked(run: Run, serve: Serve, kind: str, md5: bool) -> None:
    inside = {path.removeprefix("/V1/"): content for path, content in dataset().items()}
    with serve({f"/V1/Animal{kind}": make_archive(kind, inside)}) as server:
        server.md5 = server.sizes = md5
        run()
        run()
        assert server.requests.total() == 1
    assert run.tree == expected(dataset())


def test_one_archive_per_class_is_unpacked(run: Run, serve: Serve) -> None:
    images = {name: {"1.jpg": image(name), "2.jpg": image(f"{name} 2")} for name in ("cat", "owl")}
    with serve({f"/V1/{name}.zip": make_archive(".zip", files) for name, files in images.items()}):
        assert run().per_class == {"cat": 2, "owl": 2}


def test_an_archive_that_cannot_be_unpacked_is_named(run: Run, serve: Serve) -> None:
    with serve({"/V1/Animal.rar": b"Rar!"}), pytest.raises(BestiaryError, match=r"Animal\.rar.*dataset\.source"):
        run()


def test_two_downloads_never_use_a_cache_at_once(server: ScienceDB, run: Run) -> None:
    run.cache.mkdir()
    with FileLock(run.cache / "lock"), pytest.raises(BestiaryError, match=rf"{run.cache}.*BESTIARY_CACHE"):
        run()


def _process(run: Run, server: ScienceDB) -> subprocess.Popen[str]:
    code = f"""
import signal
from pathlib import Path
from bestiary import params
from bestiary.data.sciencedb import download
from bestiary.errors import BestiaryError
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
settings = params.ScienceDB(dataset_id="abc", version="V1", connections=4, retries=3, timeout_s=5.0, allow_missing=0.0)
try:
    download(Path({str(run.target)!r}), settings, cache=Path({str(run.cache)!r}))
except BestiaryError as error:
    raise SystemExit(str(error))
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(sciencedb_client.__file__).parents[2]),
        "SCIENCEDB_API_URL": server.url,
        "SCIENCEDB_DOWNLOAD_URL": server.url,
    }
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_and_ends_with_the_same_files(run: Run) -> None:
    files = {path: content * 20 for path, content in dataset(12).items()}
    dice = random.Random(1)
    with serving(files) as server:
        server.bytes_per_second = 2_000_000
        for _ in range(4):
            process = _process(run, server)
            seen = server.requests.total()
            while server.requests.total() == seen and process.poll() is None:
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        server.bytes_per_second = None
        finished = _process(run, server)
        _, errors = finished.communicate()
        assert finished.returncode == 0, errors
        served = server.served.total()
    assert run.tree == expected(files)
    assert [path.name for path in run.target.parent.iterdir() if path.name.startswith(".")] == []
    whole = sum(len(content) for path, content in files.items() if path.endswith("jpg"))
    assert served <= whole + 4 * 4 * len(image("x")) * 20  # plus at most the unfinished files of each kill


@pytest.mark.slow
def test_a_run_killed_while_unpacking_or_linking_resumes_and_ends_with_the_same_files(run: Run) -> None:
    files = {path: content[:200] for path, content in dataset(1000).items()}
    archive = make_archive(".zip", {path.removeprefix("/V1/"): content for path, content in files.items()})
    with serving({"/V1/Animal.zip": archive}) as server:
        for under_way in (run.cache / "unpacked", run.target.parent):
            process = _process(run, server)
            while not any(under_way.glob(".*.part")) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not run.target.exists()
        finished = _process(run, server)
        _, errors = finished.communicate()
        assert finished.returncode == 0, errors
        assert server.requests.total() == 1
    assert run.tree == expected(files)
    assert list(run.target.parent.glob(".*")) == list((run.cache / "unpacked").glob(".*")) == []


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(run: Run) -> None:
    with serving(dataset(30)) as server:
        server.bytes_per_second = 2_000  # one second per file leaves time for the signal on a busy machine
        process = _process(run, server)
        while server.requests.total() < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Run the same command again" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not run.target.exists()
