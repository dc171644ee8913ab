from collections.abc import Callable

import imagehash
from PIL import Image, ImageOps

from bestiary.data.hashing import hashes, thumbnail


def test_hashes_equal_those_of_imagehash(picture: Callable[..., Image.Image]) -> None:
    for number in range(20):
        thumb = thumbnail(picture(number, (333, 250)))
        edge = 0.04 * thumb.width
        box = (edge, edge, thumb.width - edge, thumb.width - edge)
        views = (thumb, thumb.resize((32, 32), Image.Resampling.LANCZOS, box), ImageOps.mirror(thumb))
        theirs = [int(str(imagehash.phash(view)), 16) for view in views]
        differences = [(ours ^ other).bit_count() for ours, other in zip(hashes(thumb), theirs, strict=True)]
        assert max(differences) <= 1  # a value equal to the median may fall on either side


def test_mirroring_an_image_exchanges_its_hash_and_its_mirror_hash(picture: Callable[..., Image.Image]) -> None:
    image = picture(1)
    plain, _, mirror = hashes(thumbnail(image))
    turned, _, back = hashes(thumbnail(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    assert (plain ^ back).bit_count() <= 2
    assert (mirror ^ turned).bit_count() <= 2
