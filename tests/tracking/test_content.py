from pathlib import Path

import pytest

from bestiary.tracking.content import content_hash


def test_content_hashes_equal_those_of_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / ".dvcignore").write_text("__pycache__\n*.pyc\n")
    folder = tmp_path / "data"
    for name in ("b/2.txt", "a/1.txt", "z.txt", "a.txt", "瓢虫/一.txt", "b/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    # `dvc add data` wrote these hashes for this folder with DVC 3.67.1.
    assert content_hash(folder) == "7fe951f1965de24030a9b14c361249bb.dir"
    assert content_hash(folder / "z.txt") == "4d68c7de7e4246157111d3f7637d8ac6"
