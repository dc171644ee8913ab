from pathlib import Path

import pytest

from bestiary.data.findings import read_overrides
from bestiary.errors import BestiaryError


def overrides(folder: Path, text: str) -> Path:
    path = folder / "overrides.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_decisions_are_read(tmp_path: Path) -> None:
    path = overrides(tmp_path, 'path,decision\ncat/a.jpg,keep\n\n"cat/b, c.jpg",drop\n')
    assert read_overrides(path) == {"cat/a.jpg": "keep", "cat/b, c.jpg": "drop"}


def test_no_decisions_are_none(tmp_path: Path) -> None:
    assert read_overrides(tmp_path / "overrides.csv") == {}
    assert read_overrides(overrides(tmp_path, "path,decision\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with the line path,decision"),
        ("cat/a.jpg,keep\n", "must begin with the line path,decision"),
        ("path,decision\ncat/a.jpg,perhaps\n", "line 2: write"),
        ("path,decision\ncat/a.jpg\n", "line 2: write"),
        ("path,decision\ncat/a.jpg,keep\ncat/a.jpg,drop\n", "line 3: cat/a.jpg is both kept and dropped"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BestiaryError, match=message):
        read_overrides(overrides(tmp_path, text))
