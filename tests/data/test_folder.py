import os
from pathlib import Path

import pytest

from bestiary.data.folder import check_classes, link, replacing
from bestiary.errors import BestiaryError


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
