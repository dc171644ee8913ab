"""A whole evaluation: choose the operating point, draw with base and adapter, and let the judges score the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from bestiary.data.images import open_rgb
from bestiary.diffusion.stored_adapter import adapter_file
from bestiary.errors import BestiaryError
from bestiary.evaluation import pictures, plots, scoring, sweep
from bestiary.evaluation.image_judge import ImageJudge
from bestiary.evaluation.judging_ahead import JudgingAhead
from bestiary.evaluation.pictures import Jobs, PictureCache, make_jobs
from bestiary.evaluation.proof import Named, Photos, Proved, Prover, photos_of_others
from bestiary.evaluation.report import EvaluationReport, OperatingPointReport, Rows, ScaleZero, ScoreReport
from bestiary.evaluation.scoring import ClassTexts, JudgedImages
from bestiary.evaluation.sweep import Candidate, OperatingPoint
from bestiary.evaluation.timing import Timer
from bestiary.params import Evaluate, Sweep
from bestiary.subjects import Subjects

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.evaluation.judge import Judge

CLOSEST_PAIRS = 10  # shown beside their nearest training images


@dataclass(frozen=True)
class Compared:
    """What an evaluation compares, and what it measures with.

    `clean` is the folder of the images that the manifests in the folder `split` list. The first judge's scores count;
    a second judge's are reported beside them.
    """

    pipeline: StableDiffusionPipeline
    adapter: Path
    judges: Sequence[Judge]
    clean: Path
    split: Path
    others: Path | None = None  # photos of other individuals, by subject folder


@dataclass(frozen=True)
class Reference:
    """What one judge compares generated pictures with: the real images of both splits, and the classes' texts."""

    judge: Judge
    validation: JudgedImages
    train: JudgedImages
    texts: ClassTexts


@dataclass(frozen=True)
class SweepResult:
    """The candidates' scores, the name of the score that chose, and the best candidate by it."""

    table: pd.DataFrame
    score: str
    best: Candidate


@dataclass(frozen=True)
class Side:
    """The pictures by the base or by the adapter, and the first judge's features of them."""

    images: Sequence[Image]
    judged: JudgedImages


@dataclass(frozen=True)
class NearestImage:
    """A generated picture (by its index), the nearest training image, and their cosine."""

    picture: int
    path: Path
    cosine: float


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: one report of scores for each judge, and what the figures are drawn from."""

    scores: Sequence[ScoreReport]
    chosen: Candidate
    texts: ClassTexts
    jobs: Jobs
    base: Side
    adapter: Side
    nearest: Sequence[NearestImage]
    sweep: SweepResult | None
    seconds: Mapping[str, int | float | None]
    subjects: Subjects
    proofs: Mapping[str, Proved]

    def report(self, point: OperatingPoint, stage_seconds: float) -> EvaluationReport:
        """The report with the operating point that was written for later stages."""
        first, *others = self.scores
        report = EvaluationReport(
            **{**dict(first), "proofs": {name: proved.report for name, proved in self.proofs.items()}},
            classes=tuple(self.texts.classes),
            scale_zero=ScaleZero(pictures=pictures.WEIGHT_ZERO_PICTURES, different=0),  # draw_pairs raises otherwise
            operating_point=OperatingPointReport(
                checkpoint=point.checkpoint, scale=point.weight, guidance_scale=point.guidance_scale
            ),
            second_judge=_rows(others[0]) if others else None,
            seconds={**self.seconds, "stage_s": stage_seconds},
            adapter_sha256=point.adapter_sha256,
        )
        return report.with_rows(report.only_subject) if report.only_subject else report


def evaluate(
    compared: Compared,
    settings: Evaluate,
    *,
    seed: int,
    resolution: int | None = None,
    cache: PictureCache | None = None,
) -> Evaluation:
    """Draw the same prompts and noise with base and adapter, and let each judge score the pictures.

    Pictures have `resolution` pixels a side (None: the base's own size). Pictures in `cache` are not drawn again.
    Raises BestiaryError when images are missing or the adapter does not fit the base.
    """
    timer = Timer()
    references, train_paths, labels = _read_references(compared, settings)
    image_judge = _image_judge(compared, settings)
    texts = references[0].texts
    timer.lap("judge")
    subjects = Subjects.read_from(compared.split)
    jobs = make_jobs(texts.classes, np.repeat(labels, settings.seeds).tolist(), settings.template, seed, subjects)
    weighted = replace(settings.sampling(resolution), adapter_weight=settings.adapter_weight or 1.0)
    chosen = Candidate(compared.adapter, weighted)
    result = None
    if settings.sweep:
        # The sweep uses other seeds, because the best of many candidates was lucky on the seeds that chose it.
        tried = np.repeat(labels, settings.sweep.seeds).tolist()
        sweep_jobs = make_jobs(texts.classes, tried, settings.template, seed + len(jobs.seeds), subjects)
        result = _sweep(compared, settings, settings.sweep, chosen, sweep_jobs, texts, cache, timer)
        chosen = result.best
    ahead = JudgingAhead(compared.judges) if compared.pipeline.device.type == "cuda" else None
    see, size = ahead.see if ahead else None, settings.batch_size
    images = pictures.draw_pairs(
        compared.pipeline, chosen.checkpoint, jobs, chosen.sampling, batch_size=size, cache=cache, on_drawn=see
    )
    timer.lap("draw")
    judged = [_judge(each.judge, images, jobs, ahead) for each in references]
    timer.lap("judge")
    scores = [
        scoring.compare(
            *pair,
            reference.validation,
            reference.train,
            reference.texts,
            resamples=settings.bootstrap_resamples,
            seed=seed,
        )
        for pair, reference in zip(judged, references, strict=True)
    ]
    timer.lap("score")
    base, adapter = (Side(*side) for side in zip(images, judged[0], strict=True))
    proofs = _prove(compared, settings, image_judge, chosen, cache, (base, adapter), seed)
    timer.lap("prove")
    nearest = [
        NearestImage(picture, train_paths[image], cosine)
        for picture, image, cosine in scoring.closest_pairs(
            adapter.judged.features, references[0].train.features, CLOSEST_PAIRS
        )
    ]
    seconds = _seconds(timer, cache)
    return Evaluation(scores, chosen, texts, jobs, base, adapter, nearest, result, seconds, subjects, proofs)


def _judge(
    judge: Judge, images: tuple[Sequence[Image], Sequence[Image]], jobs: Jobs, ahead: JudgingAhead | None
) -> tuple[JudgedImages, JudgedImages]:
    """The judge's view of the base's pictures and of the adapter's."""
    return (
        pictures.view(judge, images[0], jobs.labels, "judge the base's pictures", ahead),
        pictures.view(judge, images[1], jobs.labels, "judge the adapter's pictures", ahead),
    )


def write(evaluation: Evaluation, folder: Path) -> None:
    """Write the sheets, figures and tables that belong to reports/evaluate.json to `folder`, the worst class first."""
    per_class = evaluation.scores[0].per_class
    base, adapter, texts = evaluation.base, evaluation.adapter, evaluation.texts
    rows: list[tuple[str, Sequence[Image], Sequence[Image]]] = []
    for old in ("pictures", "contexts"):  # may hold classes that are no longer drawn
        plots.remove_folder(folder / old)
    for name in scoring.worst_classes(per_class):
        indices = np.flatnonzero(base.judged.labels == texts.classes.index(name)).tolist()
        by_base, by_adapter = ([side.images[index] for index in indices] for side in (base, adapter))
        seeds = [evaluation.jobs.seeds[index] for index in indices]
        plots.pair_sheet([by_base, by_adapter], seeds, folder / "pictures" / f"{name}.jpg")
        rows.append((evaluation.subjects.of(name).name, by_base[: plots.SHEET_SEEDS], by_adapter[: plots.SHEET_SEEDS]))
    evaluation.subjects.write_to(folder)
    plots.base_beside_adapter(rows, folder / "sheet.png")
    plots.closest(
        [(near.cosine, adapter.images[near.picture], open_rgb(near.path)) for near in evaluation.nearest],
        folder / "memorisation.png",
    )
    plots.confusion_matrix(scoring.confusion(adapter.judged, texts), folder / "confusion.png")
    plots.class_differences(per_class, folder / "per_class.png")
    plots.save_table(scoring.class_table(per_class), folder / "per_class.csv")
    jobs = evaluation.jobs
    table = scoring.picture_table(base.judged, adapter.judged, texts, jobs.prompts, jobs.seeds)
    for name, proved in evaluation.proofs.items():
        table.loc[table["class"] == name, "base_fidelity"] = proved.base_fidelity.round(4)
        table.loc[table["class"] == name, "adapter_fidelity"] = proved.adapter_fidelity.round(4)
        contexts = [(context, *sides) for context, sides in proved.contexts.items()]
        plots.base_beside_adapter(contexts, folder / "contexts" / f"{name}.png")
    plots.save_table(table, folder / "pictures.csv")
    if evaluation.sweep:
        plots.sweep_heat_map(evaluation.sweep.table, evaluation.sweep.score, folder / "sweep.png")
        plots.save_table(evaluation.sweep.table, folder / "sweep.csv")
    else:
        for name in ("sweep.png", "sweep.csv"):
            (folder / name).unlink(missing_ok=True)  # of an earlier evaluation


def _read_references(compared: Compared, settings: Evaluate) -> tuple[list[Reference], list[Path], list[int]]:
    """A reference for each judge, the paths of the training images, and the indices of the classes to draw."""
    train, validation = pictures.read_manifests(compared.split)
    classes = sorted(train["class"].unique())
    if len(classes) < 2 and settings.sweep and settings.sweep.score != "clip_score":
        raise BestiaryError(
            f"evaluate.sweep.score is {settings.sweep.score}, which takes several classes, and {classes[0]} is the "
            "only one. Set it to clip_score, or leave out the sweep."
        )
    drawn = pictures.choose(classes, settings.classes)
    train, validation = (table[table["class"].isin(drawn)] for table in (train, validation))
    adapter_file(compared.adapter)  # raises an error for a missing adapter before hours of work
    references = [
        Reference(
            judge=judge,
            validation=pictures.view_files(judge, compared.clean, validation, classes, "judge the validation images"),
            train=pictures.view_files(judge, compared.clean, train, classes, "judge the training images"),
            texts=pictures.read_class_texts(judge, classes, settings.template, Subjects.read_from(compared.split)),
        )
        for judge in compared.judges
    ]
    return references, [compared.clean / path for path in train["path"]], [classes.index(name) for name in drawn]


def _image_judge(compared: Compared, settings: Evaluate) -> Judge | ImageJudge:
    """What compares pictures with photos. Loaded first: a wrong name must not end an evaluation that has drawn."""
    judge, other = compared.judges[0], settings.proof.image_judge if settings.proof else None
    return ImageJudge.load(other.model, other.revision, judge.device) if other else judge


def _prove(
    compared: Compared,
    settings: Evaluate,
    image_judge: Judge | ImageJudge,
    chosen: Candidate,
    cache: PictureCache | None,
    sides: tuple[Side, Side],
    seed: int,
) -> dict[str, Proved]:
    """The proof of each drawn subject that has a class word."""
    if settings.proof is None:
        return {}
    train, validation = pictures.read_manifests(compared.split)
    classes, subjects = sorted(train["class"].unique()), Subjects.read_from(compared.split)
    size = settings.batch_size

    def draw(jobs: Jobs, adapter: Path | None) -> list[Image]:
        task = "draw the proof with the adapter" if adapter else "draw the proof with the base"
        return pictures.draw(compared.pipeline, adapter, jobs, chosen.sampling, batch_size=size, cache=cache, task=task)

    prover = Prover(
        compared.judges[0],
        image_judge,
        settings.proof,
        settings.template,
        draw_pairs=lambda jobs: (draw(jobs, None), draw(jobs, chosen.checkpoint)),
        draw_base=lambda jobs: draw(jobs, None),
        resamples=settings.bootstrap_resamples,
        seed=seed,
    )
    proofs = {}
    for index in np.unique(sides[0].judged.labels):
        name = classes[index]
        subject = subjects.of(name)
        if not subject.class_word:
            continue
        rows = np.flatnonzero(sides[0].judged.labels == index).tolist()
        named = Named(*([side.images[row] for row in rows] for side in sides))
        training, held_out = (
            [compared.clean / path for path in table.loc[table["class"] == name, "path"]]
            for table in (train, validation)
        )
        others = photos_of_others(compared.others, subject) if compared.others else []
        photos = Photos(training, held_out, others)
        proofs[name] = prover.prove(subject, named, photos)
    return proofs


def _sweep(
    compared: Compared,
    settings: Evaluate,
    grid: Sweep,
    default: Candidate,
    jobs: Jobs,
    texts: ClassTexts,
    cache: PictureCache | None,
    timer: Timer,
) -> SweepResult:
    def draw(candidate: Candidate) -> JudgedImages:
        images = pictures.draw(
            compared.pipeline,
            candidate.checkpoint,
            jobs,
            candidate.sampling,
            batch_size=settings.batch_size,
            cache=cache,
            task="draw for the sweep",
        )
        timer.lap("draw")
        judged = pictures.view(compared.judges[0], images, jobs.labels, "judge the sweep's pictures")
        timer.lap("judge")
        return judged

    adapters = sweep.checkpoints(compared.adapter) if grid.checkpoints else [compared.adapter]
    candidates = sweep.combine(adapters, grid.scales, grid.guidance_scales, default.sampling)
    table = sweep.sweep(candidates, draw, texts)
    return SweepResult(table, grid.score, candidates[int(table[grid.score].argmax())])


def _seconds(timer: Timer, cache: PictureCache | None) -> dict[str, int | float | None]:
    seconds: dict[str, int | float | None] = {f"{activity}_s": spent for activity, spent in timer.seconds.items()}
    if cache and cache.reused:  # the share describes only evaluations that draw all their pictures
        return {**seconds, "overhead_share": None, "pictures_kept": cache.reused}
    return {**seconds, "overhead_share": timer.overhead_share(useful="draw")}


def _rows(scores: ScoreReport) -> Rows:
    return Rows(base=scores.base, adapter=scores.adapter, delta=scores.delta, real=scores.real, floor=scores.floor)
