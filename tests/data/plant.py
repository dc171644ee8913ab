"""Plants faults among good images, and remembers where: the ground truth that cleaning is measured against."""

import csv
import io
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).parents[2]
NEAR = ("resize", "re-encode", "crop", "mirror")


def copy_sample(root: Path, classes: Sequence[str] | None = None, images_per_class: int | None = None) -> None:
    """The embedded sample in `root`, without the faults that it carries."""
    with (ROOT / "tests" / "data" / "planted_faults.csv").open(encoding="utf-8") as file:
        faulty = {row["path"] for row in csv.DictReader(file)}
    for folder in sorted((ROOT / "samples").iterdir()):
        if classes is None or folder.name in classes:
            good = [path for path in sorted(folder.iterdir()) if f"{folder.name}/{path.name}" not in faulty]
            (root / folder.name).mkdir(parents=True)
            for path in good[:images_per_class]:
                shutil.copyfile(path, root / folder.name / path.name)


def draw_off_topic(count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """New pictures in the style of the embedded sample, of animals and of other things by turns, and what they show."""
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
    """Plant `share` of all images of each kind into the class folders of `root`; the paths planted of each kind.

    For a copy the original counts as well found: which of two is thrown out is cleaning's choice. So the paths of
    copies are returned as `original|copy`. `off_topic` are pictures with the class that they show: they go into others.
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
            copy.write_bytes(_near(Image.open(original).convert("RGB"), kind, dice))
            planted[kind].append(f"{name(original)}|{name(copy)}")
    folders = sorted({path.parent for path in good})
    for number, (shown, image) in enumerate(off_topic):
        folder = dice.choice([folder for folder in folders if folder.name != shown])
        path = folder / f"off topic {number}.jpg"
        image.save(path, quality=92)
        planted["off topic"].append(name(path))
    return planted


def _near(image: Image.Image, kind: str, dice: random.Random) -> bytes:
    width, height = image.size
    if kind == "resize":
        factor = dice.uniform(0.55, 0.9)
        image = image.resize((int(width * factor), int(height * factor)), Image.Resampling.LANCZOS)
    if kind == "crop":
        left, top, right, bottom = (dice.uniform(0.0, 0.06) for _ in range(4))
        box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
        image = image.crop(tuple(int(edge) for edge in box))
    if kind == "mirror":
        image = ImageOps.mirror(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=dice.randint(40, 60) if kind == "re-encode" else 90)
    return buffer.getvalue()


def recall(planted: list[str], quarantined: set[str]) -> float:
    """The share of what was planted that was found."""
    return sum(any(path in quarantined for path in entry.split("|")) for entry in planted) / len(planted)


def wrongly_dropped(planted: dict[str, list[str]], quarantined: set[str]) -> set[str]:
    """What was thrown out though nothing was wrong with it."""
    faulty = {path for entries in planted.values() for entry in entries for path in entry.split("|")}
    return quarantined - faulty
