from pathlib import Path

import pytest

from bestiary.data.findings import read_overrides
from bestiary.errors import BestiaryError


def write_overrides(folder: Path, text: str) -> Path:
    path = folder / "overrides.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_decisions_are_read(tmp_path: Path) -> None:
    path = write_overrides(tmp_path, 'path,decision\ncat/a.jpg,keep\n\n"cat/b, c.jpg",drop\n')
    assert read_overrides(path) == {"cat/a.jpg": "keep", "cat/b, c.jpg": "drop"}


def test_a_missing_or_empty_table_holds_no_decisions(tmp_path: Path) -> None:
    assert read_overrides(tmp_path / "overrides.csv") == {}
    assert read_overrides(write_overrides(tmp_path, "path,decision\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"overrides\.csv.*path,decision"),
        ("cat/a.jpg,keep\n", r"overrides\.csv.*path,decision"),
        ("path,decision\ncat/a.jpg,perhaps\n", r"overrides\.csv, line 2"),
        ("path,decision\ncat/a.jpg\n", r"overrides\.csv, line 2"),
        ("path,decision\ncat/a.jpg,keep\ncat/a.jpg,drop\n", r"overrides\.csv, line 3.*cat/a\.jpg"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BestiaryError, match=message):
        read_overrides(write_overrides(tmp_path, text))
