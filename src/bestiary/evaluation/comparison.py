"""An evaluation from end to end: what to draw, at which operating point, and what the judges say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from bestiary.data.images import open_rgb
from bestiary.diffusion.adapter import adapter_file
from bestiary.evaluation import pictures, plots, scoring, sweep
from bestiary.evaluation.scoring import Pictures, Words
from bestiary.evaluation.timing import Laps
from bestiary.params import Evaluate
from bestiary.subjects import caption, subject_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.evaluation.judge import Judge


@dataclass(frozen=True)
class Jobs:
    """What to draw: the class index, the prompt and the seed of each picture."""

    labels: list[int]
    prompts: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: its report, and what its figures are drawn from."""

    report: dict[str, Any]
    checkpoint: Path
    scale: float
    guidance_scale: float
    words: Words
    jobs: Jobs
    base: plots.Drawn
    adapter: plots.Drawn
    nearest_training_images: list[tuple[int, Path, float]]  # picture, image, cosine
    swept: pd.DataFrame | None
    swept_by: str  # the score that chose


def evaluate(
    pipeline: StableDiffusionPipeline,
    adapter: Path,
    judges: Sequence[Judge],
    clean: Path,
    split: Path,
    settings: Evaluate,
    *,
    seed: int,
    resolution: int | None = None,
    kept: pictures.Kept | None = None,
) -> Evaluation:
    """Draw with base and adapter and let the first judge compare them, and the second one too where there is one.

    `clean` holds the images that the manifests in `split` name; pictures in `kept` are not drawn again. The report is
    that of `scoring.compare`, with where the time went. Raises BestiaryError when there is nothing to compare with or
    the adapter does not fit.
    """
    laps = Laps()
    train, validation = pictures.read_manifests(split)
    classes = sorted(train["class"].unique())
    shown = pictures.choose(classes, settings.classes)
    train, validation = (table[table["class"].isin(shown)] for table in (train, validation))
    adapter_file(adapter)  # before anything long, that it is there
    real, trained_on = (
        [pictures.view_files(judge, clean, table, classes) for judge in judges] for table in (validation, train)
    )
    words = [pictures.read_words(judge, classes, settings.template) for judge in judges]
    laps.note("judge")

    how = settings.model_dump(include={"steps", "scheduler", "guidance_interval", "batch_size"})
    how |= {"resolution": resolution, "kept": kept}
    jobs = _jobs(classes, shown, settings.template, settings.seeds, seed)
    checkpoint, scale, guidance_scale = adapter, 1.0, settings.guidance_scale
    swept = None
    if settings.sweep:
        # On seeds of its own: the best of many is lucky on those that chose it.
        tried = _jobs(classes, shown, settings.template, settings.sweep.seeds, seed + len(jobs.seeds))

        def look(adapter: Path, scale: float, guidance_scale: float) -> Pictures:
            images = pictures.draw(
                pipeline, adapter, tried.prompts, tried.seeds, scale=scale, guidance_scale=guidance_scale, **how
            )
            laps.note("draw")
            return pictures.view(judges[0], images, tried.labels)

        adapters = sweep.checkpoints(adapter) if settings.sweep.checkpoints else [adapter]
        swept = sweep.sweep(look, words[0], adapters, settings.sweep.scales, settings.sweep.guidance_scales)
        choice = sweep.best(swept, settings.sweep.score)
        checkpoint, scale, guidance_scale = Path(choice["checkpoint"]), choice["scale"], choice["guidance_scale"]
        laps.note("judge")

    images = pictures.draw_pairs(
        pipeline, checkpoint, jobs.prompts, jobs.seeds, scale=scale, guidance_scale=guidance_scale, **how
    )
    laps.note("draw")
    seen = [[pictures.view(judge, row, jobs.labels) for row in images] for judge in judges]
    laps.note("judge")
    reports = [
        scoring.compare(
            by_base, by_adapter, of_real, of_train.features, read, resamples=settings.bootstrap_resamples, seed=seed
        )
        for (by_base, by_adapter), of_real, of_train, read in zip(seen, real, trained_on, words, strict=True)
    ]
    laps.note("score")
    report = reports[0]
    report["classes"] = classes  # all that the judge chose among, drawn or not
    report["scale_zero"] = {"pictures": pictures.SCALE_ZERO_PICTURES, "different": 0}  # else there were no report
    report["operating_point"] = {"checkpoint": str(checkpoint), "scale": scale, "guidance_scale": guidance_scale}
    if len(judges) > 1:
        report["second_judge"] = {row: reports[1][row] for row in scoring.ROWS}
    report["seconds"] = {**laps.report(work="draw")}
    if kept and kept.reused:  # then the share says nothing of an evaluation that draws
        report["seconds"] |= {"pictures_kept": kept.reused, "overhead_share": None}
    base, with_adapter = (plots.Drawn(*row) for row in zip(images, seen[0], strict=True))
    nearest = [
        (picture, clean / train["path"].iloc[image], cosine)
        for picture, image, cosine in scoring.closest_pairs(with_adapter.seen.features, trained_on[0].features, 10)
    ]
    swept_by = settings.sweep.score if settings.sweep else ""
    return Evaluation(
        report, checkpoint, scale, guidance_scale, words[0], jobs, base, with_adapter, nearest, swept, swept_by
    )


def write(evaluation: Evaluation, folder: Path) -> None:
    """All that stands beside reports/evaluate.json: sheets, figures and tables, the worst classes first."""
    found = evaluation
    rows: list[tuple[str, Sequence[Image], Sequence[Image]]] = []
    plots.empty(folder / "pictures")  # classes come and go
    for name in scoring.worst_classes(found.report["per_class"]):
        mine = np.flatnonzero(found.base.seen.labels == found.words.classes.index(name)).tolist()
        base, adapter = ([drawn.images[index] for index in mine] for drawn in (found.base, found.adapter))
        plots.pair_sheet(
            [base, adapter], [found.jobs.seeds[index] for index in mine], folder / "pictures" / f"{name}.jpg"
        )
        rows.append((subject_of(name).name, base[: plots.SHEET_SEEDS], adapter[: plots.SHEET_SEEDS]))
    plots.base_beside_adapter(rows, folder / "sheet.png")
    plots.closest(
        [
            (cosine, found.adapter.images[index], open_rgb(path))
            for index, path, cosine in found.nearest_training_images
        ],
        folder / "memorisation.png",
    )
    plots.confusion_matrix(scoring.confusion(found.adapter.seen, found.words), folder / "confusion.png")
    plots.class_differences(found.report["per_class"], folder / "per_class.png")
    plots.save_table(scoring.class_table(found.report["per_class"]), folder / "per_class.csv")
    table = scoring.picture_table(
        found.base.seen, found.adapter.seen, found.words, found.jobs.prompts, found.jobs.seeds
    )
    plots.save_table(table, folder / "pictures.csv")
    if found.swept is None:
        for name in ("sweep.png", "sweep.csv"):
            (folder / name).unlink(missing_ok=True)  # of an earlier evaluation
    else:
        plots.sweep_heat_map(found.swept, found.swept_by, folder / "sweep.png")
        plots.save_table(found.swept, folder / "sweep.csv")


def _jobs(classes: Sequence[str], shown: Sequence[str], template: str, count: int, first_seed: int) -> Jobs:
    """`count` pictures of each class; no two of all share their noise."""
    labels = [classes.index(name) for name in shown for _ in range(count)]
    prompts = [caption(subject_of(classes[label]), template) for label in labels]
    return Jobs(labels, prompts, [first_seed + index for index in range(len(labels))])
