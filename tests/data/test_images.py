import contextlib
import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from bestiary.data.images import decode, open_rgb, right_extension
from bestiary.image_files import UnreadableImageError

Draw = Callable[..., Image.Image]


def test_a_plain_rgb_image_is_not_changed(tmp_path: Path, picture: Draw) -> None:
    picture(1).save(tmp_path / "a.jpg")
    decoded = decode(tmp_path / "a.jpg")
    assert (decoded.format, decoded.changes, decoded.image.mode) == ("JPEG", (), "RGB")


def test_a_rotated_photograph_is_turned_upright(tmp_path: Path, picture: Draw) -> None:
    upright = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    decoded = decode(tmp_path / "a.png")
    assert decoded.changes == ("orientation",)
    assert np.array_equal(np.asarray(decoded.image), np.asarray(upright))


@pytest.mark.parametrize(("name", "file_format"), [("a.heic", "HEIF"), ("a.avif", "AVIF")])
def test_a_phones_formats_are_read_with_their_colours_and_upright(
    tmp_path: Path, picture: Draw, name: str, file_format: str
) -> None:
    upright = picture(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / name, quality=95, exif=exif.tobytes())
    decoded = decode(tmp_path / name)
    assert decoded.format == file_format
    assert decoded.image.size == upright.size
    assert np.abs(np.asarray(decoded.image, int) - np.asarray(upright, int)).mean() < 6
    assert right_extension("IMG_1001.jpg", file_format) == f"IMG_1001{Path(name).suffix}"


def test_companions_of_a_heic_photograph_are_no_animation(tmp_path: Path, picture: Draw) -> None:
    picture(1).save(tmp_path / "a.heic", save_all=True, append_images=[picture(2)], quality=95)
    decoded = decode(tmp_path / "a.heic")
    assert decoded.changes == ()
    assert np.abs(np.asarray(decoded.image, int) - np.asarray(picture(1), int)).mean() < 6


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "index.png", transparency=0)
    assert open_rgb(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_rgb(tmp_path / "half.png").getpixel((0, 0)) == (255, 127, 127)
    assert open_rgb(tmp_path / "index.png").getpixel((0, 0)) == (255, 255, 255)
    assert decode(tmp_path / "index.png").changes == ("alpha",)


@pytest.mark.parametrize(
    ("mode", "name", "change"),
    [("CMYK", "a.jpg", "CMYK"), ("L", "a.jpg", "greyscale"), ("1", "a.png", "greyscale"), ("P", "a.gif", "palette")],
)
def test_other_colour_models_become_rgb(tmp_path: Path, picture: Draw, mode: str, name: str, change: str) -> None:
    picture(1).convert(mode).save(tmp_path / name)
    decoded = decode(tmp_path / name)
    assert decoded.image.mode == "RGB"
    assert decoded.changes == (change,)


def test_16_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png")
    assert decoded.changes == ("16-bit",)
    assert np.array_equal(np.asarray(decoded.image)[..., 0].ravel(), np.arange(256))


def test_deep_grey_is_converted_a_few_rows_at_a_time(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (1000, 1000), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", compress_level=1)
    tracemalloc.start()
    image = open_rgb(tmp_path / "a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.asarray(image)[..., 0], (values / 65535 * 255).round())
    assert peak < 8 * values.size  # bytes; 64-bit numbers of all pixels alone would take 8 for each, twice


@pytest.mark.parametrize(("orientation", "size"), [(1, (12_000, 9_000)), (6, (9_000, 12_000))])
def test_a_phones_largest_photo_is_decoded_at_half_size_and_keeps_its_real_size(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.linear_gradient("L").resize((12_000, 9_000)).save(tmp_path / "108.jpg", exif=exif)
    decoded = decode(tmp_path / "108.jpg")
    assert (decoded.size, decoded.image.size) == (size, (size[0] // 2, size[1] // 2))
    levels = np.asarray(decoded.image.resize((8, 8)))[..., 0].astype(int)
    assert (levels[0] < levels[7]).all() if orientation == 1 else (levels[:, 0] > levels[:, 7]).all()


def test_a_photo_of_200_megapixels_is_no_bomb_and_a_png_of_that_size_is_one(tmp_path: Path) -> None:
    content = bytearray(_jpeg(progressive=False))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 12_240, 16_320)
    assert decode(tmp_path / "200.jpg", bytes(content)).size == (16_320, 12_240)
    with pytest.raises(UnreadableImageError, match="bomb"):
        decode(tmp_path / "200.png", _png(16_320, 12_240, 8, 2, bytes(1000)))


def _jpeg(progressive: bool) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


def test_a_jpeg_may_be_decoded_smaller_but_not_below_the_size_that_is_enough(tmp_path: Path, picture: Draw) -> None:
    picture(1, (1600, 1200)).save(tmp_path / "a.jpg", quality=95)
    whole, small = decode(tmp_path / "a.jpg"), decode(tmp_path / "a.jpg", at_least=300)
    assert (small.size, small.image.size, whole.image.size) == ((1600, 1200), (400, 300), (1600, 1200))
    difference = np.asarray(small.image, int) - np.asarray(whole.image.reduce(4), int)
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize(("colour_type", "channels", "changes"), [(2, 3, ("16-bit",)), (6, 4, ("16-bit", "alpha"))])
def test_16_bit_colours_become_8_bit_ones(
    tmp_path: Path, colour_type: int, channels: int, changes: tuple[str, ...]
) -> None:
    row = b"\0" + bytes([200, 17] * channels * 8)
    (tmp_path / "a.png").write_bytes(_png(8, 8, 16, colour_type, row * 8))
    decoded = decode(tmp_path / "a.png")
    assert decoded.changes == changes
    assert decoded.image.mode == "RGB"
    assert channels == 4 or decoded.image.getpixel((3, 3)) == (200, 200, 200)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, picture: Draw, name: str) -> None:
    first = picture(1)
    first.save(tmp_path / name, save_all=True, append_images=[picture(2)], lossless=True)
    decoded = decode(tmp_path / name)
    assert "animated" in decoded.changes
    assert np.abs(np.asarray(decoded.image, int) - np.asarray(first, int)).mean() < 12  # a GIF has 256 colours


def test_a_colour_profile_is_converted_to_srgb_and_srgb_is_not_changed(tmp_path: Path, picture: Draw) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(1).save(tmp_path / "srgb.png", icc_profile=srgb)
    assert decode(tmp_path / "srgb.png").changes == ()
    # The sRGB profile under another name, with red and green exchanged.
    swapped = srgb.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "other.png", icc_profile=_renamed(swapped))
    decoded = decode(tmp_path / "other.png")
    assert decoded.changes == ("colour profile",)
    red, green, _ = np.asarray(decoded.image)[0, 0]
    assert green > 200 > red


def _renamed(profile: bytes) -> bytes:
    return profile.replace("sRGB".encode("utf-16-be"), "Else".encode("utf-16-be")).replace(b"sRGB", b"Else")


def test_a_broken_colour_profile_is_ignored(tmp_path: Path, picture: Draw) -> None:
    picture(1).save(tmp_path / "a.png", icc_profile=b"no profile at all")
    assert decode(tmp_path / "a.png").changes == ()


def _png(width: int, height: int, depth: int, colour_type: int, pixels: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><html><body>403</body></html>", "HTML in disguise"),
        (b'{"code": 50000, "message": "internal error"}', "JSON in disguise"),
        (b"Access denied, please come back later.\n", "text in disguise"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "XML or SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "text in disguise"),
        (bytes(range(256)) * 4, "unsupported format"),
        (_png(50_000, 50_000, 8, 2, bytes(1000)), "decompression bomb"),
    ],
)
def test_a_file_that_is_not_an_image_is_unreadable_for_a_given_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=reason):
        open_rgb(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.tif", "a.heic", "a.avif"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_unreadable(tmp_path: Path, picture: Draw, name: str, share: float) -> None:
    path = tmp_path / name
    picture(1).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnreadableImageError):
        open_rgb(path)


def test_damage_raises_no_other_error(tmp_path: Path, picture: Draw) -> None:
    random = np.random.default_rng(0)
    for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "HEIF", "AVIF"):
        buffer = io.BytesIO()
        picture(1, (40, 30)).save(buffer, name)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for position in random.integers(0, len(content), 8):
                content[position] = int(random.integers(256))
            with contextlib.suppress(UnreadableImageError):
                assert decode(tmp_path / "x", bytes(content)).image.mode == "RGB"


@pytest.mark.parametrize(
    ("name", "file_format", "expected"),
    [
        ("a.jpg", "JPEG", "a.jpg"),
        ("a.JPEG", "JPEG", "a.JPEG"),
        ("a.jpg", "PNG", "a.png"),
        ("a.png", "MPO", "a.jpg"),
        ("a.HEIC", "HEIF", "a.HEIC"),
        ("no extension", "WEBP", "no extension.webp"),
        ("v1.5", "JPEG", "v1.5.jpg"),
    ],
)
def test_the_extension_is_made_to_fit_the_format(name: str, file_format: str, expected: str) -> None:
    assert right_extension(name, file_format) == expected
