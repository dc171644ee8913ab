"""Plants faults among good images and records where: the ground truth that cleaning is measured against."""

import csv
import io
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[2]
SAMPLE_FAULTS = ROOT / "tests" / "data" / "planted_faults.csv"
NEAR = ("resize", "re-encode", "crop", "mirror")


def copy_sample(root: Path, classes: Sequence[str] | None = None, images_per_class: int | None = None) -> None:
    """Copy the bundled sample to `root`, without the faults that it contains."""
    with SAMPLE_FAULTS.open(encoding="utf-8") as file:
        faulty = {row["path"] for row in csv.DictReader(file)}
    for folder in sorted((ROOT / "samples").iterdir()):
        if classes is None or folder.name in classes:
            good = [path for path in sorted(folder.iterdir()) if f"{folder.name}/{path.name}" not in faulty]
            (root / folder.name).mkdir(parents=True)
            for path in good[:images_per_class]:
                shutil.copyfile(path, root / folder.name / path.name)


def draw_off_topic(count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """Draw new pictures in the sample's style, by turns of an animal and of another thing; return what each shows."""
    sys.path.append(str(ROOT / "tools"))
    from world.figures import LOOKS
    from world.scenes import render
    from world.things import render_thing

    dice, animals = random.Random(seed), tuple(LOOKS)
    drawn: list[tuple[str, Image.Image]] = []
    for number in range(count):
        size, drawing_seed = dice.randint(96, 160), 97_000_000 + 1000 * seed + number
        if number % 2:
            thing = ("landscape", "house", "car", "page of text")[number // 2 % 4]
            drawn.append((thing, render_thing(thing, drawing_seed, size=size)))
        else:
            animal = dice.choice(animals)
            drawn.append((animal, render(animal, "photo", drawing_seed, size=size)))
    return drawn


def plant(
    root: Path, share: float, seed: int = 0, off_topic: Sequence[tuple[str, Image.Image]] = ()
) -> dict[str, list[str]]:
    """Plant each kind of fault into the class folders of `root`, `share` of all images per kind; return their paths.

    Cleaning may reject either of two copies, so finding the original counts as well: the entry of a copy is
    `original|copy`. `off_topic` are pictures with what they show; they go into folders of other classes.
    """
    dice = random.Random(seed)
    good = sorted(path for path in root.glob("*/*") if path.is_file())
    count = max(2, round(share * len(good)))
    planted: dict[str, list[str]] = {"broken": [], "exact": [], **{kind: [] for kind in NEAR}, "off topic": []}
    fresh = iter(dice.sample(good, min(len(good), count * 6)))

    def name(path: Path) -> str:
        return path.relative_to(root).as_posix()

    for number in range(count):
        folder = dice.choice(good).parent
        broken = folder / f"broken {number}.jpg"
        content = dice.choice(good).read_bytes()
        broken.write_bytes([b"", content[: len(content) // 2], b"<html>not here</html>", b"gone"][number % 4])
        planted["broken"].append(name(broken))
        original = next(fresh)
        copy = original.with_name(f"copy {number}{original.suffix}")
        shutil.copyfile(original, copy)
        planted["exact"].append(f"{name(original)}|{name(copy)}")
        for kind in NEAR:
            original = next(fresh)
            copy = original.with_name(f"{kind} {number}.jpg")
            copy.write_bytes(_near_duplicate(Image.open(original).convert("RGB"), kind, dice))
            planted[kind].append(f"{name(original)}|{name(copy)}")
    folders = sorted({path.parent for path in good})
    for number, (shown, image) in enumerate(off_topic):
        folder = dice.choice([folder for folder in folders if folder.name != shown])
        path = folder / f"off topic {number}.jpg"
        image.save(path, quality=92)
        planted["off topic"].append(name(path))
    return planted


def recall(planted: Sequence[str], quarantined: set[str]) -> float:
    """Return the share of the planted entries that were quarantined."""
    return sum(any(path in quarantined for path in entry.split("|")) for entry in planted) / len(planted)


def faulty_paths(planted: dict[str, list[str]]) -> set[str]:
    """Return all paths that a planted fault concerns."""
    return {path for entries in planted.values() for entry in entries for path in entry.split("|")}


def _near_duplicate(image: Image.Image, kind: str, dice: random.Random) -> bytes:
    width, height = image.size
    if kind == "resize":
        factor = dice.uniform(0.55, 0.9)
        image = image.resize((int(width * factor), int(height * factor)), Image.Resampling.LANCZOS)
    if kind == "crop":
        left, top, right, bottom = (dice.uniform(0.0, 0.06) for _ in range(4))
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        image = image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    if kind == "mirror":
        image = ImageOps.mirror(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=dice.randint(40, 60) if kind == "re-encode" else 90)
    return buffer.getvalue()
