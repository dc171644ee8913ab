import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bestiary.errors import BestiaryError, file_sentence
from bestiary.files import (
    ABANDONED_DAYS,
    check_not_overwritten,
    check_writable,
    discard,
    write_atomically,
    write_new,
)


def test_a_file_is_written_with_its_folder(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"whole")
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(BestiaryError, match=r"cannot be written \(No space left on device\)\. Free space"):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_a_plain_sentence(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(BestiaryError, match=r"cannot be written .* is a file, not a folder"):
        write_atomically(tmp_path / "folder" / "file", b"")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "writable disk"),
        (errno.EDQUOT, "Delete other files"),
        (errno.EACCES, "permissions"),
        (errno.ENOTDIR, "a file, not a folder"),
        (errno.EISDIR, "Name a file"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.EIO, "Check its disk"),
    ],
)
def test_the_advice_fits_the_systems_error(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(number, os.strerror(number), "photos/1.jpg")
    assert advice in str(file_sentence(error))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(BestiaryError, match=advice):
        write_atomically(tmp_path / "file", b"")


def test_only_errors_about_files_become_sentences() -> None:
    assert "open files" in str(file_sentence(OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
    assert file_sentence(OSError(errno.EACCES, os.strerror(errno.EACCES))) is None  # such as a port
    assert file_sentence(OSError(errno.EBADF, os.strerror(errno.EBADF), "file")) is None
    long = OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 5000)
    assert len(str(file_sentence(long))) < 400


def test_an_output_folder_is_checked_without_creating_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path("new", "folder"), tmp_path / "new", tmp_path):
        check_writable(folder)
    (tmp_path / "file").write_bytes(b"")
    for folder in (Path("file"), Path("file", "below"), Path("file", "far", "below"), tmp_path / ("x" * 256)):
        with pytest.raises(BestiaryError, match="cannot be written"):
            check_writable(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_the_same_file_may_be_written_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("link")  # to itself
    check_not_overwritten(tmp_path / "file", b"data")
    check_not_overwritten(tmp_path / "new", b"data")
    for path in (tmp_path / "file", tmp_path / "link", tmp_path):
        with pytest.raises(BestiaryError, match="exists and would be overwritten"):
            check_not_overwritten(path, b"other")


def test_the_longest_names_that_a_file_system_takes_are_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), b"whole")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"whole"


def test_of_many_that_write_a_new_file_exactly_one_succeeds(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(50):
            path = tmp_path / str(number)
            contents = [bytes([writer]) * 1000 for writer in range(8)]
            written = list(pool.map(write_new, [path] * 8, contents))
            assert written.count(True) == 1
            assert path.read_bytes() == contents[written.index(True)]
    assert len(list(tmp_path.iterdir())) == 50


def test_a_new_file_is_written_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert write_new(tmp_path / "file", b"first")
    assert not write_new(tmp_path / "file", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_a_finished_run_leaves_nothing_that_another_could_resume(tmp_path: Path) -> None:
    folder = tmp_path / "0123"
    write_atomically(folder / "step-00000010.pt", b"")
    (tmp_path / "0123.done" / "sheet").mkdir(parents=True)  # as a kill leaves it
    discard(folder)
    assert not list(tmp_path.iterdir())
    discard(folder)


def test_a_finished_run_deletes_what_was_abandoned_beside_it(tmp_path: Path) -> None:
    for name, days in (("finished", 0), ("killed", ABANDONED_DAYS - 1), ("abandoned", ABANDONED_DAYS + 1)):
        write_atomically(tmp_path / name / "step-00000010.pt", b"")
        used = time.time() - days * 24 * 60 * 60
        os.utime(tmp_path / name, (used, used))
    discard(tmp_path / "finished")
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


def test_a_run_that_is_killed_while_it_discards_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "0123"
    write_atomically(folder / "step-00000010.pt", b"")

    def die(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        discard(folder)
    assert not folder.exists()
