from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from bestiary.data.contact_sheets import contact_sheet

Draw = Callable[..., Image.Image]


def test_a_contact_sheet_has_room_for_images_and_labels(picture: Draw) -> None:
    rows = [[picture(1), picture(2, (400, 300))], [picture(3)]]
    bare = contact_sheet(rows, cell=100)
    labelled = contact_sheet(rows, ["tiger", "a long label that needs more lines"], ["base", "adapter"], cell=100)
    assert bare.width >= 200
    assert bare.height >= 200
    assert labelled.width > bare.width
    assert labelled.height > bare.height


def test_a_long_word_in_a_label_is_wrapped_and_not_cut(picture: Draw) -> None:
    def ink(label: str) -> int:
        return int((np.asarray(contact_sheet([[picture(1)]], [], [label], cell=100).convert("L")) < 128).sum())

    plain, path = "ladybug / " * 6, "ladybug/" * 6
    assert ink(path) - ink("") == pytest.approx(ink(plain) - ink(""), rel=0.05)


def test_a_contact_sheet_without_images_is_still_an_image() -> None:
    assert contact_sheet([]).size[0] > 0
