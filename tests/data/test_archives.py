import contextlib
import gzip
import io
import random
import stat
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.archives import ARCHIVE_KINDS, make_archive

from bestiary.data import archives
from bestiary.data.archives import kind_of, unpack
from bestiary.errors import BestiaryError

HOSTILE = ["../outside.jpg", "cat/../../outside.jpg", "/tmp/outside.jpg", "C:\\outside.jpg", "cat\\..\\..\\outside.jpg"]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def archive_with(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(make_archive("".join(path.suffixes), files))
    return path


def tar_with(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def test_files_keep_their_paths_and_bytes(tmp_path: Path) -> None:
    path = archive_with(tmp_path / "a.zip", {"Animal/cat/1.jpg": b"one", "Animal/cat/2 图.jpg": b"two"})
    files, refused = unpack(path, tmp_path / "out", ".zip")
    assert {name: file.read_bytes() for name, file in files} == {
        "Animal/cat/1.jpg": b"one",
        "Animal/cat/2 图.jpg": b"two",
    }
    assert refused == []


@pytest.mark.parametrize("name", HOSTILE)
def test_paths_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    zipped = archive_with(tmp_path / "a.zip", {name: b"evil", "cat/good.jpg": b"good"})
    tarred = tar_with(tmp_path / "a.tar.gz", [_member(name), _member("cat/good.jpg")])
    before = files_below(tmp_path)
    for path, kind in ((zipped, ".zip"), (tarred, ".tar.gz")):
        files, refused = unpack(path, tmp_path / "out" / kind, kind)
        assert [name for name, _ in files] == ["cat/good.jpg"]
        assert len(refused) == 1
    assert all(path.startswith("out/") for path in files_below(tmp_path) - before)


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 3) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = size if kind == tarfile.REGTYPE else 0
    return member


def test_links_and_devices_are_refused(tmp_path: Path) -> None:
    members = [
        _member("cat/soft.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        _member("cat/hard.jpg", tarfile.LNKTYPE, "../../secret"),
        _member("cat/device.jpg", tarfile.CHRTYPE),
        _member("cat/pipe.jpg", tarfile.FIFOTYPE),
        _member("cat/good.jpg"),
    ]
    files, refused = unpack(tar_with(tmp_path / "a.tar.gz", members), tmp_path / "out", ".tar.gz")
    assert [name for name, _ in files] == ["cat/good.jpg"]
    assert len(refused) == 4


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("cat/link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    assert unpack(tmp_path / "a.zip", tmp_path / "out", ".zip") == ([], ["cat/link.jpg"])


def test_files_with_strange_or_equal_names_are_all_unpacked(tmp_path: Path) -> None:
    names = ["cat/a\nb.jpg", "cat/" + "x" * 300 + ".jpg", "cat/con", "cat/A.jpg", "cat/a.jpg", "cat/ .jpg"]
    tarred = tar_with(tmp_path / "a.tar.gz", [_member(name) for name in [*names, "cat/a.jpg"]])
    files, _ = unpack(tarred, tmp_path / "out", ".tar.gz")
    assert [name for name, _ in files] == [*names, "cat/a.jpg"]
    assert len({file for _, file in files}) == 7


def test_a_bomb_is_refused_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_RATIO_BELOW", 2**20)
    path = archive_with(tmp_path / "a.zip", {f"cat/{number}.jpg": bytes(2**20) for number in range(40)})
    with pytest.raises(BestiaryError, match=r"a\.zip is a bomb"):
        unpack(path, tmp_path / "out", ".zip")
    assert files_below(tmp_path) == {"a.zip"}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_bomb_in_its_names_is_not_read_into_memory(tmp_path: Path, kind: bytes) -> None:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = kind, 64 * 2**20
    with gzip.open(tmp_path / "a.tar.gz", "wb") as archive:
        archive.write(name.tobuf(tarfile.GNU_FORMAT))
        archive.write(b"x" * name.size)
    tracemalloc.start()
    try:
        with pytest.raises(BestiaryError, match=r"a\.tar\.gz.*bomb"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out", ".tar.gz")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()


def test_long_names_in_a_tar_are_read(tmp_path: Path) -> None:
    name = "cat/" + "x" * 3000 + ".jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
            archive.addfile(_member(name), io.BytesIO(b"abc"))
        assert [path for path, _ in unpack(tmp_path / "a.tar", tmp_path / str(form), ".tar")[0]] == [name]


def test_the_size_of_all_files_together_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive_with(tmp_path / "a.zip", {f"cat/{number}.jpg": b"12345" for number in range(4)})
    monkeypatch.setattr(archives, "MAX_BYTES", 16)
    with pytest.raises(BestiaryError, match=r"a\.zip is a bomb"):
        unpack(path, tmp_path / "out", ".zip")
    monkeypatch.setattr(archives, "MAX_BYTES", 20)
    assert len(unpack(path, tmp_path / "out", ".zip")[0]) == 4


member_name = st.lists(
    st.one_of(st.sampled_from([*HOSTILE, "..", ".", "", "cat", "con", "C:", "a\\b"]), st.text(min_size=1, max_size=20)),
    min_size=1,
    max_size=4,
).map("/".join)


@settings(max_examples=60, deadline=None)
@given(names=st.lists(member_name, min_size=1, max_size=4), zipped=st.booleans())
def test_no_name_makes_unpacking_write_outside_its_target(
    names: list[str], zipped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("names")
    path = folder / ("a.zip" if zipped else "a.tar")
    with contextlib.suppress(UnicodeEncodeError):  # no archive can hold this name
        if zipped:
            archive_with(path, dict.fromkeys(names, b"xxx"))
        else:
            with tarfile.open(path, "w") as archive:
                for name in names:
                    archive.addfile(_member(name), io.BytesIO(b"xxx"))
    before = set(Path("/").iterdir())
    with contextlib.suppress(BestiaryError):
        unpack(path, folder / "inner" / "out", path.suffix)
    assert {entry.name for entry in folder.iterdir()} <= {path.name, "inner"}
    assert {entry.name for entry in (folder / "inner").iterdir()} <= {"out"}
    assert all(part == "index.csv" or part.isdecimal() for part in files_below(folder / "inner" / "out"))
    assert set(Path("/").iterdir()) == before


def test_the_size_and_the_number_of_files_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive_with(tmp_path / "a.zip", {"cat/1.jpg": b"12345", "cat/2.jpg": b"12345"})
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 4)
    with pytest.raises(BestiaryError, match=r"a\.zip is a bomb"):
        unpack(path, tmp_path / "out", ".zip")
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 400)
    monkeypatch.setattr(archives, "MAX_FILES", 1)
    with pytest.raises(BestiaryError, match=r"a\.zip holds more than 1 files"):
        unpack(path, tmp_path / "out", ".zip")


@pytest.mark.parametrize("kind", ARCHIVE_KINDS)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_archive_is_named_and_leaves_no_files(tmp_path: Path, kind: str, share: float) -> None:
    files = {f"cat/{number}.jpg": bytes(range(256)) * 40 for number in range(20)}
    path = archive_with(tmp_path / f"a{kind}", files)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BestiaryError, match=rf"a{kind} cannot be unpacked"):
        unpack(path, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [".zip", ".tar", ".tar.gz"])
def test_damage_raises_no_other_error(tmp_path: Path, kind: str) -> None:
    dice = random.Random(1)
    path = tmp_path / f"a{kind}"
    if kind == ".zip":
        archive_with(path, {f"cat/{number} 图.jpg": dice.randbytes(200) for number in range(3)})
    else:
        tar_with(path, [_member(f"cat/{number} 图.jpg", size=200) for number in range(3)])
    whole = gzip.decompress(path.read_bytes()) if kind == ".tar" else path.read_bytes()
    for number in range(200):
        content = bytearray(whole)
        for _ in range(dice.randint(1, 8)):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(BestiaryError):
            unpack(path, tmp_path / str(number), kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.ZIP", ".zip"), ("a.tar.gz", ".tar.gz"), ("a.tgz", ".tgz"), ("a.jpg", None), ("a.rar", None)]
)
def test_the_kind_of_an_archive_is_read_from_its_name(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
