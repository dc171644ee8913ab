"""Plants faults among good images, and remembers where: the ground truth that cleaning is measured against."""

import io
import random
import shutil
from pathlib import Path

from PIL import Image, ImageOps

NEAR = ("resize", "re-encode", "crop", "mirror")


def plant(root: Path, share: float, seed: int = 0, off_topic: list[Image.Image] | None = None) -> dict[str, list[str]]:
    """Plant `share` of all images of each kind into the class folders of `root`; the paths planted of each kind.

    For a copy the original counts as well found: which of two is thrown out is cleaning's choice. So the paths of
    copies are returned as `original|copy`.
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
    for number, image in enumerate((off_topic or [])[:count]):
        path = dice.choice(good).parent / f"off topic {number}.jpg"
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
