"""Draw the bundled sample: 16 class folders of 40 pictures with the faults that web data sets have.

    python tools/make_samples.py

The planted faults are listed in tests/data/planted_faults.csv, and tests check that cleaning finds them.
"""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageEnhance
from tqdm import tqdm

from world.pictures import ANIMALS, SAMPLE_SEEDS, THINGS
from world.scenes import render
from world.things import render_thing

ROOT = Path(__file__).parents[1]
PICTURES_PER_CLASS = 40
ERROR_PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body><h1>Not Found</h1></body></html>\n"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "samples", show_default=False)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    default=ROOT / "tests" / "data" / "planted_faults.csv",
    show_default=False,
)
def main(out: Path, record: Path) -> None:
    """Draw the pictures, plant the faults, and write the list of faults."""
    if out.exists():
        shutil.rmtree(out)
    for number, animal in enumerate(tqdm(ANIMALS, desc="draw samples", unit="class")):
        folder = out / animal
        folder.mkdir(parents=True)
        for i in range(PICTURES_PER_CLASS):
            seed = SAMPLE_SEEDS + number * 1000 + i
            rng = np.random.default_rng(seed)
            picture = render(animal, "photo", seed, size=int(rng.integers(96, 161)))
            name = f"{animal}_{i:03d}"
            if rng.random() < 0.15:
                picture.save(folder / f"{name}.png", optimize=True)
            else:
                picture.save(
                    folder / f"{name}.{rng.choice(['jpg', 'jpeg'], p=[0.9, 0.1])}", quality=int(rng.integers(85, 95))
                )
    with record.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "fault", "of"])
        writer.writerows(plant(out, np.random.default_rng(SAMPLE_SEEDS)))


def plant(out: Path, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Plant each kind of fault in the folders; return (path, kind, the path it copies or "") of each."""
    planted: list[tuple[str, str, str]] = []
    originals = sorted(path for path in out.rglob("*.jpg"))
    rng.shuffle(originals)

    def put(source: Path, fault: str, data: bytes, suffix: str = ".jpg", copies: bool = False) -> None:
        path = source.with_name(f"{source.parent.name}_{len(planted) + PICTURES_PER_CLASS:03d}{suffix}")
        path.write_bytes(data)
        planted.append((path.relative_to(out).as_posix(), fault, source.relative_to(out).as_posix() if copies else ""))

    for cut in (0.0, 0.3, 0.5, 0.7):
        data = originals[-1].read_bytes()
        put(originals.pop(), "truncated", data[: int(len(data) * cut)])
    for _ in range(2):
        put(originals.pop(), "html", ERROR_PAGE)
    for _ in range(4):
        source = originals.pop()
        put(source, "exact_duplicate", source.read_bytes(), copies=True)
    for change in (_resized, _recompressed, _cropped, _brightened, _resized, _cropped):
        source = originals.pop()
        put(source, "near_duplicate", _jpeg(change(Image.open(source).convert("RGB"))), copies=True)
    for thing in THINGS[1:3]:  # a house, a car
        put(originals.pop(), "off_topic", _jpeg(render_thing(thing, SAMPLE_SEEDS, size=128)))
    for animal, fault in (("lion", "exif_rotated"), ("owl", "alpha"), ("crab", "wrong_extension")):
        drawn = render(animal, "photo", SAMPLE_SEEDS - 1 - len(planted), size=128)
        source = out / animal / "x"
        if fault == "exif_rotated":
            exif = Image.Exif()
            exif[0x0112] = 6  # orientation: viewers rotate it by 90 degrees
            buffer = io.BytesIO()
            drawn.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=92, exif=exif)
            put(source, fault, buffer.getvalue())
        elif fault == "alpha":
            cover = Image.radial_gradient("L").resize(drawn.size).point(lambda far: 255 if far < 185 else 0)
            drawn.putalpha(cover)
            put(source, fault, _png(drawn), suffix=".png")
        else:
            put(source, fault, _png(drawn))
    return planted


def _resized(picture: Image.Image) -> Image.Image:
    return picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.Resampling.LANCZOS)


def _recompressed(picture: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(_jpeg(picture, quality=45)))


def _cropped(picture: Image.Image) -> Image.Image:
    edge = picture.width // 32
    return picture.crop((edge, edge, picture.width - edge, picture.height - edge))


def _brightened(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.08)


def _jpeg(picture: Image.Image, quality: int = 88) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
