from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bestiary.diffusion.sheet import Sheet
from bestiary.errors import BestiaryError


def pictures(colour: str) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), colour) for _ in range(2)]


def test_a_resumed_run_has_all_rows_and_the_base_comes_first(tmp_path: Path) -> None:
    whole = Sheet(tmp_path / "whole", ["cat", "owl"])
    for step, colour in ((0, "red"), (5, "green"), (10, "blue")):
        whole.add(step, pictures(colour))
        rows = whole.save(tmp_path / "sheet.png")
    assert list(rows) == [0, 5, 10]
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(rows[5]) as row:
        assert sheet.height > 2.5 * row.height
        column = np.asarray(sheet.convert("RGB"))[:, sheet.width - 60].tolist()
        assert row.convert("RGB").getpixel((row.width - 60, row.height - 60)) == (0, 128, 0)
    assert list(dict.fromkeys(tuple(colour) for colour in column if min(colour) < 128 and max(colour) > 100)) == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
    ]

    killed = Sheet(tmp_path / "kept", ["cat", "owl"])
    killed.add(0, pictures("red"))
    killed.add(5, pictures("green"))
    killed.add(10, pictures("blue")[:1])
    resumed = Sheet(tmp_path / "kept", ["cat", "owl"])
    resumed.add(0, pictures("red"))  # a resumed run draws the base again
    assert list(resumed.save(tmp_path / "resumed" / "sheet.png")) == [0, 5]
    resumed.add(10, pictures("blue"))
    resumed.save(tmp_path / "resumed" / "sheet.png")
    assert (tmp_path / "resumed" / "sheet.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()


def test_a_sheet_that_cannot_be_written_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BestiaryError, match=r"0000\.png"):
        Sheet(tmp_path / "file", ["cat", "owl"]).add(0, pictures("red"))
