"""Draw the same prompts and seeds in the default way, the reference's way and with the fast variant, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bestiary.diffusion.sampling import generate, guidance_scales, make_scheduler
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures, plots, scoring
from bestiary.evaluation.acceptance import (
    LABELS,
    LIKENESS,
    MAKE,
    AcceptanceReport,
    Differences,
    Drawn,
    Identity,
    Measured,
    Way,
    decide,
)
from bestiary.evaluation.likeness import Likeness
from bestiary.evaluation.pictures import Jobs, PictureCache, make_jobs
from bestiary.evaluation.report import Estimate, Row
from bestiary.evaluation.scoring import Array, Bootstrap, ClassTexts, JudgedImages
from bestiary.params import Accept
from bestiary.samplers import Sampling
from bestiary.subjects import Subjects

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.evaluation.judge import Judge

Part = tuple[Sequence[int], PictureCache | None]  # some of the jobs, by index, with the cache of their pictures
EXTRA_SEEDS = 1_000_000  # above evaluate's seeds and those of its sweep
SHEET_WAYS: tuple[Way, ...] = ("default", "reference", "fast")
SHEET_SEEDS = 3  # pictures of each way in a row of the sheet


@dataclass(frozen=True)
class Trial:
    """What the ways are compared on: the base, the judge, and the images that the manifests in `split` list."""

    pipeline: StableDiffusionPipeline
    judge: Judge
    clean: Path
    split: Path
    resamples: int
    seed: int
    batch_size: int
    template: str
    classes: Sequence[str] | None  # None: all
    likeness: Likeness | None = None  # to the photos of the only subject


@dataclass(frozen=True)
class DefaultWay:
    """How the registered adapter draws by default. `cache` has evaluate's pictures, `seeds` for each class."""

    adapter: Path
    sampling: Sampling
    seeds: int
    cache: PictureCache | None


@dataclass(frozen=True)
class FastVariant:
    """A fast variant as exported: `load` opens the export, which draws with `sampling`.

    few_step is its few-step adapter, which torch draws with few_step_sampling and the full decoder.
    """

    identity: Identity
    few_step: Path
    few_step_sampling: Sampling
    sampling: Sampling
    load: Callable[[], StableDiffusionPipeline]


def read_fast_variant(few_step: Path, export: Path, *, adapter_sha256: str, side: int) -> FastVariant:
    """The fast variant in the folders of a few-step adapter and of its export, for the adapter with this SHA-256.

    torch draws at `side` pixels per side. Raises BestiaryError when one of them is missing or damaged, when the export
    holds another adapter, or when the few-step adapter was distilled from another one.
    """
    from bestiary.diffusion.adapter import adapter_sha256 as sha256_of
    from bestiary.diffusion.adapter_reading import read_adapter
    from bestiary.diffusion.engines import open_export
    from bestiary.diffusion.export_format import MANIFEST, file_sha256, read_manifest
    from bestiary.diffusion.stored_adapter import adapter_file

    manifest, sha256 = read_manifest(export), sha256_of(few_step)
    if manifest.adapter_sha256 != sha256:
        raise BestiaryError(f"{export} was not exported from {few_step}. Run `{MAKE}`.")
    if manifest.distilled_from_sha256 not in (None, adapter_sha256):
        raise BestiaryError(
            f"{few_step} was distilled from another adapter than the one that evaluate chose. Run `{MAKE}`."
        )
    sampling = read_adapter(adapter_file(few_step)).few_step
    if sampling is None:
        raise BestiaryError(
            f"{few_step} does not say how to draw with it, so it is not a few-step adapter. Run `{MAKE}`."
        )
    identity = Identity(
        adapter_sha256=adapter_sha256,
        few_step_sha256=sha256,
        export_sha256=file_sha256(export / MANIFEST),
        engine=manifest.engine,
        precision=manifest.precision,
        decoder=manifest.decoder,
    )
    drawn_by_torch = replace(sampling, width=side, height=side)
    return FastVariant(identity, few_step, drawn_by_torch, manifest.defaults.sampling, lambda: open_export(export))


@dataclass(frozen=True)
class Side:
    """What one way drew: which of the jobs, the pictures, the judge's view of them, passes and seconds a picture."""

    sampling: Sampling
    rows: Sequence[int]
    images: Sequence[Image]
    judged: JudgedImages
    passes: int
    seconds: float

    def images_of(self, rows: Sequence[int]) -> list[Image]:
        """The pictures of these jobs."""
        place = {row: index for index, row in enumerate(self.rows)}
        return [self.images[place[row]] for row in rows]


@dataclass(frozen=True)
class Acceptance:
    """The verdict, and the data for its figures."""

    report: AcceptanceReport
    sides: Mapping[Way, Side]
    jobs: Jobs
    texts: ClassTexts
    subjects: Subjects


@dataclass(frozen=True)
class _References:
    """The real images of both splits, and the classes' texts."""

    validation: JudgedImages
    train: JudgedImages
    texts: ClassTexts

    @property
    def real(self) -> JudgedImages:
        """All real images. All ways were taught from the same images, so these favour none of them."""
        splits = (self.validation, self.train)
        return JudgedImages(
            np.concatenate([each.features for each in splits]), np.concatenate([each.labels for each in splits])
        )


def accept(
    trial: Trial, default: DefaultWay, fast: FastVariant, settings: Accept, cache: PictureCache | None = None
) -> Acceptance:
    """Draw in every way, compare, and decide by the rules in `settings`.

    `cache` keeps pictures that do not change between runs.
    Raises BestiaryError when images are missing, or when one of the ways cannot draw.
    """
    references, jobs, own = _read(trial, default, settings)
    sides = _draw_all(_Drawer(trial, jobs, settings.timed_pictures), default, fast, settings, own, cache)
    measured = _measure(trial, references, sides)
    verdict = decide(measured, settings)
    report = AcceptanceReport(
        **dict(fast.identity),
        **dict(measured),
        accepted=verdict.accepted,
        reasons=tuple(verdict.reasons),
        seconds={way: side.seconds for way, side in sides.items()},
    )
    return Acceptance(report, sides, jobs, references.texts, Subjects.read_from(trial.split))


def write(acceptance: Acceptance, folder: Path) -> None:
    """Write the sheet, the plot and the table of pictures that belong to reports/accept.json to `folder`."""
    sides, jobs = acceptance.sides, acceptance.jobs
    labels, shared = np.asarray(jobs.labels), sides["reference"].rows  # the other ways drew these, too
    rows = []
    for label in np.unique(labels):
        chosen = [row for row in shared if labels[row] == label][:SHEET_SEEDS]
        drawn = [
            [side.images[list(side.rows).index(row)] for row in chosen] for side in map(sides.get, SHEET_WAYS) if side
        ]
        rows.append((acceptance.subjects.of(acceptance.texts.classes[label]).name, drawn))
    plots.ways_side_by_side([LABELS[way] for way in SHEET_WAYS], rows, folder / "sheet.png")
    points = {LABELS[way]: (side.seconds, acceptance.report.ways[way].scores) for way, side in sides.items()}
    plots.quality_against_seconds(points, folder / "quality_against_seconds.png")
    plots.save_table(_picture_table(acceptance), folder / "pictures.csv")


def _picture_table(acceptance: Acceptance) -> pd.DataFrame:
    """One row for each prompt and seed: the judge's scores and first choice for each way that drew it."""
    jobs, names = acceptance.jobs, np.array(acceptance.texts.classes)
    table = pd.DataFrame({"class": names[jobs.labels], "prompt": jobs.prompts, "seed": jobs.seeds})
    for way, side in acceptance.sides.items():
        scores = scoring.score(side.judged, acceptance.texts)
        for key in ("clip_score", "margin"):
            if key in scores:
                table.loc[list(side.rows), f"{way}_{key}"] = scores[key].round(4).to_numpy()
        table.loc[list(side.rows), f"{way}_predicted"] = names[scores["predicted"]]
    return table


def _read(trial: Trial, default: DefaultWay, settings: Accept) -> tuple[_References, Jobs, int]:
    """The references, the jobs, and how many of the first jobs are evaluate's."""
    train, validation = pictures.read_manifests(trial.split)
    classes, subjects = sorted(train["class"].unique()), Subjects.read_from(trial.split)
    drawn = pictures.choose(classes, trial.classes)
    train, validation = (table[table["class"].isin(drawn)] for table in (train, validation))
    references = _References(
        pictures.view_files(trial.judge, trial.clean, validation, classes, "judge the validation images"),
        pictures.view_files(trial.judge, trial.clean, train, classes, "judge the training images"),
        pictures.read_class_texts(trial.judge, classes, trial.template, subjects),
    )
    labels = [classes.index(name) for name in drawn]
    own, more = (
        make_jobs(classes, np.repeat(labels, seeds).tolist(), trial.template, first, subjects)
        for seeds, first in ((default.seeds, trial.seed), (settings.extra_seeds, trial.seed + EXTRA_SEEDS))
    )
    jobs = Jobs([*own.labels, *more.labels], [*own.prompts, *more.prompts], [*own.seeds, *more.seeds])
    return references, jobs, len(own.labels)


@dataclass(frozen=True)
class _Drawer:
    """Draws jobs in one way after the other, and judges and times each."""

    trial: Trial
    jobs: Jobs
    timed: int

    def by_torch(self, way: Way, adapter: Path, sampling: Sampling, parts: Sequence[Part]) -> Side:
        """Draw with the base and an adapter. Each of `parts` has its own cache."""
        images: list[Image] = []
        for rows, cache in parts:
            images += pictures.draw(
                self.trial.pipeline,
                adapter,
                self.jobs.take(rows),
                sampling,
                batch_size=self.trial.batch_size,
                cache=cache,
                task=f"draw: {LABELS[way]}",
            )
        return self._side(way, self.trial.pipeline, sampling, [row for rows, _ in parts for row in rows], images)

    def as_exported(self, fast: FastVariant) -> Side:
        """The pictures by the export."""
        pipeline, size = fast.load(), self.trial.batch_size
        images = pictures.draw_as_loaded(
            pipeline, self.jobs, fast.sampling, batch_size=size, task=f"draw: {LABELS['fast']}"
        )
        return self._side("fast", pipeline, fast.sampling, range(len(images)), images)

    def _side(
        self, way: Way, pipeline: StableDiffusionPipeline, sampling: Sampling, rows: Sequence[int], images: list[Image]
    ) -> Side:
        labels = self.jobs.take(rows).labels
        judged = pictures.view(self.trial.judge, images, labels, f"judge: {LABELS[way]}")
        seconds = _seconds(pipeline, self.jobs, sampling, self.timed)
        return Side(sampling, rows, images, judged, count_passes(pipeline, sampling), seconds)


def _draw_all(
    drawer: _Drawer, default: DefaultWay, fast: FastVariant, settings: Accept, own: int, cache: PictureCache | None
) -> dict[Way, Side]:
    """The pictures by each way, the reference last: a fast variant that cannot draw fails before the expensive part."""
    reference = replace(
        default.sampling, sampler="ddpm", steps=settings.reference_steps, guidance_interval=None, timesteps=None
    )
    every, rows = len(drawer.jobs.labels), tuple(_first_of_each_class(drawer.jobs.labels, settings.reference_seeds))
    of_fast = drawer.as_exported(fast)
    of_few_step = drawer.by_torch("few_step", fast.few_step, fast.few_step_sampling, [(range(every), None)])
    parts = [(range(own), default.cache), (range(own, every), cache)]
    of_default = drawer.by_torch("default", default.adapter, default.sampling, parts)
    of_reference = drawer.by_torch("reference", default.adapter, reference, [(rows, cache)])
    return {"default": of_default, "reference": of_reference, "few_step": of_few_step, "fast": of_fast}


def _first_of_each_class(labels: Sequence[int], count: int) -> list[int]:
    """The indices of the first `count` jobs of each class.

    >>> _first_of_each_class([0, 0, 0, 1, 1, 0], count=2)
    [0, 1, 3, 4]
    """
    seen: dict[int, int] = {}
    chosen = []
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= count:
            chosen.append(index)
    return chosen


def count_passes(pipeline: StableDiffusionPipeline, sampling: Sampling) -> int:
    """How many passes of the UNet a picture takes: two for a guided step, one otherwise."""
    pipeline.scheduler = make_scheduler(sampling.sampler, pipeline.scheduler.config, sampling.steps)
    return sum(2 if scale > 1 else 1 for scale in guidance_scales(pipeline, sampling))


def _seconds(pipeline: StableDiffusionPipeline, jobs: Jobs, sampling: Sampling, count: int) -> float:
    """The median seconds of one picture, drawn alone, after an untimed one."""
    spent = []
    for index in range(count + 1):
        started = time.perf_counter()
        job = index % len(jobs.seeds)
        generate(pipeline, [jobs.prompts[job]], [jobs.seeds[job]], sampling, batch_size=1)
        spent.append(time.perf_counter() - started)
    return median(spent[1:])


def _measure(trial: Trial, references: _References, sides: Mapping[Way, Side]) -> Measured:
    # Five times as many images as the validation split has, so the intervals are narrower.
    real = scoring.resample(references.real, trial.resamples, trial.seed + 1)

    def scores(images: JudgedImages) -> dict[str, Bootstrap]:
        # The same resamples for each way with the same labels, so that a difference is paired.
        drawn = scoring.resample(images, trial.resamples, trial.seed)
        table = scoring.score(images, references.texts)
        means = {key: scoring.bootstrap_mean(table[key], drawn.counts) for key in scoring.scored(table)}
        return means | scoring.pair_scores(drawn, real)

    every = {way: scores(side.judged) | _likeness(trial, side.images) for way, side in sides.items()}
    rows = list(sides["reference"].rows)
    fast = sides["fast"].judged
    shared = scores(JudgedImages(fast.features[rows], fast.labels[rows]))
    shared |= _likeness(trial, sides["fast"].images_of(rows))
    of_splits = scoring.pair_scores(
        *(scoring.resample(each, trial.resamples, trial.seed + 2) for each in (references.validation, references.train))
    )
    return Measured(
        ways={way: _drawn(trial, references, side, every[way]) for way, side in sides.items()},
        real=_estimates(of_splits),
        real_pictures=len(real.images.labels),
        differences=Differences(
            fast_default=_difference(every["fast"], every["default"]),
            fast_reference=_difference(shared, every["reference"]),
            distillation=_difference(every["few_step"], every["default"]),
            export=_difference(every["fast"], every["few_step"]),
        ),
        diversity_ratio=_ratio(shared["diversity"], every["reference"]["diversity"]),
    )


def _drawn(trial: Trial, references: _References, side: Side, scores: Mapping[str, Bootstrap]) -> Drawn:
    train, real = references.train.features, references.validation.features
    copied = scoring.bootstrap_copied(side.judged.features, train, real, trial.resamples, trial.seed)
    return Drawn(
        sampler=side.sampling.sampler,
        steps=side.sampling.steps,
        passes=side.passes,
        pictures=len(side.rows),
        scores=_estimates(scores),
        copied=copied.estimate(),
    )


def _likeness(trial: Trial, images: Sequence[Image]) -> dict[str, Bootstrap]:
    way = trial.likeness.way(images) if trial.likeness else None
    return {LIKENESS: way} if way else {}


def _difference(one: Mapping[str, Bootstrap], other: Mapping[str, Bootstrap]) -> Row:
    return _estimates({key: one[key] - other[key] for key in one})


def _ratio(one: Bootstrap, other: Bootstrap) -> Estimate | None:
    """one / other with its paired interval; None where the other is 0, as if all seeds draw the same picture."""
    resampled: Array = np.append(other.resampled, other.mean)
    if resampled.min() <= 0:
        return None
    return Bootstrap(one.mean / other.mean, one.resampled / other.resampled).estimate()


def _estimates(scores: Mapping[str, Bootstrap]) -> Row:
    return {key: bootstrap.estimate() for key, bootstrap in scores.items()}
