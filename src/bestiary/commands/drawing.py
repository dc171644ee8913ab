"""`bestiary generate`: draw pictures and grids."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bestiary.commands.drawing_options import (
    Request,
    Series,
    Source,
    Start,
    check_grid,
    check_request,
    colour_options,
    given_options,
    grid_option,
    request_options,
    sampling_options,
    series_options,
    source_options,
    start_options,
    take_axes,
)
from bestiary.commands.options import FOLDER
from bestiary.errors import BestiaryError, printable, shown
from bestiary.files import is_file, is_folder
from bestiary.png_metadata import Colours, PictureSettings, read_settings
from bestiary.project import drawing_defaults, project_base, project_params, project_tiny_decoder
from bestiary.samplers import DrawingDefaults, SamplingChanges

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.diffusion.export_format import EngineChoice
    from bestiary.engine_choice import Wish
    from bestiary.generation import Generator, Weighted
    from bestiary.grids import Grid
    from bestiary.registry.resolving import Adapter, Obstacle
    from bestiary.subjects import Subject


@click.command()
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
    """Draw animals, named in English or Chinese.

    The same seed gives the same picture.
    """
    from bestiary.diffusion.export_format import UnusableExportError
    from bestiary.engine_choice import choose_engine, why_torch_draws
    from bestiary.subjects import caption

    request, grid = take_axes(request, axes)
    like = request.like
    check_request(request, start, changes.negative_prompt)
    check_grid(grid)
    original = read_settings(like) if like else None
    from bestiary import generation

    start_image, image = generation.start_image(start.image, start.denoise, original)
    params = project_params()

    weighted = [generation.Weighted.parse(text) for text in source.adapters]
    named = _adapters_of(original, like, weighted) if original and like else [each.what for each in weighted]
    wish = replace(_wish(_engine(source, original), source, changes, start, weighted), has_grid=bool(grid))
    resolved = _resolve(named, fast=wish.reason_against if _looks_for_exports(wish, named, original) else None)
    generator = generation.Generator(project_tiny_decoder(params))
    adapters, note = choose_engine(resolved, wish, generator.open_export)
    _tell([note] if note and not original else [])
    taught = [subject for adapter in adapters for subject in adapter.subjects]
    wanted = list(dict.fromkeys(_find(name, taught) for name in request.subjects))
    chosen, default = generation.named_base(source.base), project_base(params)

    def draw(adapters: Sequence[Adapter]) -> None:
        def defaults_with(weights: Sequence[float]) -> DrawingDefaults:
            return generation.defaults_of(adapters, weights) or drawing_defaults(params)

        def reweighted(settings: PictureSettings) -> PictureSettings:
            own = defaults_with([applied.weight for applied in settings.adapters])
            return replace(settings, sampling=settings.sampling.in_steps_of(changes.apply(own.sampling)))

        adapter = generation.decisive(adapters)
        if original and like:
            generation.check_same_adapters(adapters, original, like, named)
            base = chosen or generation.base_of_picture(original, like, default)
        else:
            known = [default] if default else []
            base = generation.choose_base(adapter, chosen, None if adapter else default, known=known)
        generator.prepare(base, adapters, any_base=generation.overrides_base(chosen, adapter))
        if original and like:
            jobs = [(like.stem, original)]
        else:
            pairs = zip(adapters, weighted, strict=False)  # none: no adapter
            weights = [generation.weight_of(*each) for each in pairs]
            defaults = defaults_with(weights)
            sampling = generator.sized(replace(changes, adapter_weight=weighted[0].weight).apply(defaults.sampling))
            common = generation.common_settings(generator, adapters, weighted, sampling)
            common = replace(common, colours=colours, start=start_image)
            captions = [(generation.file_stem(subject.name), caption(subject, defaults.template)) for subject in wanted]
            jobs = _jobs(generator, common, captions, request.prompt or "", series)
        _tell(generator.applied_files(adapters))
        if grid:
            cells = [(name, grid.cells(settings, reweighted)) for name, settings in jobs]
            _draw_grids(generator, grid, cells, out, image)
        else:
            _draw_all(generator, jobs, out, image)

    try:
        draw(adapters)
    except UnusableExportError as error:
        if adapters == resolved or wish.engine != "auto":  # the user chose the export
            raise
        _tell([why_torch_draws(resolved[0], error)])
        draw(resolved)


def _resolve(named: Sequence[str], *, fast: Obstacle | None) -> list[Adapter]:
    """The adapters of these names. Prints what the registry notes about them."""
    from bestiary import generation

    with generation.resolving_all(named, fast=fast) as resolved:
        import bestiary.diffusion.sampling  # noqa: F401  imports torch while a second process may ask MLflow

        adapters = resolved()
    _tell(note for adapter in adapters for note in adapter.notes)
    return adapters


def _jobs(
    generator: Generator, common: PictureSettings, captions: list[tuple[str, str]], prompt: str, series: Series
) -> list[tuple[str, PictureSettings]]:
    """The file name and the settings of each picture, for each named caption or else for the prompt."""
    return [
        (f"{name}-{seed}", replace(generator.prompted(common, text, literal=bool(captions)), seed=seed))
        for name, text in (captions or [("prompt", prompt)])
        for seed in series.seeds
    ]


def _engine(source: Source, original: PictureSettings | None) -> EngineChoice:
    """The engine to draw with; the picture's own one to draw it again."""
    if original:
        return "openvino" if original.export_sha256 else "auto"
    return source.engine


def _looks_for_exports(wish: Wish, named: Sequence[str], original: PictureSettings | None) -> bool:
    """Whether to look for registered fast variants. A picture drawn with torch is drawn with torch again."""
    if wish.engine == "auto" and (original or find_spec("openvino") is None):
        return False
    return wish.needs_export(len(named))


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


def _adapters_of(original: PictureSettings, like: Path, weighted: Sequence[Weighted]) -> list[str]:
    """The adapters to draw a picture again with. Raises BestiaryError for options that would have no effect."""
    given = given_options()
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


def _find(name: str, taught: Sequence[Subject]) -> Subject:
    """The subject of this name. If no adapter was taught it and it is none of the 100 animals, print a hint."""
    from bestiary.subjects import find_subject

    subject, similar = find_subject(name, taught)
    if similar is not None:
        hint = f" Did you mean {' or '.join(similar)}?" if similar else ""
        shown = subject.name if len(subject.name) <= 60 else f"{subject.name[:60]}…"
        click.echo(f"{shown} is not one of the 100 animals, so it is drawn as written.{hint}", err=True)
    return subject


def _draw_all(
    generator: Generator, jobs: list[tuple[str, PictureSettings]], out: Path, image: Image | None = None
) -> None:
    from tqdm import tqdm

    from bestiary.diffusion.export_format import UnusableExportError
    from bestiary.generation import save_picture

    steps = sum(settings.drawn_steps for _, settings in jobs)
    with tqdm(total=steps, desc="draw pictures", unit="step", leave=False) as bar:

        def count_step(_done: int, _total: int) -> None:
            bar.update()

        for number, (name, settings) in enumerate(jobs):
            try:
                picture = generator.draw(settings, count_step, image)
            except UnusableExportError as error:
                if number == 0:
                    raise
                raise BestiaryError(str(error)) from error  # torch would draw the earlier pictures again
            bar.write(str(save_picture(picture, settings, out, name)), file=sys.stdout)


def _draw_grids(
    generator: Generator,
    grid: Grid,
    by_name: Sequence[tuple[str, list[list[PictureSettings]]]],
    out: Path,
    image: Image | None,
) -> None:
    from tqdm import tqdm

    from bestiary.generation import save_png

    steps = sum(cell.drawn_steps for _, rows in by_name for row in rows for cell in row)
    with tqdm(total=steps, desc="draw grids", unit="step", leave=False) as bar:

        def count_step(_done: int, _total: int) -> None:
            bar.update()

        for name, rows in by_name:
            drawn = [[generator.draw(cell, count_step, image) for cell in row] for row in rows]
            path = save_png(grid.png(grid.sheet(drawn, rows[0][0]), rows[0][0]), out, f"{name}-grid")
            bar.write(str(path), file=sys.stdout)
