import os
from pathlib import Path

import pytest

from bestiary.data.folder import check_classes, link, replacing
from bestiary.data.local import take
from bestiary.errors import BestiaryError


def test_take_keeps_the_bytes(raw: Path, tmp_path: Path) -> None:
    taken = take(raw, tmp_path / "taken", None, None)
    assert (taken.per_class, taken.renamed, taken.left_out) == ({"cat": 6, "owl": 6}, 0, [])
    for path in raw.glob("*/*"):
        assert (tmp_path / "taken" / path.relative_to(raw)).read_bytes() == path.read_bytes()


def test_take_replaces_an_earlier_result(raw: Path, tmp_path: Path) -> None:
    take(raw, tmp_path / "taken", None, None)
    (raw / "cat" / "0.jpg").unlink()
    take(raw, tmp_path / "taken", None, None)
    assert not (tmp_path / "taken" / "cat" / "0.jpg").exists()


def test_classes_and_images_can_be_limited(raw: Path, tmp_path: Path) -> None:
    (raw / "pig").mkdir()
    assert take(raw, tmp_path / "taken", ["owl", "cat"], 3).per_class == {"cat": 3, "owl": 3}
    assert sorted(path.name for path in (tmp_path / "taken" / "cat").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]


def _remove(folder: Path, keep: int) -> None:
    for path in sorted(folder.iterdir())[keep:]:
        path.unlink()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=str(tmp_path / "data")):
        take(tmp_path / "data", tmp_path / "taken", None, None)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BestiaryError, match=f"no images in {tmp_path / 'data'}"):
        take(tmp_path / "data", tmp_path / "taken", None, None)


def test_a_single_class_is_refused_by_name(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"only one class.*cat"):
        take(raw, tmp_path / "taken", ["cat"], None)


@pytest.mark.parametrize(("keep", "message"), [(1, "owl has only one image"), (0, "owl has no image")])
def test_a_class_with_fewer_than_two_images_is_refused_by_name(
    raw: Path, tmp_path: Path, keep: int, message: str
) -> None:
    _remove(raw / "owl", keep)
    with pytest.raises(BestiaryError, match=message):
        take(raw, tmp_path / "taken", None, None)


def test_an_unknown_class_is_refused_by_name(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"dataset\.classes.*dragon"):
        take(raw, tmp_path / "taken", ["cat", "owl", "dragon"], None)


def test_a_failed_take_leaves_no_files(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError):
        take(raw, tmp_path / "taken", ["cat"], None)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_failed_replacement_leaves_the_old_folder_unchanged(tmp_path: Path) -> None:
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


def test_linking_a_symbolic_link_links_its_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    link(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").is_symlink()
    assert (tmp_path / "c").read_bytes() == b"content"


def test_a_file_is_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"content")
    link(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"content"
    assert not (tmp_path / "c").samefile(tmp_path / "a")


def test_the_error_counts_the_other_small_classes() -> None:
    with pytest.raises(BestiaryError, match=r"class a .*1 more classes"):
        check_classes({"a": 1, "b": 1, "c": 2}, "data")
