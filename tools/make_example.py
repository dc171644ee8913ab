"""Draw the example of one subject: Pip, a penguin with a scarf and a hat, and photos of other penguins.

python tools/make_example.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import numpy as np

from world.captions import PLACE_WORDS
from world.individuals import OTHERS, PIP, Clothes, penguin
from world.pictures import EXAMPLE_SEEDS

ROOT = Path(__file__).parents[1]
PHOTOS, PHOTOS_OF_OTHERS = 16, 12
# Where the penguins are photographed. The contexts in params.yaml are other places.
PLACES = ("flowers", "forest", "grass", "lake", "sand")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "examples" / "pip" / "photos", show_default=False
)
@click.option("--photos", default=PHOTOS, show_default=True, help="Of Pip.")
def main(out: Path, photos: int) -> None:
    """Write the folders pip and other-penguins below OUT."""
    write(out / "pip", (PIP,), photos, EXAMPLE_SEEDS, "a photo of sks penguin")
    write(out / "other-penguins", OTHERS, PHOTOS_OF_OTHERS, EXAMPLE_SEEDS + 1000)


def write(folder: Path, individuals: tuple[Clothes, ...], count: int, first_seed: int, words: str = "") -> None:
    """Write `count` pictures, each individual equally often, in random places and sizes.

    With `words`, write a caption beside each: these words and the place, as comma-separated tags.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for number in range(count):
        seed = first_seed + number
        rng = np.random.default_rng(seed)
        place, size = str(rng.choice(PLACES)), int(rng.integers(96, 161))
        picture = penguin(individuals[number % len(individuals)], place, seed, size)
        path = folder / f"{folder.name}_{number:02d}.jpg"
        picture.save(path, quality=92)
        if words:
            path.with_suffix(".txt").write_text(f"{words}, {PLACE_WORDS[place][0]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
