import os
from pathlib import Path

import pytest

from bestiary.data.folder import check_classes, class_files, link, replacing, take
from bestiary.errors import BestiaryError


def test_taking_a_folder_brings_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    counts = take(raw, tmp_path / "taken", None, None)
    assert counts == {"cat": 6, "owl": 6}
    for path in raw.glob("*/*"):
        assert (tmp_path / "taken" / path.relative_to(raw)).read_bytes() == path.read_bytes()


def test_taking_again_replaces_what_was_there(raw: Path, tmp_path: Path) -> None:
    take(raw, tmp_path / "taken", None, None)
    (raw / "cat" / "0.jpg").unlink()
    take(raw, tmp_path / "taken", None, None)
    assert not (tmp_path / "taken" / "cat" / "0.jpg").exists()


def test_classes_and_images_can_be_limited(raw: Path, tmp_path: Path) -> None:
    (raw / "pig").mkdir()
    assert take(raw, tmp_path / "taken", ["owl", "cat"], 3) == {"cat": 3, "owl": 3}
    assert sorted(path.name for path in (tmp_path / "taken" / "cat").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]


def test_hidden_files_and_loose_files_are_no_images(raw: Path) -> None:
    (raw / ".DS_Store").touch()
    (raw / "cat" / ".DS_Store").touch()
    (raw / "readme.txt").touch()
    assert [len(files) for files in class_files(raw).values()] == [6, 6]


def _remove(folder: Path, keep: int) -> None:
    for path in sorted(folder.iterdir())[keep:]:
        path.unlink()


def test_no_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="does not exist"):
        take(tmp_path / "data", tmp_path / "taken", None, None)


def test_an_empty_folder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BestiaryError, match="There are no images in"):
        take(tmp_path / "data", tmp_path / "taken", None, None)


def test_one_class_only_is_refused_in_a_sentence(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match="only one class"):
        take(raw, tmp_path / "taken", ["cat"], None)


@pytest.mark.parametrize(("keep", "message"), [(1, "owl has one image"), (0, "owl has no image")])
def test_a_class_with_one_image_or_none_is_refused_in_a_sentence(
    raw: Path, tmp_path: Path, keep: int, message: str
) -> None:
    _remove(raw / "owl", keep)
    with pytest.raises(BestiaryError, match=message):
        take(raw, tmp_path / "taken", None, None)


def test_an_unknown_class_is_refused_by_name(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"names dragon, which"):
        take(raw, tmp_path / "taken", ["cat", "owl", "dragon"], None)


def test_nothing_is_left_behind_when_taking_fails(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError):
        take(raw, tmp_path / "taken", ["cat"], None)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_failed_replacement_leaves_the_old_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def fail() -> None:
        with replacing(tmp_path / "out") as fresh:
            (fresh / "new").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_the_file_and_not_a_link_to_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    link(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").is_symlink()
    assert (tmp_path / "c").read_bytes() == b"content"


def test_where_nothing_can_be_linked_the_file_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"content")
    link(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"content"
    assert not (tmp_path / "c").samefile(tmp_path / "a")


def test_small_classes_are_counted() -> None:
    with pytest.raises(BestiaryError, match="and 1 other classes"):
        check_classes({"a": 1, "b": 1, "c": 2}, "data")
