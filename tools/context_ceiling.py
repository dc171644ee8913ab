"""Print what drawn pictures of Pip score in the places of `profile: subject`, beside drawings of plain penguins.

The prompts have the class word in place of the name, as in `prompt_following`: they name no clothes, so even perfect
pictures of Pip lose points.

python tools/context_ceiling.py
"""

from __future__ import annotations

from pathlib import Path

import click

from bestiary.evaluation.judge import Judge
from world.captions import PLACE_WORDS
from world.individuals import PIP, Clothes, penguin

ROOT = Path(__file__).parents[1]
PLACES = ("snow", "savanna", "sea", "night", "sky", "leaf")
FIRST_SEED, SIDE = 90_000, 64  # seeds that no bundled picture has; pixels of a picture


@click.command()
@click.option("--pictures", default=30, show_default=True, help="Of each penguin in each place.")
def main(pictures: int) -> None:
    """Print the mean CLIP score of both penguins in each place and in all."""
    judge = Judge.load(str(ROOT / "models" / "judge"), None, "cpu")
    means = {place: [mean_score(judge, clothes, place, pictures) for clothes in (PIP, Clothes())] for place in PLACES}
    for place, (pip, plain) in means.items():
        click.echo(f"{place:8} Pip {pip:.1f}, plain {plain:.1f}, difference {pip - plain:.1f}")
    pip, plain = (sum(column) / len(PLACES) for column in zip(*means.values(), strict=True))
    click.echo(f"all      Pip {pip:.1f}, plain {plain:.1f}, difference {pip - plain:.1f}")


def mean_score(judge: Judge, clothes: Clothes, place: str, pictures: int) -> float:
    """The mean of 100 x the cosine of drawings with the place's prompts."""
    prompts = [f"a photo of a penguin {words}" for words in PLACE_WORDS[place]]
    drawn = [penguin(clothes, place, FIRST_SEED + number, 96).resize((SIDE, SIDE)) for number in range(pictures)]
    cosines = judge.image_features(drawn) @ judge.text_features(prompts).T
    return 100 * float(cosines.mean())


if __name__ == "__main__":
    main()
