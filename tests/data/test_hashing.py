from collections.abc import Callable

import imagehash
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bestiary.data.hashing import VIEWS, content_box, hashes, thumbnail


def test_hashes_equal_those_of_imagehash(picture: Callable[..., Image.Image]) -> None:
    for number in range(20):
        thumb = thumbnail(picture(number, (333, 250)))
        views = [
            thumb.resize((32, 32), Image.Resampling.LANCZOS, (64 * a, 64 * b, 64 * c, 64 * d)) for a, b, c, d in VIEWS
        ]
        theirs = [int(str(imagehash.phash(view)), 16) for view in (thumb, ImageOps.mirror(thumb), *views)]
        ours = hashes(thumb)
        differences = [
            (own ^ other).bit_count() for own, other in zip((ours.plain, ours.mirror, *ours.views), theirs, strict=True)
        ]
        assert max(differences) <= 1  # a value equal to the median may fall on either side


def test_mirroring_an_image_exchanges_its_hash_and_its_mirror_hash(picture: Callable[..., Image.Image]) -> None:
    image = picture(1)
    straight = hashes(thumbnail(image))
    turned = hashes(thumbnail(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    assert (straight.plain ^ turned.mirror).bit_count() <= 2
    assert (straight.mirror ^ turned.plain).bit_count() <= 2


@pytest.mark.parametrize("colour", ["white", "black", "grey"])
def test_flat_margins_are_no_content(picture: Callable[..., Image.Image], colour: str) -> None:
    framed = Image.new("L", (200, 150), colour)
    framed.paste(picture(2).convert("L"), (30, 10))
    assert content_box(framed) == (31, 11, 189, 129)


def test_a_bar_with_a_caption_is_no_content(picture: Callable[..., Image.Image]) -> None:
    image = Image.new("L", (160, 144), "black")
    image.paste(picture(2).convert("L"))
    ImageDraw.Draw(image).text((4, 124), "agency.example", fill="white", font=ImageFont.load_default(12))
    assert content_box(image) == (0, 0, 160, 119)


def test_a_small_drawing_on_white_keeps_its_margins() -> None:
    drawing = Image.new("L", (200, 200), "white")
    ImageDraw.Draw(drawing).ellipse((80, 80, 120, 120), fill="black")
    assert content_box(drawing) == (0, 0, 200, 200)
