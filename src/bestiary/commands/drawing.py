"""`bestiary generate`: draw pictures and grids."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
from bestiary.png_metadata import Colours, PictureSettings, StartImage, read_settings
from bestiary.project import drawing_defaults, project_base, project_params, project_tiny_decoder
from bestiary.samplers import DrawingDefaults, SamplingChanges

if TYPE_CHECKING:
    from PIL.Image import Image

    from bestiary.diffusion.export_format import EngineChoice
    from bestiary.engine_choice import Wish
    from bestiary.generation import Base, Generator, Weighted
    from bestiary.grids import Change, Grid
    from bestiary.registry.resolving import Adapter, Obstacle
    from bestiary.subjects import Subject

Job = tuple[str, PictureSettings]  # the name of a picture's file without its ending, and its settings


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
    from bestiary import generation
    from bestiary.diffusion.export_format import UnusableExportError
    from bestiary.engine_choice import choose_engine, why_torch_draws

    request, grid = take_axes(request, axes)
    like = request.like
    check_request(request, start, changes.negative_prompt)
    check_grid(grid)
    original = read_settings(like) if like else None
    start_image, image = generation.start_image(start.image, start.denoise, original)
    params = project_params()
    chosen, default, project = generation.named_base(source.base), project_base(params), drawing_defaults(params)
    weighted = [generation.Weighted.parse(text) for text in source.adapters]
    named = _adapters_of(original, like, weighted) if original and like else [each.what for each in weighted]
    wish = replace(_wish(_engine(source, original), source, changes, start, weighted), has_grid=bool(grid))
    resolved = _resolve(named, fast=wish.reason_against if _looks_for_exports(wish, named, original) else None)
    generator = generation.Generator(project_tiny_decoder(params))
    adapters, note = choose_engine(resolved, wish, generator.open_export)
    _tell([note] if note and not original else [])
    pictures: _Again | _New
    if original and like:
        pictures = _Again(like, original, named)
    else:
        subjects = _subjects(request.subjects, adapters)
        pictures = _New(subjects, request.prompt or "", series, changes, weighted, colours, start_image)

    def draw(adapters: Sequence[Adapter]) -> None:
        base = pictures.base(adapters, chosen, default)
        any_base = generation.overrides_base(chosen, generation.decisive(adapters))
        generator.prepare(base, adapters, any_base=any_base)
        jobs = pictures.jobs(generator, adapters, project)
        _tell(generator.applied_files(adapters))
        if grid:
            cells = [(name, grid.cells(settings, _reweighting(changes, adapters, project))) for name, settings in jobs]
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


@dataclass(frozen=True)
class _Again:
    """A picture to draw again with its own settings, and the adapters to draw it with."""

    file: Path
    settings: PictureSettings
    named: Sequence[str]

    def base(self, adapters: Sequence[Adapter], chosen: Base | None, default: Base | None) -> Base:
        """The base to draw it with. Raises BestiaryError when these are not its adapters."""
        from bestiary import generation

        generation.check_same_adapters(adapters, self.settings, self.file, self.named)
        return chosen or generation.base_of_picture(self.settings, self.file, default)

    def jobs(self, *_: object) -> list[Job]:
        """The picture."""
        return [(self.file.stem, self.settings)]


@dataclass(frozen=True)
class _New:
    """New pictures, one for each seed: of each subject, or else of the prompt."""

    subjects: Sequence[Subject]
    prompt: str
    series: Series
    changes: SamplingChanges
    weighted: Sequence[Weighted]
    colours: Colours
    start: StartImage | None

    def base(self, adapters: Sequence[Adapter], chosen: Base | None, default: Base | None) -> Base:
        """The base to draw them with."""
        from bestiary import generation

        adapter = generation.decisive(adapters)
        known = [default] if default else []
        return generation.choose_base(adapter, chosen, None if adapter else default, known=known)

    def jobs(self, generator: Generator, adapters: Sequence[Adapter], project: DrawingDefaults) -> list[Job]:
        """The pictures, with the base and the adapters that the generator has in memory."""
        from bestiary import generation
        from bestiary.subjects import caption

        pairs = zip(adapters, self.weighted, strict=False)  # none: no adapter
        defaults = _defaults(adapters, [generation.weight_of(*each) for each in pairs], project)
        changes = replace(self.changes, adapter_weight=self.weighted[0].weight)
        sampling = generator.sized(changes.apply(defaults.sampling))
        common = generation.common_settings(generator, adapters, self.weighted, sampling)
        common = replace(common, colours=self.colours, start=self.start)
        captions = [
            (generation.file_stem(subject.name), caption(subject, defaults.template)) for subject in self.subjects
        ]
        return [
            (f"{name}-{seed}", replace(generator.prompted(common, text, literal=bool(captions)), seed=seed))
            for name, text in (captions or [("prompt", self.prompt)])
            for seed in self.series.seeds
        ]


def _defaults(adapters: Sequence[Adapter], weights: Sequence[float], project: DrawingDefaults) -> DrawingDefaults:
    """How to draw with these adapters and weights: as the adapters say, else as the project says."""
    from bestiary import generation

    return generation.defaults_of(adapters, weights) or project


def _reweighting(changes: SamplingChanges, adapters: Sequence[Adapter], project: DrawingDefaults) -> Change:
    """A function that gives a grid's cell the steps that its adapters' weights call for."""

    def reweighted(settings: PictureSettings) -> PictureSettings:
        defaults = _defaults(adapters, [applied.weight for applied in settings.adapters], project)
        return replace(settings, sampling=settings.sampling.in_steps_of(changes.apply(defaults.sampling)))

    return reweighted


def _subjects(names: Sequence[str], adapters: Sequence[Adapter]) -> list[Subject]:
    """The subjects of these names, each once."""
    taught = [subject for adapter in adapters for subject in adapter.subjects]
    return list(dict.fromkeys(_find(name, taught) for name in names))


def _resolve(named: Sequence[str], *, fast: Obstacle | None) -> list[Adapter]:
    """The adapters of these names. Prints what the registry notes about them."""
    from bestiary import generation

    with generation.resolving_all(named, fast=fast) as resolved:
        import bestiary.diffusion.sampling  # noqa: F401  imports torch while a second process may ask MLflow

        adapters = resolved()
    _tell(note for adapter in adapters for note in adapter.notes)
    return adapters


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


def _draw_all(generator: Generator, jobs: list[Job], out: Path, image: Image | None = None) -> None:
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
