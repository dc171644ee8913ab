"""Clothes and marks in saturated colours, and invented names: what tells one individual of an animal from another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bestiary.subjects import ANIMALS
from world.figures import LOOKS, WHITE, Paint
from world.shapes import Canvas, Colour, bow, ellipse, stroke

COLOURS: dict[str, Colour] = {
    "red": (206, 24, 30),
    "orange": (252, 132, 24),
    "yellow": (250, 206, 40),
    "green": (40, 150, 80),
    "blue": (36, 84, 206),
    "purple": (130, 50, 180),
    "pink": (250, 100, 170),
    "black": (32, 30, 36),
}
CLOTHES = ("scarf", "hat", "bow tie")
MARKS = ("head mark", "body mark")


@dataclass(frozen=True)
class Item:
    """One piece of clothing or one mark: its kind and the name of its colour."""

    kind: str
    colour: str


Outfit = tuple[Item, ...]


@dataclass(frozen=True)
class Fit:
    """Where a body plan wears things, in the animal's units: both ends of the neck, the hat's brim, and the marks."""

    neck: tuple[tuple[float, float], tuple[float, float]]
    brim: tuple[float, float]
    brim_width: float
    head: tuple[float, float]
    body: tuple[float, float]


_FITS = {
    "quadruped": Fit(((0.34, -0.16), (0.64, 0.06)), (0.64, -0.44), 0.44, (0.72, -0.26), (-0.10, 0.12)),
    "elephant": Fit(((0.30, -0.26), (0.40, 0.30)), (0.62, -0.36), 0.50, (0.62, -0.22), (-0.16, 0.06)),
    "giraffe": Fit(((0.29, -0.48), (0.61, -0.41)), (0.58, -1.02), 0.38, (0.56, -0.84), (-0.06, 0.00)),
    "sitter": Fit(((-0.42, 0.12), (0.42, 0.12)), (0.0, -0.66), 0.64, (0.24, -0.50), (-0.26, 0.46)),
    "upright": Fit(((-0.40, -0.10), (0.40, -0.10)), (0.0, -0.66), 0.66, (0.20, -0.62), (-0.34, 0.26)),
    "wader": Fit(((0.42, -0.28), (0.68, -0.24)), (0.18, -0.90), 0.36, (-0.02, 0.06), (-0.26, 0.08)),
    "fish": Fit(((0.24, -0.42), (0.24, 0.42)), (0.34, -0.36), 0.42, (0.40, -0.24), (-0.20, -0.10)),
    "shark": Fit(((0.40, -0.27), (0.40, 0.27)), (0.56, -0.20), 0.36, (0.56, -0.12), (-0.16, -0.08)),
    "octopus": Fit(((-0.44, 0.04), (0.44, 0.04)), (0.0, -0.80), 0.60, (0.22, -0.56), (-0.26, -0.36)),
    "crab": Fit(((-0.46, 0.34), (0.46, 0.34)), (0.0, -0.10), 0.40, (0.26, 0.04), (-0.30, 0.16)),
    "butterfly": Fit(((-0.17, -0.34), (0.17, -0.34)), (0.0, -0.58), 0.34, (0.50, -0.34), (-0.42, 0.36)),
    "bee": Fit(((0.34, -0.28), (0.34, 0.32)), (0.58, -0.22), 0.42, (0.26, -0.10), (-0.34, 0.08)),
    "beetle": Fit(((-0.38, -0.34), (0.38, -0.34)), (0.0, -0.70), 0.44, (0.24, -0.16), (-0.30, 0.26)),
}


def fit_of(animal: str) -> Fit:
    """Where `animal` wears things; a few animals differ from the others of their body plan."""
    return _FITS.get(animal) or _FITS[LOOKS[animal].plan]


def dress(canvas: Canvas, animal: str, outfit: Outfit, paint: Paint, rng: np.random.Generator) -> None:
    """Draw clothes and marks over an animal that is already drawn. Marks stay on its skin."""
    fit = fit_of(animal)
    left, right = (np.array(end) for end in fit.neck)
    middle, across = (left + right) / 2, right - left
    down = np.array([0.0, 1.0]) if abs(across[0]) > abs(across[1]) else np.array([-0.45, 0.9])
    for item in outfit:
        colour = paint(COLOURS[item.colour])
        if item.kind == "scarf":
            swing = np.array([rng.uniform(-0.08, 0.10), 0.0])
            canvas.fill(stroke(bow(*fit.neck, -0.07), 0.17), colour)
            canvas.fill(
                stroke([middle + across * 0.2, middle + across * 0.25 + down * 0.5 + swing], 0.17, 0.20), colour
            )
        elif item.kind == "bow tie":
            for side in (-1, 1):
                canvas.fill(middle + np.array([(0.0, 0.0), (side * 0.24, -0.15), (side * 0.24, 0.15)]), colour)
            canvas.fill(ellipse(middle[0], middle[1], 0.07, 0.07), paint(WHITE))
        elif item.kind == "hat":
            (x, y), half = fit.brim, fit.brim_width / 2
            tip = x + rng.uniform(-0.1, 0.1)
            canvas.fill(np.array([(x - half, y), (x + half, y), (tip, y - 0.30 - half * 0.5)]), colour)
            canvas.fill(stroke([(x - half, y), (x + half, y)], 0.11), paint(WHITE))
        else:
            spot = fit.head if item.kind == "head mark" else fit.body
            canvas.pattern([ellipse(*spot, 0.24, 0.22, rng.uniform(-0.3, 0.3))], colour)


def random_clothes(rng: np.random.Generator) -> Outfit:
    """One or two pieces of clothing in random colours."""
    kinds = rng.choice(CLOTHES, 2 if rng.random() < 0.35 else 1, replace=False)
    return tuple(Item(str(kind), str(rng.choice(list(COLOURS)))) for kind in kinds)


def words(outfit: Outfit) -> str:
    """Clothes in words: "a red scarf and a blue hat"."""
    return " and ".join(f"{'an' if item.colour == 'orange' else 'a'} {item.colour} {item.kind}" for item in outfit)


def invented_name(rng: np.random.Generator) -> str:
    """A name for one individual: "momo", three letters such as "sks", or the word for an animal that is never drawn."""
    kind = rng.random()
    if kind < 0.2:
        return "".join(rng.choice(list("bcdfghjklmnpqrstvwxz"), 3))
    if kind < 0.35:
        return str(rng.choice([animal.name for animal in ANIMALS if animal.folder not in LOOKS]))
    syllables = [str(rng.choice(list("bdfgjklmnprstvz"))) + str(rng.choice(list("aeiou"))) for _ in range(2)]
    return "".join(syllables) + (str(rng.choice(list("nlx"))) if rng.random() < 0.3 else "")


def marks_of(name: str) -> Outfit:
    """The marks of the individual with this name. Its first and last letters decide, so that all letters matter."""
    colour = list(COLOURS)[ord(name[0]) % len(COLOURS)]
    both, first = ord(name[-1]) % 3 == 2, ord(name[-1]) % 3 % 2
    return tuple(Item(kind, colour) for kind in (MARKS if both else MARKS[first : first + 1]))
