"""The options of `bestiary generate`: what to draw, with which adapters, settings and seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bestiary.commands.options import CHAMPION, FILE, NAME, Number, Size, base_option, champion, option_group
from bestiary.errors import BestiaryError
from bestiary.png_metadata import Colours
from bestiary.samplers import (
    DEFAULT_DENOISE,
    MAX_GUIDANCE_SCALE,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    SAMPLERS,
    Decoder,
    SamplingChanges,
)

if TYPE_CHECKING:
    from bestiary.diffusion.export_format import EngineChoice
    from bestiary.grids import Grid


@dataclass(frozen=True)
class Source:
    """Which adapters, which base and which engine to draw with, as they were typed."""

    adapters: tuple[str, ...]
    base: str | None
    engine: EngineChoice


@dataclass(frozen=True)
class Request:
    """What to draw: subjects, or a prompt, or the settings of a picture."""

    subjects: tuple[str, ...]
    prompt: str | None
    like: Path | None


@dataclass(frozen=True)
class Start:
    """The file of an image to start from, and the denoising strength; None: noise."""

    image: Path | None
    denoise: float | None


@dataclass(frozen=True)
class Series:
    """How many pictures of each subject: with the seeds first, first + 1, ..."""

    first: int
    count: int

    @property
    def seeds(self) -> range:
        """The seed of each picture of one subject."""
        return range(self.first, self.first + self.count)


def _changes(
    steps: int | None,
    guidance: float | None,
    interval: tuple[float, float] | None,
    scheduler: str | None,
    resolution: int | None,
    size: tuple[int, int] | None,
    negative: str | None,
    decoder: Decoder | None,
) -> SamplingChanges:
    if resolution is not None and size is not None:
        raise BestiaryError("--resolution and --size both set the size. Give one of them.")
    width, height = size or (resolution, resolution)
    return SamplingChanges(scheduler, steps, guidance, interval, width, height, negative, decoder=decoder)


def _rising(_context: click.Context, _option: click.Parameter, interval: tuple[float, float] | None) -> Any:
    if interval and interval[0] >= interval[1]:
        raise click.BadParameter("the first noise level must be below the second.")
    return interval


source_options = option_group(
    "source",
    Source,
    adapters=click.option(
        "--adapter",
        "adapters",
        multiple=True,
        type=NAME,
        default=lambda: [champion()],
        show_default=CHAMPION,
        metavar="WHAT[:WEIGHT]",
        help="Adapter to draw with, or folder of an export. Repeat for several adapters.",
    ),
    base=base_option,
    engine=click.option(
        "--engine",
        type=click.Choice(["auto", "torch", "openvino"]),
        default="auto",
        show_default=True,
        help="What runs the networks. auto: the accepted fast variant if it is faster here.",
    ),
)


grid_option = click.option(
    "--grid",
    "axes",
    multiple=True,
    metavar="NAME=VALUE,...",
    help="One picture with a value in each column; a second NAME=VALUE,... makes rows.",
)
series_options = option_group(
    "series",
    Series,
    first=click.option(
        "--seed",
        "first",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**63 - 1),
        help="Seed of the first picture.",
    ),
    count=click.option(
        "--count", default=1, show_default=True, type=click.IntRange(1, 10_000), help="Pictures of each subject."
    ),
)
sampling_options = option_group(
    "changes",
    _changes,
    steps=click.option("--steps", type=click.IntRange(1, MAX_STEPS), help="Denoising steps.  [default: as evaluated]"),
    guidance=click.option(
        "--guidance", type=Number(1, MAX_GUIDANCE_SCALE), help="Guidance scale.  [default: as evaluated]"
    ),
    interval=click.option(
        "--guidance-interval",
        "interval",
        type=(Number(0, 1e6), Number(0, 1e6)),
        metavar="LOW HIGH",
        callback=_rising,
        help="Guide only the steps between these noise levels. 0 1000 guides all.  [default: as evaluated]",
    ),
    scheduler=click.option("--scheduler", type=click.Choice(list(SAMPLERS)), help="Sampler.  [default: as evaluated]"),
    resolution=click.option(
        "--resolution",
        type=click.IntRange(MIN_SIDE, MAX_SIDE),
        help="Side of a square picture in pixels.  [default: as evaluated, or the base's]",
    ),
    size=click.option("--size", type=Size(), help="Width and height in pixels, multiples of 8: 768x512."),
    negative=click.option("--negative-prompt", "negative", metavar="TEXT", help="What the picture must not show."),
    decoder=click.option(
        "--decoder",
        type=click.Choice(["full", "tiny"]),
        help="full: the base's decoder. tiny: faster, less exact.  [default: as evaluated]",
    ),
)
colour_options = option_group(
    "colours",
    Colours,
    **{
        name: click.option(
            f"--{name}", default=1.0, show_default=True, type=Number(0.1, 3), help=f"{name.capitalize()}, 0.1 to 3."
        )
        for name in ("contrast", "saturation", "brightness")
    },
)


request_options = option_group(
    "request",
    Request,
    subjects=click.argument("subjects", nargs=-1, metavar="[ANIMAL...]"),
    prompt=click.option("--prompt", metavar="TEXT", help="Draw this text instead of animals."),
    like=click.option("--like", type=FILE, metavar="PNG", help="Draw this picture again, with its settings."),
)
start_options = option_group(
    "start",
    Start,
    image=click.option("--image", type=FILE, help="Start from this image instead of noise."),
    denoise=click.option(
        "--denoise",
        type=Number(0, 1, min_open=True),
        help=f"How much of the image is redrawn, up to 1.  [default: {DEFAULT_DENOISE}]",
    ),
)


def check_request(request: Request, start: Start, negative: str | None) -> None:
    """Raise BestiaryError unless the options name one thing to draw, in text that is valid and not empty."""
    subjects, prompt, like = request.subjects, request.prompt, request.like
    if start.denoise is not None and start.image is None:
        raise BestiaryError("--denoise has no effect without an image to start from. Name one with --image.")
    if not all(name.strip() for name in subjects):
        raise BestiaryError("An animal's name is empty. Write a name.")
    if prompt is not None and not prompt.strip():
        raise BestiaryError("The prompt is empty. Name animals, or write a prompt.")
    if [bool(subjects), prompt is not None, like is not None].count(True) != 1:
        raise BestiaryError("Name animals, or give either --prompt or --like.")
    try:
        "".join([*subjects, prompt or "", negative or ""]).encode()
    except UnicodeEncodeError:
        raise BestiaryError("A name or a prompt is not valid UTF-8.") from None


def take_axes(request: Request, axes: tuple[str, ...]) -> tuple[Request, Grid | None]:
    """The request without the axes that follow --grid among the animals, whose names hold no "=", and the grid."""
    if not axes:
        return request, None
    from bestiary.grids import Grid

    more = tuple(name for name in request.subjects if "=" in name)
    subjects = tuple(name for name in request.subjects if "=" not in name)
    return replace(request, subjects=subjects), Grid.parse([*axes, *more])


def check_grid(grid: Grid | None) -> None:
    """Raise BestiaryError for options that the grid sets in each cell."""
    given = given_options()
    for axis in grid.axes if grid else ():
        names = ("first", "count") if axis.name == "seed" else (axis.name,)
        if unused := [given[name] for name in names if name in given]:
            raise BestiaryError(f"--grid sets the {axis.name}. Leave out {', '.join(unused)}.")


def given_options() -> dict[str, str]:
    """The options on the command line by parameter, each as it is spelled."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is typed
    }
