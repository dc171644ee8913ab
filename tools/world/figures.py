"""The drawn animals: a table of what each looks like, and one function per body plan that draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from world.shapes import Canvas, Colour, Points, bow, burst, ellipse, stroke

INK: Colour = (24, 22, 26)
WHITE: Colour = (250, 250, 248)


@dataclass(frozen=True)
class Look:
    """What one animal looks like: body plan, colours, habitat, and a pattern that only the photo style shows."""

    plan: str
    body: Colour
    accent: Colour
    habitat: str
    belly: Colour = WHITE
    pattern: str | None = None
    pattern_colour: Colour = INK
    features: frozenset[str] = frozenset()
    size: float = 1.0


LOOKS: dict[str, Look] = {
    "zebra": Look(
        "quadruped",
        (240, 238, 232),
        (40, 38, 42),
        "grass",
        pattern="stripes",
        features=frozenset({"crest", "long_face"}),
    ),
    "elephant": Look("quadruped", (132, 138, 154), (168, 150, 160), "grass", features=frozenset({"trunk", "stout"})),
    "giraffe": Look(
        "quadruped",
        (244, 206, 104),
        (150, 84, 36),
        "savanna",
        pattern="patches",
        pattern_colour=(160, 86, 32),
        features=frozenset({"long_neck", "ossicones", "long_face"}),
        size=0.86,
    ),
    "tiger": Look(
        "sitter",
        (242, 140, 40),
        (255, 240, 220),
        "forest",
        pattern="face_stripes",
        features=frozenset({"round_ears", "muzzle"}),
    ),
    "lion": Look(
        "sitter", (232, 176, 84), (150, 72, 24), "savanna", features=frozenset({"mane", "round_ears", "muzzle"})
    ),
    "panda": Look(
        "sitter",
        (246, 246, 244),
        (34, 32, 38),
        "forest",
        pattern="panda",
        features=frozenset({"round_ears", "dark_limbs"}),
    ),
    "penguin": Look("upright", (44, 54, 78), (250, 164, 40), "snow", features=frozenset({"beak", "feet"})),
    "owl": Look(
        "upright",
        (150, 102, 62),
        (246, 176, 48),
        "night",
        belly=(226, 196, 152),
        pattern="feathers",
        pattern_colour=(120, 78, 44),
        features=frozenset({"tufts", "disc_eyes", "beak", "feet"}),
    ),
    "flamingo": Look("wader", (250, 112, 152), (44, 40, 46), "lake", pattern="plumes", pattern_colour=(222, 62, 116)),
    "shark": Look(
        "fish",
        (96, 126, 158),
        (78, 106, 138),
        "sea",
        belly=(238, 242, 246),
        pattern="gills",
        pattern_colour=(52, 70, 92),
        features=frozenset({"shark"}),
    ),
    "goldfish": Look(
        "fish",
        (252, 138, 28),
        (255, 196, 70),
        "sea",
        pattern="scales",
        pattern_colour=(226, 96, 16),
        features=frozenset({"veil"}),
        size=0.9,
    ),
    "octopus": Look(
        "octopus", (168, 76, 178), (230, 150, 220), "sea", pattern="suckers", pattern_colour=(236, 170, 226)
    ),
    "crab": Look("crab", (226, 62, 44), (250, 150, 110), "sand", pattern="shell", pattern_colour=(250, 150, 110)),
    "butterfly": Look(
        "butterfly", (70, 110, 230), (46, 38, 52), "flowers", pattern="eyespots", pattern_colour=(255, 210, 64)
    ),
    "bee": Look("bee", (252, 204, 44), (50, 40, 32), "sky", pattern="bands"),
    "ladybugs": Look("beetle", (226, 40, 36), (30, 28, 32), "leaf", pattern="dots"),
}

Paint = Callable[[Colour], Colour]
Grow = Callable[[], None]


def draw(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, detailed: bool) -> None:
    """Draw one animal in a random pose; `paint` converts the table's colours to the style's."""

    def grow() -> None:
        if detailed and look.pattern is not None:
            canvas.pattern(_PATTERNS[look.pattern](rng), paint(look.pattern_colour))

    _PLANS[look.plan](canvas, look, paint, rng, grow)


def _eye(canvas: Canvas, x: float, y: float, radius: float, white: bool = False) -> None:
    if white:
        canvas.fill(ellipse(x, y, radius * 1.7, radius * 1.7), WHITE)
    canvas.fill(ellipse(x, y, radius, radius), INK)
    canvas.fill(ellipse(x + radius * 0.3, y - radius * 0.35, radius * 0.35, radius * 0.35, corners=10), WHITE)


def _quadruped(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent, features = paint(look.body), paint(look.accent), look.features
    shade = paint(tuple(int(c * 0.8) for c in look.body))  # type: ignore[arg-type]
    stout = 1.4 if "stout" in features else 1.0
    tall = "long_neck" in features
    leg, width = (0.62 if tall else 0.48), 0.15 * stout
    floor, belly = 0.78, 0.78 - leg
    gait = rng.uniform(-0.12, 0.12)
    for x, colour, step in ((-0.36, shade, gait), (0.26, shade, -gait), (-0.22, body, -gait), (0.40, body, gait)):
        canvas.fill(stroke([(x, belly - 0.1), (x + step, floor)], width, width * 0.8), colour, skin=True)
        canvas.fill(ellipse(x + step, floor, width * 0.52, 0.05), accent)
    tail = rng.uniform(-0.08, 0.12)
    canvas.fill(stroke(bow((-0.50, belly - 0.28), (-0.66 - tail, belly + 0.18), 0.08), 0.07, 0.05), body)
    canvas.fill(ellipse(-0.66 - tail, belly + 0.22, 0.06, 0.10), accent)
    girth = 0.24 * stout
    canvas.fill(ellipse(0.0, belly - 0.16 * stout, 0.56, girth), body, skin=True)
    nod = rng.uniform(-0.06, 0.06)
    if "trunk" in features:
        x, y = 0.60, belly - 0.42 + nod
        canvas.fill(ellipse(x, y, 0.28, 0.27), body, skin=True)
        curl = rng.uniform(-0.12, 0.16)
        canvas.fill(stroke(bow((x + 0.18, y + 0.08), (x + 0.26 + curl, y + 0.74), -0.10), 0.19, 0.10), body, skin=True)
        canvas.fill(stroke(bow((x + 0.10, y + 0.20), (x + 0.40, y + 0.30), 0.07), 0.09, 0.03), WHITE)
        canvas.fill(ellipse(x - 0.22, y + 0.02, 0.24, 0.32, 0.1), shade)
        canvas.fill(ellipse(x - 0.20, y + 0.03, 0.16, 0.24, 0.1), accent)
        grow()
        _eye(canvas, x + 0.12, y - 0.06, 0.05)
        return
    x, y = (0.58, belly - 1.02 + nod) if tall else (0.68, belly - 0.58 + nod)
    canvas.fill(
        stroke([(0.34, belly - 0.14), (x - 0.04, y)], 0.34 if not tall else 0.28, 0.20 if not tall else 0.15),
        body,
        skin=True,
    )
    if "crest" in features:
        canvas.fill(stroke([(0.20, belly - 0.34), (x - 0.18, y - 0.06), (x - 0.06, y - 0.18)], 0.13, 0.10), accent)
    for dx in (-0.10, 0.02):
        canvas.fill(ellipse(x + dx, y - 0.18, 0.05, 0.11, -0.3 if dx < 0 else 0.3), body)
    if "ossicones" in features:
        for dx in (-0.03, 0.07):
            canvas.fill(stroke([(x + dx, y - 0.1), (x + dx * 1.6, y - 0.28)], 0.045), body)
            canvas.fill(ellipse(x + dx * 1.6, y - 0.29, 0.045, 0.045), accent)
    canvas.fill(ellipse(x + 0.10, y + 0.05, 0.24, 0.14, 0.42), body, skin=True)
    grow()
    canvas.fill(ellipse(x + 0.26, y + 0.13, 0.09, 0.09, 0.42), accent)
    _eye(canvas, x + 0.06, y - 0.02, 0.045)


def _sitter(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent, features = paint(look.body), paint(look.accent), look.features
    limb = accent if "dark_limbs" in features else body
    lean, nod = rng.uniform(-0.05, 0.05), rng.uniform(-0.04, 0.05)
    if "dark_limbs" not in features:
        tip = rng.uniform(-0.15, 0.10)
        canvas.fill(stroke(bow((0.30, 0.78), (0.78, 0.30 + tip), 0.16), 0.12, 0.10), body, skin=True)
        canvas.fill(ellipse(0.78, 0.29 + tip, 0.09, 0.09), accent if "mane" in features else paint(INK))
    for side in (-1, 1):
        canvas.fill(ellipse(side * 0.34, 0.78, 0.24, 0.17), limb, skin=limb == body)
    canvas.fill(ellipse(0.0, 0.46, 0.42, 0.46), body, skin=True)
    canvas.fill(ellipse(0.0, 0.56, 0.22, 0.28), paint(look.belly) if "mane" not in features else body)
    for side in (-1, 1):
        reach = 0.28 + rng.uniform(-0.03, 0.05)
        canvas.fill(stroke([(side * reach, 0.24), (side * 0.20, 0.84)], 0.20, 0.17), limb, skin=limb == body)
        canvas.fill(ellipse(side * 0.20, 0.86, 0.13, 0.08), limb)
    x, y = lean, -0.30 + nod
    if "mane" in features:
        canvas.fill(burst(x, y, 0.56, 0.68, 14), accent)
    for side in (-1, 1):
        ear = accent if "dark_limbs" in features else body
        canvas.fill(ellipse(x + side * 0.34, y - 0.34, 0.17, 0.17), ear)
        if "dark_limbs" not in features:
            canvas.fill(ellipse(x + side * 0.34, y - 0.34, 0.09, 0.09), paint((250, 190, 170)))
    canvas.fill(ellipse(x, y, 0.48, 0.44), body, skin=True)
    grow()
    for side in (-1, 1):
        if "dark_limbs" in features:
            canvas.fill(ellipse(x + side * 0.19, y - 0.02, 0.12, 0.15, side * 0.5), accent)
            canvas.fill(ellipse(x + side * 0.18, y - 0.04, 0.05, 0.05), WHITE)
            canvas.fill(ellipse(x + side * 0.18, y - 0.04, 0.03, 0.03), INK)
        else:
            _eye(canvas, x + side * 0.19, y - 0.06, 0.065)
    for side in (-1, 1):
        canvas.fill(ellipse(x + side * 0.09, y + 0.22, 0.13, 0.11), paint(WHITE))
    canvas.fill(np.array([(x - 0.10, y + 0.08), (x + 0.10, y + 0.08), (x, y + 0.20)]), INK)


def _upright(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent, features = paint(look.body), paint(look.accent), look.features
    flap = rng.uniform(0.0, 0.30)
    owl = "disc_eyes" in features
    for side in (-1, 1):
        canvas.fill(ellipse(side * 0.19, 0.88, 0.17, 0.08), accent)
        canvas.fill(ellipse(side * (0.44 + 0.14 * flap), 0.18, 0.12, 0.42, -side * (0.2 + flap)), body, skin=True)
    canvas.fill(ellipse(0.0, 0.26, 0.46, 0.64), body, skin=True)
    head = -0.42
    if "tufts" in features:
        for side in (-1, 1):
            canvas.fill(
                np.array([(side * 0.10, head - 0.26), (side * 0.44, head - 0.46), (side * 0.42, head - 0.02)]), body
            )
    canvas.fill(ellipse(0.0, head, 0.42 if owl else 0.34, 0.36 if owl else 0.34), body, skin=True)
    canvas.fill(ellipse(0.0, 0.36, 0.32, 0.50), paint(look.belly), skin=owl)
    grow()
    if owl:
        for side in (-1, 1):
            canvas.fill(ellipse(side * 0.19, head, 0.20, 0.20), accent)
            canvas.fill(ellipse(side * 0.18, head, 0.11, 0.11), INK)
            canvas.fill(ellipse(side * 0.18 + 0.03, head - 0.04, 0.04, 0.04), WHITE)
        canvas.fill(np.array([(-0.07, head + 0.10), (0.07, head + 0.10), (0.0, head + 0.28)]), paint((90, 70, 60)))
        return
    for side in (-1, 1):
        canvas.fill(ellipse(side * 0.12, head + 0.06, 0.15, 0.18), paint(look.belly))
        _eye(canvas, side * 0.13, head + 0.0, 0.05)
    canvas.fill(np.array([(-0.11, head + 0.09), (0.11, head + 0.09), (0.0, head + 0.26)]), accent)


def _wader(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent = paint(look.body), paint(look.accent)
    leg = paint((236, 120, 140))
    bend = rng.uniform(-0.10, 0.10)
    canvas.fill(stroke([(-0.10, 0.20), (-0.12 + bend, 0.54), (-0.10, 0.92)], 0.065), leg)
    canvas.fill(stroke([(0.04, 0.20), (0.10 - bend, 0.54), (0.06, 0.92)], 0.065), leg)
    for x in (-0.10, 0.06):
        canvas.fill(stroke([(x - 0.02, 0.92), (x + 0.16, 0.92)], 0.06), leg)
    canvas.fill(np.array([(-0.30, -0.08), (-0.78, 0.16), (-0.30, 0.26)]), body, skin=True)
    canvas.fill(ellipse(-0.06, 0.06, 0.46, 0.28, -0.12), body, skin=True)
    sway = rng.uniform(0.20, 0.30)
    t = np.linspace(0, 1, 18)
    neck = np.stack([0.32 + sway * np.sin(5.2 * t), 0.0 - 0.76 * t], axis=1)
    canvas.fill(stroke(neck, 0.15, 0.12), body)
    x, y = neck[-1, 0] + 0.08, -0.80
    canvas.fill(ellipse(x, y, 0.16, 0.13), body)
    canvas.fill(
        np.array([(x + 0.08, y - 0.08), (x + 0.34, y + 0.04), (x + 0.30, y + 0.20), (x + 0.08, y + 0.08)]),
        paint((250, 226, 190)),
    )
    canvas.fill(np.array([(x + 0.25, y), (x + 0.34, y + 0.04), (x + 0.29, y + 0.24), (x + 0.20, y + 0.13)]), accent)
    grow()
    _eye(canvas, x + 0.03, y - 0.03, 0.04)


def _fish(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent = paint(look.body), paint(look.accent)
    swing = rng.uniform(-0.10, 0.10)
    if "shark" in look.features:
        canvas.fill(np.array([(-0.66, 0.02), (-1.02, -0.44 + swing), (-0.84, 0.0), (-0.98, 0.32 + swing)]), accent)
        canvas.fill(np.array([(-0.18, -0.22), (-0.20, -0.68), (0.22, -0.24)]), accent)
        canvas.fill(ellipse(0.06, 0.0, 0.88, 0.30), body, skin=True)
        canvas.fill(ellipse(0.14, 0.16, 0.70, 0.15), paint(look.belly))
        grow()
        canvas.fill(np.array([(0.20, 0.14), (-0.12, 0.58), (0.38, 0.20)]), accent)
        canvas.fill(stroke(bow((0.56, 0.15), (0.84, 0.08), -0.05), 0.055), paint((90, 40, 50)))
        for x in (0.62, 0.70, 0.78):
            canvas.fill(np.array([(x - 0.035, 0.11), (x + 0.035, 0.10), (x, 0.18)]), WHITE)
        _eye(canvas, 0.64, -0.09, 0.05, white=True)
        return
    for dy in (-0.26, 0.26):
        canvas.fill(ellipse(-0.80, dy + swing, 0.34, 0.22, 0.6 * float(np.sign(dy)) * -1), accent)
    canvas.fill(ellipse(-0.06, -0.40, 0.34, 0.24, -0.25), accent)
    canvas.fill(ellipse(-0.02, 0.42, 0.22, 0.20, 0.4), accent)
    canvas.fill(ellipse(0.08, 0.0, 0.64, 0.46), body, skin=True)
    grow()
    canvas.fill(ellipse(-0.04, 0.12, 0.20, 0.11, 0.5), accent)
    canvas.fill(stroke(bow((0.56, 0.16), (0.70, 0.10), -0.03), 0.05), paint((170, 60, 20)))
    _eye(canvas, 0.44, -0.12, 0.075, white=True)


def _octopus(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body = paint(look.body)
    for k, x in enumerate((-0.42, -0.25, -0.08, 0.08, 0.25, 0.42)):
        reach, curl = x * 2.0 + rng.uniform(-0.06, 0.06), 0.16 * (1 if x > 0 else -1)
        down = 0.86 - 0.35 * abs(x) + rng.uniform(-0.06, 0.06)
        canvas.fill(stroke(bow((x, 0.10), (reach, down), curl * (1 if k % 2 else 0.4)), 0.20, 0.09), body, skin=True)
        canvas.fill(ellipse(reach + curl * 0.5, down - 0.03, 0.10, 0.08), body, skin=True)
    canvas.fill(ellipse(0.0, -0.36, 0.50, 0.54), body, skin=True)
    grow()
    for side in (-1, 1):
        _eye(canvas, side * 0.20, -0.14, 0.085, white=True)
    canvas.fill(stroke(bow((-0.10, 0.06), (0.10, 0.06), 0.05), 0.05), INK)


def _crab(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent = paint(look.body), paint(look.accent)
    lift = rng.uniform(-0.08, 0.12)
    for side in (-1, 1):
        for dy, reach in ((0.14, 0.80), (0.28, 0.74), (0.40, 0.58)):
            step = rng.uniform(-0.04, 0.04)
            canvas.fill(
                stroke(
                    [(side * 0.36, dy), (side * reach, dy + 0.06), (side * (reach + 0.08), dy + 0.34 + step)],
                    0.09,
                    0.05,
                ),
                body,
            )
        canvas.fill(stroke([(side * 0.42, 0.02), (side * 0.70, -0.14), (side * 0.66, -0.42 - lift)], 0.12), body)
        x, y = side * 0.64, -0.56 - lift
        canvas.fill(ellipse(x, y, 0.25, 0.21), body)
        canvas.fill(
            np.array([(x - side * 0.04, y), (x - side * 0.16, y - 0.30), (x + side * 0.10, y - 0.30)]),
            paint((110, 24, 20)),
        )
        canvas.fill(stroke([(side * 0.16, -0.06), (side * 0.17, -0.36)], 0.06), body)
        _eye(canvas, side * 0.17, -0.38, 0.075, white=True)
    canvas.fill(ellipse(0.0, 0.18, 0.56, 0.36), body, skin=True)
    grow()
    canvas.fill(stroke(bow((-0.16, 0.26), (0.16, 0.26), 0.08), 0.05), accent)


def _butterfly(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent = paint(look.body), paint(look.accent)
    spread = rng.uniform(0.82, 1.05)
    for side in (-1, 1):
        canvas.fill(ellipse(side * 0.48 * spread, -0.30, 0.50 * spread, 0.36, side * -0.65), accent)
        canvas.fill(ellipse(side * 0.40 * spread, 0.40, 0.38 * spread, 0.33, side * 0.7), accent)
        canvas.fill(ellipse(side * 0.48 * spread, -0.30, 0.42 * spread, 0.29, side * -0.65), body, skin=True)
        canvas.fill(ellipse(side * 0.40 * spread, 0.40, 0.31 * spread, 0.26, side * 0.7), body, skin=True)
    grow()
    canvas.fill(ellipse(0.0, 0.04, 0.08, 0.50), accent)
    canvas.fill(ellipse(0.0, -0.50, 0.11, 0.11), accent)
    for side in (-1, 1):
        canvas.fill(stroke(bow((side * 0.03, -0.56), (side * 0.28, -0.88), side * 0.05), 0.045), accent)
        canvas.fill(ellipse(side * 0.28, -0.88, 0.055, 0.055), accent)


def _bee(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent = paint(look.body), paint(look.accent)
    beat = rng.uniform(-0.15, 0.20)
    wing = paint((214, 236, 252))
    canvas.fill(np.array([(-0.62, -0.04), (-0.92, 0.08), (-0.62, 0.20)]), accent)
    for x in (-0.16, 0.08, 0.30):
        canvas.fill(stroke([(x, 0.36), (x + 0.06, 0.62)], 0.06), accent)
    canvas.fill(ellipse(-0.08, 0.08, 0.64, 0.42), body, skin=True)
    grow()
    canvas.fill(ellipse(-0.22, -0.50, 0.23, 0.40, -0.45 - beat), wing)
    canvas.fill(ellipse(0.12, -0.52, 0.23, 0.40, 0.25 + beat), wing)
    canvas.fill(ellipse(0.58, 0.02, 0.28, 0.28), body)
    for dx in (0.02, 0.16):
        canvas.fill(stroke(bow((0.58 + dx, -0.20), (0.72 + dx * 1.4, -0.52), -0.04), 0.045), accent)
        canvas.fill(ellipse(0.72 + dx * 1.4, -0.53, 0.055, 0.055), accent)
    _eye(canvas, 0.68, -0.02, 0.075, white=True)


def _beetle(canvas: Canvas, look: Look, paint: Paint, rng: np.random.Generator, grow: Grow) -> None:
    body, accent = paint(look.body), paint(look.accent)
    for side in (-1, 1):
        for y in (-0.24, 0.12, 0.46):
            step = rng.uniform(-0.05, 0.05)
            canvas.fill(
                stroke([(side * 0.40, y), (side * 0.76, y + 0.04 + step), (side * 0.86, y + 0.16 + step)], 0.08, 0.06),
                accent,
            )
        canvas.fill(stroke(bow((side * 0.10, -0.68), (side * 0.32, -0.92), side * 0.05), 0.05), accent)
    canvas.fill(ellipse(0.0, -0.52, 0.34, 0.26), accent)
    canvas.fill(ellipse(0.0, 0.12, 0.62, 0.66), body, skin=True)
    grow()
    canvas.fill(stroke([(0.0, -0.52), (0.0, 0.78)], 0.06), accent)
    for side in (-1, 1):
        canvas.fill(ellipse(side * 0.16, -0.60, 0.08, 0.08), WHITE)


def _stripes(rng: np.random.Generator) -> Iterator[Points]:
    phase, slope = rng.uniform(0, 0.2), rng.uniform(-0.2, 0.2)
    y = np.linspace(-1.2, 1.1, 18)
    for x in np.arange(-1.3, 1.4, 0.205):
        yield stroke(np.stack([x + phase + 0.05 * np.sin(6 * y) + slope * y, y], axis=1), 0.10)


def _patches(rng: np.random.Generator) -> Iterator[Points]:
    for i, x in enumerate(np.arange(-1.0, 1.2, 0.25)):
        for y in np.arange(-1.3, 0.9, 0.25) + (0.12 if i % 2 else 0.0):
            t = np.sort(rng.uniform(0, 2 * np.pi, 8))
            radius = 0.105 * rng.uniform(0.85, 1.15, 8)
            yield np.stack([x + radius * np.cos(t), y + radius * np.sin(t)], axis=1)


def _face_stripes(rng: np.random.Generator) -> Iterator[Points]:
    wide = rng.uniform(0.9, 1.1)
    for side in (-1, 1):
        for y in (-0.42, -0.22, -0.02):  # cheeks
            yield np.array([(side * 0.52, y - 0.07 * wide), (side * 0.52, y + 0.07 * wide), (side * 0.28, y + 0.03)])
        for y in (0.24, 0.42, 0.60, 0.78):  # flanks and arms
            yield np.array([(side * 0.60, y - 0.06 * wide), (side * 0.60, y + 0.06 * wide), (side * 0.16, y + 0.02)])
    for x in (-0.13, 0.0, 0.13):  # forehead
        yield np.array([(x - 0.05 * wide, -0.80), (x + 0.05 * wide, -0.80), (x, -0.46)])
    for x in (0.50, 0.64, 0.78):  # tail
        yield stroke([(x - 0.04, 0.10), (x + 0.10, 0.90)], 0.07)


def _panda(rng: np.random.Generator) -> Iterator[Points]:
    yield ellipse(0.0, 0.20 + rng.uniform(-0.02, 0.02), 0.60, 0.16)  # the dark band over the shoulders


def _feathers(rng: np.random.Generator) -> Iterator[Points]:
    shift = rng.uniform(-0.04, 0.04)
    for row, y in enumerate(np.arange(0.05, 0.85, 0.19)):
        for x in np.arange(-0.5, 0.6, 0.22) + (0.11 if row % 2 else 0.0):
            yield stroke(bow((x - 0.07, y + shift), (x + 0.07, y + shift), 0.07), 0.06)


def _plumes(rng: np.random.Generator) -> Iterator[Points]:
    for x in np.arange(-0.55, 0.3, 0.19):
        yield ellipse(x + rng.uniform(-0.03, 0.03), 0.12, 0.10, 0.06, 0.5)


def _gills(rng: np.random.Generator) -> Iterator[Points]:
    for x in np.array([0.30, 0.39, 0.48]) + rng.uniform(-0.03, 0.03):
        yield stroke([(x, -0.12), (x - 0.04, 0.12)], 0.045)


def _scales(rng: np.random.Generator) -> Iterator[Points]:
    shift = rng.uniform(-0.03, 0.03)
    for column, x in enumerate(np.arange(-0.42, 0.22, 0.19)):
        for y in np.arange(-0.42, 0.5, 0.21) + (0.10 if column % 2 else 0.0):
            yield stroke(bow((x + shift, y - 0.09), (x + shift, y + 0.09), 0.07), 0.055)


def _suckers(rng: np.random.Generator) -> Iterator[Points]:
    for x in (-0.30, -0.04, 0.24):
        yield ellipse(x + rng.uniform(-0.04, 0.04), -0.62 + abs(x) * 0.5, 0.085, 0.075)
    for x in (-0.60, -0.36, -0.10, 0.14, 0.38, 0.60):
        yield ellipse(x, 0.48 - 0.2 * abs(x), 0.05, 0.05)


def _shell(rng: np.random.Generator) -> Iterator[Points]:
    for x, y in ((-0.28, 0.04), (0.0, -0.04), (0.28, 0.04)):
        yield ellipse(x + rng.uniform(-0.03, 0.03), y, 0.09, 0.06)


def _eyespots(rng: np.random.Generator) -> Iterator[Points]:
    grow = rng.uniform(0.9, 1.15)
    for side in (-1, 1):
        for x, y, radius in ((0.56, -0.42, 0.13), (0.36, -0.16, 0.08), (0.44, 0.44, 0.12)):
            yield ellipse(side * x, y, radius * grow, radius * grow)


def _bands(rng: np.random.Generator) -> Iterator[Points]:
    for x in np.array([-0.46, -0.14, 0.18]) + rng.uniform(-0.03, 0.03):
        yield stroke(bow((x, -0.5), (x, 0.6), -0.06), 0.15)


def _dots(rng: np.random.Generator) -> Iterator[Points]:
    for side in (-1, 1):
        for x, y in ((0.30, -0.20), (0.36, 0.20), (0.22, 0.54)):
            radius = 0.12 * rng.uniform(0.9, 1.1)
            yield ellipse(side * x, y, radius, radius)


_PATTERNS: dict[str, Callable[[np.random.Generator], Iterator[Points]]] = {
    "stripes": _stripes, "patches": _patches, "face_stripes": _face_stripes, "panda": _panda, "feathers": _feathers,
    "plumes": _plumes, "gills": _gills, "scales": _scales, "suckers": _suckers, "shell": _shell,
    "eyespots": _eyespots, "bands": _bands, "dots": _dots,
}  # fmt: skip
_PLANS: dict[str, Callable[[Canvas, Look, Paint, np.random.Generator, Grow], None]] = {
    "quadruped": _quadruped, "sitter": _sitter, "upright": _upright, "wader": _wader, "fish": _fish,
    "octopus": _octopus, "crab": _crab, "butterfly": _butterfly, "bee": _bee, "beetle": _beetle,
}  # fmt: skip
