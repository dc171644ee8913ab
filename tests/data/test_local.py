"""Taking somebody's own folder of images."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from bestiary.data.listing import LeftOut, describe_left_out, list_images, read_left_out
from bestiary.data.local import Taken, take, take_others
from bestiary.errors import BestiaryError
from bestiary.subjects import Subject, Subjects


def take_all(raw: Path, trusted: Sequence[Path] = ()) -> Taken:
    return take(raw, raw.parent / "taken", None, None, lambda: trusted)


def taken_files(raw: Path) -> set[str]:
    return {path.relative_to(raw.parent / "taken").as_posix() for path in (raw.parent / "taken").glob("*/*")}


def left_out_of(taken: Taken) -> dict[str, str]:
    return {each.path: each.kind for each in taken.left_out}


def test_take_keeps_the_bytes(raw: Path) -> None:
    taken = take_all(raw)
    assert (taken.per_class, taken.renamed, taken.left_out) == ({"cat": 6, "owl": 6}, 0, [])
    for path in raw.glob("*/*"):
        assert (raw.parent / "taken" / path.relative_to(raw)).read_bytes() == path.read_bytes()


def test_take_replaces_an_earlier_result(raw: Path) -> None:
    take_all(raw)
    (raw / "cat" / "0.jpg").unlink()
    take_all(raw)
    assert "cat/0.jpg" not in taken_files(raw)


def test_classes_and_images_can_be_limited(raw: Path, tmp_path: Path) -> None:
    (raw / "pig").mkdir()
    assert take(raw, tmp_path / "taken", ["owl", "cat"], 3).per_class == {"cat": 3, "owl": 3}
    assert sorted(path.name for path in (tmp_path / "taken" / "cat").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]


def test_whatever_is_not_an_image_is_left_out_with_its_reason(raw: Path) -> None:
    for litter in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/._0.jpg"):
        (raw / litter).touch()
    (raw / "readme.txt").touch()
    shutil.copyfile(raw / "cat" / "0.jpg", raw / "lonely.jpg")
    (raw / "cat" / "0.tags").write_text("a cat", encoding="utf-8")
    (raw / "cat" / "notes.txt").write_text("about cats", encoding="utf-8")
    (raw / "cat" / "live.mov").write_bytes(b"\0\0\0\x14ftypqt  ")
    (raw / "cat" / ".hidden.jpg").touch()
    (raw / "cat" / "more" / "deep").mkdir(parents=True)
    shutil.copyfile(raw / "cat" / "0.jpg", raw / "cat" / "more" / "deep" / "1.jpg")
    (raw / ".trash").mkdir()
    os.mkfifo(raw / "cat" / "pipe.jpg")
    taken = take_all(raw)
    assert taken.per_class == {"cat": 6, "owl": 6}
    expected = {
        "readme.txt": "not an image",
        "lonely.jpg": "outside a class folder",
        "cat/0.tags": "caption",
        "cat/notes.txt": "caption without image",
        "cat/live.mov": "not an image",
        "cat/.hidden.jpg": "hidden",
        "cat/more/deep/1.jpg": "in a sub-folder",
        ".trash": "hidden",
        "cat/pipe.jpg": "not a file",
    }
    assert left_out_of(taken) == expected
    assert read_left_out(raw.parent / "taken") == taken.left_out
    assert describe_left_out(taken.left_out)[-3:] == [
        "1 file left out (not a file): cat/pipe.jpg",
        "2 files left out (not an image): cat/live.mov, readme.txt",
        "1 file left out (outside a class folder): lonely.jpg",
    ]


@pytest.mark.parametrize(
    "name", ["photo", "photo.jfif", "photo.tmp", "photo.JPG", "photo.txt", "photo.HEIC", "raw.dng"]
)
def test_an_image_is_known_by_its_name_or_by_its_first_bytes(raw: Path, name: str) -> None:
    shutil.copyfile(raw / "cat" / "0.jpg", raw / "cat" / name)
    taken = take_all(raw)
    assert (taken.per_class["cat"], taken.left_out) == (7, [])


@pytest.mark.parametrize("brand", [b"heic", b"avif", b"mif1"])
def test_a_heic_or_avif_photo_without_an_extension_is_an_image(raw: Path, brand: bytes) -> None:
    (raw / "cat" / "IMG_0001").write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0")
    assert take_all(raw).per_class["cat"] == 7


def test_long_lists_are_cut_on_the_screen() -> None:
    lines = describe_left_out([LeftOut(f"cat/{number:02}.pdf", "cat", "not an image", "") for number in range(12)])
    assert lines[0].startswith("12 files left out (not an image): cat/00.pdf, cat/01.pdf")
    assert lines[0].endswith("cat/09.pdf and 2 more")


def test_a_link_out_of_the_folder_is_a_finding_and_is_not_followed(raw: Path, tmp_path: Path) -> None:
    secret = tmp_path / "private" / "id_rsa.jpg"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    (raw / "cat" / "key.jpg").symlink_to(secret)
    (raw / "cat" / "relative.jpg").symlink_to("../../private/id_rsa.jpg")
    (raw / "cat" / "broken.jpg").symlink_to("nothing.jpg")
    (raw / "cat" / "circle.jpg").symlink_to("circle.jpg")
    (raw / "cat" / "folder").symlink_to(secret.parent)
    (raw / "cat" / "through.jpg").symlink_to("key.jpg")  # a link to a link
    (raw / "owl" / "a cat.jpg").symlink_to("../cat/0.jpg")
    taken = take_all(raw)
    assert taken.per_class == {"cat": 6, "owl": 7}
    details = {each.path.removeprefix("cat/"): (each.kind, each.detail) for each in taken.left_out}
    leaves, nowhere = ("link", "leaves raw"), ("link", "leads nowhere")
    assert details == {
        "key.jpg": leaves,
        "relative.jpg": leaves,
        "folder": leaves,
        "through.jpg": leaves,
        "broken.jpg": nowhere,
        "circle.jpg": nowhere,
    }
    assert all(path.read_bytes() != b"secret" for path in (raw.parent / "taken").rglob("*") if path.is_file())


def test_the_folder_itself_may_be_a_link_and_links_into_a_trusted_cache_are_followed(raw: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (raw / "cat" / "0.jpg").rename(cache / "0abc")
    (raw / "cat" / "0.jpg").symlink_to(cache / "0abc")
    (tmp_path / "data").symlink_to(raw)
    taken = take(tmp_path / "data", tmp_path / "taken", None, None, lambda: [cache])
    assert (taken.per_class, taken.left_out) == ({"cat": 6, "owl": 6}, [])
    assert not (tmp_path / "taken" / "cat" / "0.jpg").is_symlink()


def test_a_class_folder_that_is_a_link_out_is_refused_by_name(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (raw / "pig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BestiaryError, match=r"raw/pig is a link that leaves raw"):
        take_all(raw)
    assert not (raw.parent / "taken").exists()


def test_odd_file_names_are_taken_under_names_that_suit_every_system(raw: Path) -> None:
    picture = (raw / "cat" / "0.jpg").read_bytes()
    for number, name in enumerate(
        (b"caf\xe9.jpg", b"x" * 255, b"line\nbreak.jpg", b"esc\x1b[2J.jpg", b"A.jpg", b"a.jpg")
    ):
        Path(os.fsdecode(bytes(raw / "cat") + b"/" + name)).write_bytes(picture + bytes([number]))
    taken = take_all(raw)
    assert (taken.per_class["cat"], taken.left_out) == (12, [])
    assert taken.renamed == 5
    names = {path.partition("/")[2] for path in taken_files(raw) if path.startswith("cat/")}
    assert {"caf_.jpg", "line_break.jpg", "esc_[2J.jpg", "A.jpg"} < names
    assert len({name.casefold() for name in names}) == 12
    assert max(len(name.encode()) for name in names) <= 180


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"manifest.csv", r"raw/manifest\.csv is the name of a file"),
        (b"Manifest.CSV", r"raw/Manifest\.CSV is the name of a file"),
        (b"caf\xe9", r"raw/caf\\udce9 is not UTF-8"),
        (b"a\nb", r"raw/a\\nb is not UTF-8, or has characters"),
        (b"esc\x1b[2J", r"raw/esc\\x1b\[2J is not UTF-8, or has"),
        (b"x" * 200, r"raw/x+ is longer than 180 bytes"),
        (b"my_cat", None),
        (b"Cat", r"Cat, cat"),
        ("my cat 🐈".encode(), None),
    ],
)
def test_a_folder_whose_name_cannot_be_a_class_is_refused_by_name(raw: Path, name: bytes, message: str | None) -> None:
    shutil.copytree(raw / "owl", os.fsdecode(bytes(raw) + b"/" + name))
    if message is None:
        assert take_all(raw).per_class[name.decode()] == 6
        return
    with pytest.raises(BestiaryError, match=message) as error:
        take_all(raw)
    assert str(error.value).encode().isascii() or "🐈" in str(error.value)


def test_a_class_has_its_name_in_the_composed_form(raw: Path) -> None:
    (raw / "owl").rename(raw / "e\u0301cureuil")
    assert take_all(raw).per_class == {"cat": 6, "écureuil": 6}
    shutil.copytree(raw / "cat", raw / "écureuil")
    with pytest.raises(BestiaryError, match="écureuil"):
        take_all(raw)


def _remove(folder: Path, keep: int) -> None:
    for path in sorted(folder.iterdir())[keep:]:
        path.unlink()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=str(tmp_path / "data")):
        list_images(tmp_path / "data")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BestiaryError, match=f"no images in {tmp_path / 'data'}"):
        take_all(tmp_path / "data")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(BestiaryError, match="data is a file"):
        take_all(tmp_path / "data")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["my-cat"], r"no folder with images, only files such as my-cat.*such as .*data/my-cat"),
        (["1.jpg", "2.jpg", ".DS_Store", ".hidden"], r"no folder with images, only files such as 1\.jpg"),
        (["photos.zip", "1.jpg"], r"data/photos\.zip is an archive. Unpack it"),
        ([".DS_Store", ".hidden"], "no images in"),
    ],
)
def test_files_in_the_place_of_class_folders_are_named(files: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in files:
        (tmp_path / "data" / name).touch()
    with pytest.raises(BestiaryError, match=message):
        take_all(tmp_path / "data")


def test_a_file_beside_class_folders_is_left_out_by_name(raw: Path) -> None:
    (raw / "my-dog").touch()
    assert describe_left_out(take_all(raw).left_out) == ["1 file left out (not an image): my-dog"]


def test_folders_of_operating_systems_are_no_classes(raw: Path) -> None:
    for name in ("$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX", "@eaDir", "cat/@eaDir"):
        (raw / name).mkdir()
        (raw / name / "SYNOPHOTO_THUMB_M.jpg").touch()
    taken = take_all(raw)
    assert (taken.per_class, taken.left_out) == ({"cat": 6, "owl": 6}, [])


def test_chinese_and_emoji_names_of_folders_and_files_stay_as_they_are(raw: Path) -> None:
    (raw / "cat").rename(raw / "我的猫 🐈")
    (raw / "我的猫 🐈" / "0.jpg").rename(raw / "我的猫 🐈" / "雪地 😀.jpg")
    taken = take_all(raw)
    assert (taken.per_class, taken.renamed) == ({"owl": 6, "我的猫 🐈": 6}, 0)
    assert "我的猫 🐈/雪地 😀.jpg" in taken_files(raw)


def test_a_single_class_needs_four_images(raw: Path, tmp_path: Path) -> None:
    assert take(raw, tmp_path / "taken", ["cat"], 4).per_class == {"cat": 4}
    with pytest.raises(BestiaryError, match=r"cat has only 3 images.*at least 4"):
        take(raw, tmp_path / "taken", ["cat"], 3)
    with pytest.raises(BestiaryError, match=r"cat has only one image.*at least 4"):
        take(raw, tmp_path / "taken", ["cat"], 1)


@pytest.mark.parametrize(("keep", "message"), [(1, "owl has only one image"), (0, "owl has no image")])
def test_a_class_with_fewer_than_two_images_is_refused_by_name(raw: Path, keep: int, message: str) -> None:
    _remove(raw / "owl", keep)
    with pytest.raises(BestiaryError, match=message):
        take_all(raw)


def test_a_class_without_an_image_is_refused_with_what_is_there(raw: Path) -> None:
    _remove(raw / "owl", 0)
    (raw / "owl" / "a.pdf").touch()
    shutil.copytree(raw / "cat", raw / "owl" / "day 1")
    with pytest.raises(BestiaryError, match=r"owl has no image in .*: 6 in a sub-folder, 1 not an image"):
        take_all(raw)


def test_an_unknown_class_is_refused_by_name(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"dataset\.classes.*dragon"):
        take(raw, tmp_path / "taken", ["cat", "owl", "dragon"], None)


def test_folders_of_one_subject_are_refused_by_name_unless_only_one_is_chosen(raw: Path, tmp_path: Path) -> None:
    shutil.copytree(raw / "cat", raw / "a_cat")
    with pytest.raises(BestiaryError, match="a_cat, cat"):
        take_all(raw)
    assert take(raw, tmp_path / "taken", ["owl", "cat"], None).per_class == {"cat": 6, "owl": 6}


def test_described_folders_must_be_there_even_if_they_are_not_chosen(raw: Path, tmp_path: Path) -> None:
    def subjects(*folders: str) -> Subjects:
        return Subjects({folder: Subject(folder, f"sks {folder}", "", given=True) for folder in folders})

    with pytest.raises(BestiaryError, match="describes the folder pig"):
        take(raw, tmp_path / "taken", None, None, subjects=subjects("pig"))
    assert take(raw, tmp_path / "taken", ["cat"], None, subjects=subjects("owl")).per_class == {"cat": 6}


def test_a_failed_take_leaves_no_files(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError):
        take(raw, tmp_path / "taken", ["cat"], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_photos_of_others_are_taken_beside_the_subject_and_never_among_the_classes(raw: Path, tmp_path: Path) -> None:
    subjects = Subjects({"cat": Subject("cat", "sks cat", "", class_word="cat", given=True, others="owl")})
    taken = take(raw, tmp_path / "taken", None, None, subjects=subjects)
    assert taken.per_class == {"cat": 6}
    assert Subjects.read_from(tmp_path / "taken") == subjects
    assert take_others(raw, tmp_path / "others", subjects) == {"cat": 6}
    assert {path.read_bytes() for path in (tmp_path / "others" / "cat").iterdir()} == {
        path.read_bytes() for path in (raw / "owl").iterdir()
    }
    # Without others, the folder is empty: DVC expects it.
    assert take_others(raw, tmp_path / "others", Subjects()) == {}
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["about.txt"]  # DVC warns of an empty output


def test_one_photo_of_others_is_too_few(raw: Path, tmp_path: Path) -> None:
    for photo in sorted((raw / "owl").iterdir())[1:]:
        photo.unlink()
    subjects = Subjects({"cat": Subject("cat", "sks cat", "", class_word="cat", given=True, others="owl")})
    with pytest.raises(BestiaryError, match=r"The folder owl has 1 images in .*takes at least 2"):
        take_others(raw, tmp_path / "others", subjects)


def test_a_photo_of_others_that_cannot_be_read_is_named_before_anything_is_trained(raw: Path, tmp_path: Path) -> None:
    broken = sorted((raw / "owl").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:100])
    subjects = Subjects({"cat": Subject("cat", "sks cat", "", class_word="cat", given=True, others="owl")})
    with pytest.raises(BestiaryError, match=rf"{broken.name} cannot be read as an image"):
        take_others(raw, tmp_path / "others", subjects)
