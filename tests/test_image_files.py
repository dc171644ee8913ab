import io
import os
from pathlib import Path

import pytest
from PIL import Image

from bestiary import image_files
from bestiary.errors import BestiaryError
from bestiary.image_files import MAX_SCANS, UnreadableImageError, count_scans, open_image

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n%%EOF\n"


def jpeg(progressive: bool = True) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


def with_more_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    content = jpeg()
    last, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[last:end] * count + content[end:]


@pytest.mark.parametrize("name", ["nice-tiger.png", "nice-tiger.jpg", "nice-tiger.eps"])
def test_postscript_starts_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    program, marker = tmp_path / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(UnreadableImageError, match="text in disguise"):
        open_image(tmp_path / name).load()
    assert not marker.exists()


@pytest.mark.parametrize("file_format", ["PCX", "PPM", "TGA", "SGI", "ICO", "ICNS", "DDS", "JPEG2000", "PDF", "IM"])
def test_formats_that_photographs_do_not_use_stay_closed(tmp_path: Path, file_format: str) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "a.png", file_format)
    with pytest.raises(UnreadableImageError):
        open_image(tmp_path / "a.png")


def test_only_the_formats_asked_for_are_opened(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif")
    assert open_image(tmp_path / "a.gif").format == "GIF"
    with pytest.raises(UnreadableImageError, match="unsupported format"):
        open_image(tmp_path / "a.gif", formats=("PNG", "JPEG"))


def test_a_jpeg_with_endless_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    assert count_scans(jpeg(progressive=False)) == 1
    usual = count_scans(jpeg())
    assert count_scans(with_more_scans(7)) == usual + 7
    open_image(tmp_path / "a.jpg", with_more_scans(MAX_SCANS - usual)).load()
    with pytest.raises(UnreadableImageError, match=f"a JPEG of {MAX_SCANS + 1} scans"):
        open_image(tmp_path / "a.jpg", with_more_scans(MAX_SCANS - usual + 1))


def test_few_scans_of_very_many_pixels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_SCANNED_PIXELS", 256 * 256 * 10)
    open_image(tmp_path / "a.jpg", jpeg())
    with pytest.raises(UnreadableImageError, match="a JPEG of 11 scans"):
        open_image(tmp_path / "a.jpg", with_more_scans(1))


def test_what_follows_the_picture_is_not_taken_for_scans(tmp_path: Path) -> None:
    """Phones append a film, or further pictures with scans of their own."""
    assert count_scans(jpeg() + b"\xff\xda" * 1000) == count_scans(jpeg())
    plain = jpeg(progressive=False)
    thumbnail = plain[:2] + b"\xff\xe1" + (len(plain) + 2).to_bytes(2, "big") + plain + plain[2:]
    assert count_scans(thumbnail) == 1


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.jpg").write_bytes(jpeg())
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 2**10)
    with pytest.raises(UnreadableImageError, match="larger than"):
        open_image(tmp_path / "large.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="not a file"):
        open_image(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="not a file"):
        open_image(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=r"cat\.png does not exist"):
        open_image(tmp_path / "cat.png")
