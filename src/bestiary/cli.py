"""The `bestiary` command. Heavy libraries load inside the commands that need them, so that help appears at once."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from bestiary import __version__
from bestiary.errors import BestiaryError, printable, shown
from bestiary.files import is_file, is_folder
from bestiary.libraries import silence_libraries
from bestiary.png_metadata import Colours, PictureSettings, read_settings
from bestiary.project import (
    drawing_defaults,
    last_acceptance,
    last_results,
    project_base,
    project_captions,
    project_params,
    project_tiny_decoder,
    registered_name,
    render_results,
    short_path,
    write_project_captions,
)
from bestiary.samplers import (
    DEFAULT_DENOISE,
    MAX_GUIDANCE_SCALE,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    SAMPLERS,
    SIDE_STEP,
    Decoder,
    SamplingChanges,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.diffusion.export_format import EngineChoice, Precision
    from bestiary.engine_choice import Wish
    from bestiary.generation import Generator, Weighted
    from bestiary.grids import Grid
    from bestiary.subjects import Kind, Subject

CHAMPION = "models:/bestiary@champion"  # shown in help; the name comes from register.name in params.yaml
FOLDER = click.Path(file_okay=False, writable=True, path_type=Path)
Command = Callable[..., None]
Decorator = Callable[[Command], Command]


class Group(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Teach Stable Diffusion your own animals, and draw them.

    WHAT names an adapter: models:/bestiary@champion, models:/bestiary/3, a folder, a .safetensors file, or none. For a
    drawing, it may carry a weight from 0 to 2: WHAT:0.8.
    """


class Size(click.ParamType[tuple[int, int]]):
    """A picture's width and height in pixels, as in 768x512."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"([0-9]{1,6})\s*[x×*]\s*([0-9]{1,6})", value.strip(), re.IGNORECASE)
        if not found:
            self.fail(f"{shown(value)} is not a size. Write the width and the height in pixels, as in 768x512.")
        width, height = int(found[1]), int(found[2])
        for side in (width, height):
            if not MIN_SIDE <= side <= MAX_SIDE or side % SIDE_STEP:
                self.fail(f"{side} is not a multiple of {SIDE_STEP} between {MIN_SIDE} and {MAX_SIDE}.")
        return width, height


class Number(click.FloatRange):
    """A finite number in a range; click's own type accepts nan."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


def option_group(name: str, build: Callable[..., object], **options: Decorator) -> Decorator:
    """Several options that reach the command as one argument `name`, made by `build` from their values by name."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def grouped(*arguments: Any, **values: Any) -> None:  # click passes whatever the command declares
            group = build(**{option: values.pop(option) for option in options})
            command(*arguments, **values, **{name: group})

        decorated: Command = grouped
        for option in reversed(options.values()):
            decorated = option(decorated)
        return decorated

    return decorate


def _champion() -> str:
    return f"models:/{registered_name()}@champion"


def _rising(_context: click.Context, _option: click.Parameter, interval: tuple[float, float] | None) -> Any:
    if interval and interval[0] >= interval[1]:
        raise click.BadParameter("the first noise level must be below the second.")
    return interval


base_option = click.option("--base", metavar="MODEL", help="Base to use instead of the one that the adapter names.")


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


source_options = option_group(
    "source",
    Source,
    adapters=click.option(
        "--adapter",
        "adapters",
        multiple=True,
        default=lambda: [_champion()],
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
        help="Guide only the steps between these noise levels; 0 1000 guides all.  [default: as evaluated]",
    ),
    scheduler=click.option("--scheduler", type=click.Choice(list(SAMPLERS)), help="Sampler.  [default: as evaluated]"),
    resolution=click.option(
        "--resolution",
        type=click.IntRange(MIN_SIDE, MAX_SIDE),
        help="Pixels a side of a square picture.  [default: as evaluated, or the base's]",
    ),
    size=click.option("--size", type=Size(), help="Width and height in pixels, multiples of 8: 768x512."),
    negative=click.option("--negative-prompt", "negative", metavar="TEXT", help="What the picture must not show."),
    decoder=click.option(
        "--decoder",
        type=click.Choice(["full", "tiny"]),
        help="full: the base's own. tiny: faster, less exact.  [default: as evaluated]",
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
    like=click.option(
        "--like", type=click.Path(path_type=Path), metavar="PNG", help="Draw this picture again, by its settings."
    ),
)
start_options = option_group(
    "start",
    Start,
    image=click.option("--image", type=click.Path(path_type=Path), help="Start from this image instead of noise."),
    denoise=click.option(
        "--denoise",
        type=Number(0, 1, min_open=True),
        help=f"How much of the image is drawn anew, up to 1.  [default: {DEFAULT_DENOISE}]",
    ),
)


@cli.command()
@request_options
@start_options
@source_options
@series_options
@sampling_options
@colour_options
@grid_option
@click.option("--out", default="pictures", show_default=True, type=FOLDER, help="Folder for the pictures.")
def generate(
    request: Request,
    start: Start,
    source: Source,
    series: Series,
    changes: SamplingChanges,
    colours: Colours,
    axes: tuple[str, ...],
    out: Path,
) -> None:
    """Draw animals, named in English or Chinese. The same seed gives the same picture."""
    from bestiary.engine_choice import choose_engine
    from bestiary.subjects import caption

    request, grid = _take_axes(request, axes)
    like = request.like
    _check_request(request, start, changes.negative_prompt)
    _check_grid(grid)
    original = read_settings(like) if like else None
    from bestiary import generation

    start_image, image = generation.start_image(start.image, start.denoise, original)
    params = project_params()

    weighted = [generation.Weighted.parse(text) for text in source.adapters]
    named = _adapters_of(original, like, weighted) if original and like else [each.what for each in weighted]
    engine, fast = _engine(source, original, grid)
    with generation.resolving_all(named, fast=fast) as resolved:
        import bestiary.diffusion.sampling  # noqa: F401  imports torch while a second process may ask MLflow

        adapters = resolved()
    _tell(note for adapter in adapters for note in adapter.notes)
    generator = generation.Generator(project_tiny_decoder(params))
    wish = replace(_wish(engine, source, changes, start, weighted), has_grid=bool(grid))
    adapters, note = choose_engine(adapters, wish, generator.open_export)
    _tell([note] if note and not original else [])
    taught = [subject for adapter in adapters for subject in adapter.subjects]
    wanted = list(dict.fromkeys(_find(name, taught) for name in request.subjects))
    chosen, default = generation.named_base(source.base), project_base(params)
    adapter = generation.decisive(adapters)
    if original and like:
        generation.check_same_adapters(adapters, original, like, named)
        base = chosen or generation.base_of_picture(original, like, default)
        generator.prepare(base, adapters, any_base=generation.overrides_base(chosen, adapter))
        jobs = [(like.stem, original)]
    else:
        known = [default] if default else []
        base = generation.choose_base(adapter, chosen, None if adapter else default, known=known)
        generator.prepare(base, adapters, any_base=generation.overrides_base(chosen, adapter))
        weights = [generation.weight_of(*each) for each in zip(adapters, weighted, strict=False)]  # none: no adapter
        defaults = generation.defaults_of(adapters, weights) or drawing_defaults(params)
        sampling = generator.sized(replace(changes, adapter_weight=weighted[0].weight).apply(defaults.sampling))
        common = replace(
            generation.common_settings(generator, adapters, weighted, sampling), colours=colours, start=start_image
        )
        texts = [(generation.file_stem(subject.name), caption(subject, defaults.template)) for subject in wanted]
        jobs = [
            (f"{name}-{seed}", replace(generator.prompted(common, text, literal=bool(texts)), seed=seed))
            for name, text in (texts or [("prompt", request.prompt or "")])
            for seed in series.seeds
        ]
    _tell(generator.applied_files(adapters))
    if grid:
        _draw_grids(generator, jobs, grid, out, image)
    else:
        _draw_all(generator, jobs, out, image)


def _engine(source: Source, original: PictureSettings | None, grid: Grid | None) -> tuple[EngineChoice, bool]:
    """The engine to draw with, a picture's own one; and whether to look for registered fast variants.

    `auto` takes none for a grid, whose cells may differ in what an export cannot change.
    """
    if original:
        return ("openvino", True) if original.export_sha256 else ("auto", False)
    found = grid is None and find_spec("openvino") is not None
    return source.engine, source.engine == "openvino" or (source.engine == "auto" and found)


def _wish(
    engine: EngineChoice, source: Source, changes: SamplingChanges, start: Start, weighted: Sequence[Weighted]
) -> Wish:
    from bestiary.engine_choice import Wish

    return Wish(
        engine,
        changes,
        has_image=start.image is not None,
        weighted=any(each.weight is not None for each in weighted),
        base=source.base or "",
    )


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(printable(line), err=True)


def _check_request(request: Request, start: Start, negative: str | None) -> None:
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


def _take_axes(request: Request, axes: tuple[str, ...]) -> tuple[Request, Grid | None]:
    """The request without the axes that follow --grid among the animals, whose names hold no "=", and the grid."""
    if not axes:
        return request, None
    from bestiary.grids import Grid

    more = tuple(name for name in request.subjects if "=" in name)
    subjects = tuple(name for name in request.subjects if "=" not in name)
    return replace(request, subjects=subjects), Grid.parse([*axes, *more])


def _check_grid(grid: Grid | None) -> None:
    given = _given_options()
    for axis in grid.axes if grid else ():
        names = ("first", "count") if axis.name == "seed" else (axis.name,)
        if unused := [given[name] for name in names if name in given]:
            raise BestiaryError(f"--grid sets the {axis.name}. Leave out {', '.join(unused)}.")


def _adapters_of(original: PictureSettings, like: Path, weighted: Sequence[Weighted]) -> list[str]:
    """The adapters to draw a picture again with. Raises BestiaryError for options that would have no effect."""
    given = _given_options()
    unused = [option for name, option in given.items() if name not in ("like", "adapters", "base", "out", "image")]
    if unused:
        raise BestiaryError(f"--like uses the picture's own settings. Leave out {', '.join(unused)}.")
    for each in weighted:
        if each.weight is not None:
            raise BestiaryError(f"--like uses the picture's own weights. Leave out :{each.weight:g} after --adapter.")
    if "adapters" in given:
        return [each.what for each in weighted]
    named = [applied.adapter for applied in original.adapters] or ["none"]
    for what in named:
        if what != "none" and not what.startswith("models:") and not (is_file(what) or is_folder(what)):
            raise BestiaryError(
                f"{like} was drawn with {shown(what)}, which is not here. Say where it is with --adapter."
            )
    return named


def _given_options() -> dict[str, str]:
    """The options on the command line by parameter, each as it is spelled."""
    context = click.get_current_context()
    typed = click.core.ParameterSource.COMMANDLINE
    return {
        option.name: option.opts[0]
        for option in context.command.params
        if option.name and context.get_parameter_source(option.name) is typed
    }


def _draw_all(
    generator: Generator, jobs: list[tuple[str, PictureSettings]], out: Path, image: Image | None = None
) -> None:
    from tqdm import tqdm

    from bestiary.generation import save_picture

    steps = sum(settings.drawn_steps for _, settings in jobs)
    with tqdm(total=steps, desc="draw pictures", unit="step", leave=False) as bar:

        def count_step(_done: int, _total: int) -> None:
            bar.update()

        for name, settings in jobs:
            picture = generator.draw(settings, count_step, image)
            bar.write(str(save_picture(picture, settings, out, name)), file=sys.stdout)


def _draw_grids(
    generator: Generator, jobs: list[tuple[str, PictureSettings]], grid: Grid, out: Path, image: Image | None
) -> None:
    from tqdm import tqdm

    from bestiary.generation import save_png

    by_job = [(name, settings, grid.cells(settings)) for name, settings in jobs]
    steps = sum(cell.drawn_steps for _, _, rows in by_job for row in rows for cell in row)
    with tqdm(total=steps, desc="draw grids", unit="step", leave=False) as bar:

        def count_step(_done: int, _total: int) -> None:
            bar.update()

        for name, settings, rows in by_job:
            drawn = [[generator.draw(cell, count_step, image) for cell in row] for row in rows]
            path = save_png(grid.png(grid.sheet(drawn, settings), rows[0][0]), out, f"{name}-grid")
            bar.write(str(path), file=sys.stdout)


@cli.command()
@click.argument("what", metavar="URI")
@base_option
@click.option("--fast", is_flag=True, help="Copy the fast variant to OUT/few_step and OUT/openvino.")
@click.option("--out", required=True, type=FOLDER, help="Folder for the adapter.")
def pull(what: str, base: str | None, fast: bool, out: Path) -> None:
    """Copy a registered adapter, or its fast variant, to this disk and verify it."""
    from bestiary.registry import resolving

    if fast and base:
        raise BestiaryError("The fast variant needs no base. Leave out --base.")
    for path in resolving.pull_fast(what, out) if fast else [resolving.pull(what, out, base, _known_bases())]:
        click.echo(path)


@cli.command("export")
@click.argument("what", metavar="WHAT[:WEIGHT]", default=_champion)
@click.option("--to", required=True, type=click.Choice(["openvino"]), help="Engine to export for.")
@click.option("--int8", "precision", flag_value="int8", help="Quantize the UNet. Fastest with VNNI or AMX.")
@click.option("--bf16", "precision", flag_value="bf16", help="bfloat16, for AVX512-BF16 or AMX.")
@click.option("--fp32", "precision", flag_value="fp32", help="float32.  [default: the fastest for this processor]")
@click.option(
    "--decoder", type=click.Choice(["full", "tiny"]), default="full", show_default=True, help="Decoder to export."
)
@base_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the export.")
def export_adapter(
    what: str, to: Literal["openvino"], precision: Precision | None, decoder: Decoder, base: str | None, out: Path
) -> None:
    """Export an adapter, fused into its base, for a fast engine.

    `bestiary generate --adapter OUT` draws with the export. OpenVINO's own pipelines can draw with it, too.
    """
    from bestiary.exporting import ExportRequest, Surroundings
    from bestiary.exporting import export_adapter as export

    params = project_params()
    project = Surroundings(project_base(params), project_tiny_decoder(params), drawing_defaults(params))
    done = export(ExportRequest(what, out, precision, decoder, base), project)
    form = done.manifest
    click.echo(
        f"{out}: exported for {to} in {form.precision} with the {form.decoder} decoder, {done.mib:.0f} MiB, "
        f"error of the UNet {done.unet_error:.2%}"
    )


@cli.group()
def adapter() -> None:
    """Prove that an adapter applies; convert, merge and resize it."""


@adapter.command()
@click.argument("what", metavar="PATH")
@base_option
def verify(what: str, base: str | None) -> None:
    """Prove that an adapter applies, and print what was proved."""
    from bestiary.registry import resolving

    found = resolving.resolve(what)
    found.check_is_file()
    from bestiary.diffusion.adapter import verify_adapter  # torch, which a refusal does not wait for

    model = resolving.find_base(found, base, _known_bases())
    proof = verify_adapter(found.file, model, None if base else found.base_revision)
    trained_on = {True: "yes", False: f"no, it was trained on {found.base}", None: "the file does not say"}
    for label, value in (
        ("adapter", found.file),
        ("sha256", proof.sha256),
        ("rank, alpha", f"{proof.ranks}, {proof.alphas}{f' ({proof.alpha_rule})' if proof.alpha_rule else ''}"),
        ("base", model),
        ("trained on this base", trained_on[proof.base_is_the_trained_one]),
        ("modules", str(proof.applied).removeprefix("applied ")),
        ("weights in place", f"{proof.keys} of {proof.keys}"),
        ("weight 0 equals the base", "yes, exactly"),
        ("weight 1 differs from the base", "yes"),
        ("a reload gives the same", "yes, exactly"),
    ):
        click.echo(printable(f"{label:32} {value}"))


@adapter.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["diffusers", "kohya"]), help="Format to write.")
@click.option("--alpha", type=Number(0, min_open=True), help="Alpha of a file that does not store one.")
def convert(source: Path, target: Path, to: Literal["diffusers", "kohya"], alpha: float | None) -> None:
    """Write an adapter in another format; reads diffusers, PEFT, kohya and the original system's files."""
    if source.resolve() == target.resolve():
        raise BestiaryError(f"{target} is the file to convert and would be overwritten. Choose another target.")
    from bestiary.diffusion.stored_adapter import adapter_file, check_size

    check_size(adapter_file(source))
    from bestiary.diffusion import conversion  # torch, which a refusal does not wait for

    click.echo(conversion.convert(source, target, to, alpha, lambda note: click.echo(note, err=True)))


@adapter.command()
@click.argument("named", metavar="WHAT[:WEIGHT]...", nargs=-1, required=True)
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(1), help="Lower the rank and print the error.  [default: exact]")
@base_option
def merge(named: tuple[str, ...], target: Path, rank: int | None, base: str | None) -> None:
    """Write one adapter that draws as several do together, verified."""
    from bestiary.generation import Weighted

    _merge([Weighted.parse(text) for text in named], target, rank, base)


@adapter.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--rank", required=True, type=click.IntRange(1), help="Rank to write.")
@base_option
def resize(source: str, target: Path, rank: int, base: str | None) -> None:
    """Write an adapter with a lower rank, verified, and print the error."""
    from bestiary.generation import Weighted

    _merge([Weighted(source, 1.0)], target, rank, base)


def _merge(weighted: Sequence[Weighted], target: Path, rank: int | None, base: str | None) -> None:
    from bestiary import generation
    from bestiary.registry import resolving

    with generation.resolving_all([each.what for each in weighted]) as resolved:
        found = resolved()
    chosen = generation.decisive(found)
    if chosen is None:
        raise BestiaryError("none is no adapter. Name one that can be merged.")
    model = resolving.find_base(chosen, base, _known_bases())
    from bestiary.diffusion import merging  # torch, which a refusal does not wait for

    parents = [
        merging.Parent(adapter.uri, adapter.file, generation.weight_of(adapter, each))
        for adapter, each in zip(found, weighted, strict=True)
    ]
    merged = merging.merge(parents, rank)
    file, proof = merging.write_verified(merged, parents, target, model, None if base else chosen.base_revision)
    click.echo(f"{file}: rank {proof.rank}, {proof.keys} weights in place, sha256 {proof.sha256}")
    if merged.worst_module:
        click.echo(
            f"error {merged.error:.2%} of the change, at most {merged.largest_error:.2%} in {merged.worst_module}"
        )


@adapter.command("inspect")
@click.argument("what", metavar="FILE")
@base_option
def inspect_adapter(what: str, base: str | None) -> None:
    """Show what an adapter's file holds, and what of it would be applied to the base."""
    from bestiary.diffusion.stored_adapter import adapter_file, check_size
    from bestiary.generation import named_base, portable_base
    from bestiary.registry import resolving

    file = resolving.resolve(what).file if what.startswith("models:") else adapter_file(what)
    check_size(file)
    from bestiary.diffusion.adapter_summary import BaseToTry, summarize  # torch, which a refusal does not wait for

    found = named_base(base) or project_base(project_params())
    tried = BaseToTry(found.model, found.revision, portable_base(found.model)) if found else None
    for label, value in summarize(file, tried):
        click.echo(printable(f"{label:32} {value}"))


def _known_bases() -> list[str]:
    """The bases that a command may use without being told to."""
    base = project_base(project_params())
    return [base.model] if base else []


@cli.command()
def animals() -> None:
    """List the 100 animals: class folder, English name, Chinese name."""
    from bestiary.subjects import ANIMALS

    for animal in ANIMALS:
        click.echo(f"{animal.folder:16}{animal.name:16}{animal.chinese}")


@cli.command()
@click.option(
    "--write",
    is_flag=True,
    help="Let params.yaml's captioner describe the images in data/ that have no caption, in text files beside them.",
)
def captions(write: bool) -> None:
    """Show what each image will be trained with, and what is odd."""
    from tqdm import tqdm

    for line in write_project_captions() if write else project_captions():
        tqdm.write(printable(line), file=sys.stdout)


@cli.command()
@click.argument("photos", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What stands for the subject in captions and prompts, such as 'sks cat'.")
@click.option("--class", "class_word", default="", metavar="WORD", help="What it is in general, such as cat.")
@click.option("--kind", type=click.Choice(["thing", "style"]), default="thing", show_default=True, help="What it is.")
@click.option("--others", type=click.Path(path_type=Path), help="Folder of photos of others of its class, to compare.")
@click.option("--steps", type=click.IntRange(1), help="Training steps, else the profile's.")
@click.option("--profile", help="Profile in params.yaml.  [default: photos on a GPU, else subject]")
@click.option("--replace", is_flag=True, help="Put other data in data/ aside, into put-aside/.")
def learn(
    photos: Path,
    name: str,
    class_word: str,
    kind: Kind,
    others: Path | None,
    steps: int | None,
    profile: str | None,
    replace: bool,
) -> None:
    """Teach one subject from a folder of PHOTOS: put them into data/, run the pipeline, show the result."""
    from bestiary import learning

    lesson = learning.Lesson(photos, name, class_word, kind, steps, profile, replace, others)
    if not learning.learn(lesson, lambda line: click.echo(printable(line)), learning.estimate_plan):
        click.echo("This has been done already.")
    evaluation, registration = last_results()
    click.echo("\n".join(render_results(evaluation, registration, _program(), last_acceptance(evaluation))))


@cli.command("estimate")
@click.option("--profile", help="Profile in params.yaml.  [default: the one chosen there]")
def estimate_run(profile: str | None) -> None:
    """Estimate the time, memory and disk of a run on this machine, from a few measured steps."""
    from bestiary.estimating import project_estimate
    from bestiary.files import find_project, no_project_error
    from bestiary.learning import params_with_profile

    root = find_project()
    if root is None:
        raise no_project_error()
    for line in project_estimate(root, params_with_profile(root, profile)):
        click.echo(printable(line))


@cli.command()
@click.option("--profile", help="Profile in params.yaml.  [default: the one chosen there]")
@click.option("--hours", default=24.0, show_default=True, type=Number(0, min_open=True), help="Longest run to accept.")
@click.pass_context
def preflight(context: click.Context, profile: str | None, hours: float) -> None:
    """Find problems before a long run: device, models, memory, disk, time. Exits with 1 if it would fail."""
    from bestiary.files import find_project, no_project_error
    from bestiary.learning import params_with_profile
    from bestiary.preflight import checks

    root = find_project()
    if root is None:
        raise no_project_error()
    failed = False
    for check in checks(root, params_with_profile(root, profile), hours):
        click.echo(printable(str(check)))
        failed = failed or check.mark == "FAIL"
    if failed:
        context.exit(1)


@cli.command()
def results() -> None:
    """Show the results of the last `dvc repro`."""
    evaluation, registration = last_results()
    click.echo("\n".join(render_results(evaluation, registration, _program(), last_acceptance(evaluation))))


@cli.command()
@click.argument("revisions", nargs=-1, metavar="[REV...]")
def compare(revisions: tuple[str, ...]) -> None:
    """Compare the results with those of other revisions.

    REV is a commit, a tag, a branch or an experiment. The default is the last commit and its experiments. Shows the
    settings that differ, and the results that matter.
    """
    import shutil

    from bestiary.comparing import read_revisions, render
    from bestiary.files import project_root

    for line in render(read_revisions(project_root(), revisions), shutil.get_terminal_size().columns):
        click.echo(line)


@cli.command("model-card")
@click.argument("what", metavar="[URI]", default=_champion)
@click.option("--out", required=True, type=FOLDER, help="Folder for it, ready for the Hugging Face hub.")
def model_card(what: str, out: Path) -> None:
    """Write a registered adapter with its model card: scores, pictures, provenance."""
    from bestiary.registry import model_card as card

    for path in card.write(what, out):
        click.echo(path)


@cli.command()
@click.option(
    "--adapter", "adapters", multiple=True, metavar="WHAT", help="Also offer this file or folder; repeatable."
)
@click.option("--base", "bases", multiple=True, metavar="MODEL", help="Base to offer; the first is the default.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a password.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535), help="Port to listen on.")
@click.option("--auth", type=click.Path(path_type=Path), metavar="FILE", help="Password file, else $BESTIARY_AUTH.")
@click.option(
    "--token", type=click.Path(path_type=Path), metavar="FILE", help="Programs' token file, else $BESTIARY_TOKEN."
)
def app(
    adapters: tuple[str, ...], bases: tuple[str, ...], host: str, port: int, auth: Path | None, token: Path | None
) -> None:
    """Draw in the browser, or from programs that speak OpenAI's images API or A1111's API."""
    from bestiary.app.access import read_credentials
    from bestiary.app.offers import Offerings
    from bestiary.app.server import launch
    from bestiary.app.tokens import read_token
    from bestiary.diffusion.export_format import is_export
    from bestiary.diffusion.stored_adapter import adapter_file
    from bestiary.files import project_root
    from bestiary.generation import named_base, no_base_error

    params = project_params()
    named = [base for model in bases if (base := named_base(model))]
    default = named[0] if named else project_base(params)
    if default is None:
        raise no_base_error()
    for file in adapters:
        if not is_export(file):
            adapter_file(file)
    launch(
        Offerings(
            bases=(default, *named[1:]),
            adapters=(*(str(project_root() / "models" / name) for name in ("adapter", "fast")), *adapters),
            defaults=drawing_defaults(params),
            registered_name=params.register_.name if params else registered_name(),
            tiny_decoder=project_tiny_decoder(params),
        ),
        host=host,
        port=port,
        auth=read_credentials(auth),
        token=read_token(token),
        ready=lambda address: click.echo(f"Open {address} in a browser. Ctrl-C stops it."),
    )


@cli.command()
@click.argument("what", metavar="[URI]", default=_champion)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def lineage(what: str, as_json: bool) -> None:
    """Show which runs and which data a registered version comes from."""
    from dataclasses import asdict

    from bestiary.registry.versions import walk

    version, steps = walk(what)
    uri = f"models:/{version.name}/{version.version}"
    if as_json:
        click.echo(json.dumps({"version": uri, "aliases": version.aliases, "steps": [asdict(step) for step in steps]}))
        return
    click.echo(f"{uri}{' = ' if version.aliases else ''}{', '.join(version.aliases)}")
    for step in steps:
        git = f"git {step.git}" if step.git else ""
        click.echo("\n" + printable(f"{step.stage:12}{step.started}   run {step.run_id}   {git}".rstrip()))
        for path, content, maker in step.inputs:
            click.echo(printable(f"    {path:40} {content[:10]}   {'from ' + maker if maker else ''}".rstrip()))


def _reason(_context: click.Context, _option: click.Parameter, words: str) -> str:
    if not words.strip():
        raise click.BadParameter("give a reason in a few words.")
    return words.strip()


because_option = click.option(
    "--because", required=True, metavar="WORDS", callback=_reason, help="The reason, stored with the version."
)


@cli.command()
@click.argument("version", type=click.IntRange(1))
@because_option
def promote(version: int, because: str) -> None:
    """Make a version the champion by hand."""
    from bestiary.registry import aliases

    chosen = aliases.promote(version, because, registered_name())
    click.echo(f"models:/{chosen.name}/{chosen.version} is now the champion.")


@cli.command()
@because_option
def rollback(because: str) -> None:
    """Make the previous champion the champion again."""
    from bestiary.registry import aliases

    chosen = aliases.rollback(because, registered_name())
    click.echo(f"models:/{chosen.name}/{chosen.version} is the champion again.")


@cli.group()
def tracking() -> None:
    """Look after the MLflow runs."""


@tracking.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535), help="Port of MLflow's page.")
def ui(port: int) -> None:
    """Open MLflow's page on this project's runs."""
    import webbrowser

    from bestiary.tracking.ui import has_display, show_runs

    def ready(address: str) -> None:
        click.echo(f"The runs are at {address}\nCtrl-C stops the page.")
        if has_display():
            webbrowser.open(address)

    show_runs(port, ready)


@tracking.command()
@click.argument("server", envvar="MLFLOW_TRACKING_URI", metavar="[SERVER]")
@click.option(
    "--database", type=click.Path(path_type=Path), metavar="FILE", help="Database to copy from, if not the project's."
)
def migrate(server: str, database: Path | None) -> None:
    """Copy the local runs and registered versions to a team's MLflow server (default: $MLFLOW_TRACKING_URI)."""
    from bestiary.files import project_root
    from bestiary.registry.migration import migrate as copy

    done = copy(database or project_root() / "mlflow.db", server)
    already = f", {done.runs_there_already} were there already" if done.runs_there_already else ""
    click.echo(f"{done.runs} runs copied{already}.")
    for here, there in done.versions.items():
        click.echo(f"models:/{here} is version {there} on the server.")


def main() -> None:
    """Run the command. A user's mistake ends in one sentence on stderr and a non-zero exit status."""
    silence_libraries()
    try:
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        status = _fail(error.format_message())
    except BestiaryError as error:
        status = _fail(str(error))
    except (click.Abort, KeyboardInterrupt):
        status = _fail("Stopped.", 130)
    except BrokenPipeError:  # `bestiary animals | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status if isinstance(status, int) else 0)


def _fail(sentence: str, status: int = 1) -> int:
    click.echo(sentence, err=True)
    return status


def _find(name: str, taught: Sequence[Subject]) -> Subject:
    """The subject of this name. If no adapter was taught it and it is none of the 100 animals, print a hint."""
    from bestiary.subjects import find_subject

    subject, similar = find_subject(name, taught)
    if similar is not None:
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        shown = subject.name if len(subject.name) <= 60 else f"{subject.name[:60]}…"
        click.echo(f"{shown} is not one of the 100 animals, so it is drawn as written.{hint}", err=True)
    return subject


def _program() -> str:
    """How the user's shell starts this program; below make, PATH is the Makefile's."""
    import shutil

    started = Path(sys.argv[0]).absolute()
    found = shutil.which("bestiary")
    by_name = found and Path(found).resolve() == started.resolve() and "MAKELEVEL" not in os.environ
    return "bestiary" if by_name else short_path(started)
