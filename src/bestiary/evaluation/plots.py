"""The figures, sheets of pictures and tables beside the reports."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from bestiary.data.contact_sheets import contact_sheet
from bestiary.evaluation.report import BY_KEY, ClassScores, Estimate
from bestiary.files import write_atomically
from bestiary.tables import for_spreadsheet

if TYPE_CHECKING:
    from bestiary.evaluation.benchmark import Row, Setting

CELL = 128  # pixels a side of a picture on a sheet
SHEET_SEEDS = 4  # pictures of each class on the sheet of all classes
MAX_NUMBERED_ROWS = 30  # of the confusion matrix; with more rows the numbers would be too small to read
MAX_LARGE_ROWS = 40  # of the sheet of all classes; with more rows its cells are halved so that it fits on a screen


def confusion_matrix(counts: pd.DataFrame, path: Path) -> None:
    """Draw a heat map of the class that each picture should show (rows) and the judge's first choice (columns)."""
    figure = Figure(figsize=(3 + 0.22 * counts.shape[1], 3 + 0.22 * counts.shape[0]), layout="constrained")
    axes = figure.subplots()
    numbers = counts.to_numpy()
    share = numbers / numbers.sum(axis=1, keepdims=True)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(counts.shape[1]), labels=list(counts.columns), rotation=90)
    axes.set_yticks(range(len(counts)), labels=list(counts.index))
    if len(counts) <= MAX_NUMBERED_ROWS:
        for row, column in zip(*np.nonzero(numbers), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, numbers[row, column], ha="center", va="center", color=colour, fontsize=7)
    axes.set(xlabel="the judge's first choice", ylabel="class in the prompt", title="Pictures by the adapter")
    _save(figure, path)


def class_differences(per_class: Mapping[str, ClassScores], path: Path) -> None:
    """Draw adapter minus base for each class with its 95 % interval, the largest gain at the top."""
    names = sorted(per_class, key=lambda name: per_class[name].delta["clip_score"].mean)
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(names)), layout="constrained")
    keys = [key for key in ("clip_score", "top1") if key in per_class[names[0]].delta]  # top1 takes several classes
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        deltas = [per_class[name].delta[key] for name in names]
        means = [delta.mean for delta in deltas]
        # The percentile interval of a skewed sample may not contain its mean.
        below = [max(0.0, delta.mean - delta.ci95[0]) for delta in deltas]
        above = [max(0.0, delta.ci95[1] - delta.mean) for delta in deltas]
        axes.errorbar(means, range(len(names)), xerr=[below, above], fmt="o", markersize=4, capsize=2)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set(xlabel=f"adapter minus base: {BY_KEY[key].difference_title}")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_yticks(range(len(names)), labels=names)
    _save(figure, path)


def base_beside_adapter(rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]], path: Path) -> None:
    """Write a sheet with one row for each class: name, the base's pictures, the adapter's from the same noise."""
    columns = [f"{name} {index + 1}" for name in ("base", "adapter") for index in range(len(rows[0][1]))]
    pictures = [[*base, *adapter] for _, base, adapter in rows]
    cell = CELL if len(rows) <= MAX_LARGE_ROWS else CELL // 2
    save_picture(contact_sheet(pictures, [name for name, _, _ in rows], columns, cell=cell), path)


def ways_side_by_side(
    ways: Sequence[str], rows: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]], path: Path
) -> None:
    """Write a sheet with one row for each class: its name, then each way's pictures from the same seeds."""
    columns = [
        f"{way} {number + 1}" for way, drawn in zip(ways, rows[0][1], strict=True) for number in range(len(drawn))
    ]
    pictures = [[picture for of_way in each for picture in of_way] for _, each in rows]
    cell = CELL if len(rows) <= MAX_LARGE_ROWS else CELL // 2
    save_picture(contact_sheet(pictures, [name for name, _ in rows], columns, cell=cell), path)


def quality_against_seconds(ways: Mapping[str, tuple[float, Mapping[str, Estimate]]], path: Path) -> None:
    """Plot CLIP score and diversity against the seconds of a picture, with 95 % intervals, one point for each way."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("clip_score", "diversity"), strict=True):
        for number, (name, (seconds, scores)) in enumerate(ways.items()):
            estimate = scores[key]
            # The percentile interval of a skewed sample may not contain its mean.
            error = [[max(0.0, estimate.mean - estimate.ci95[0])], [max(0.0, estimate.ci95[1] - estimate.mean)]]
            axes.errorbar([seconds], [estimate.mean], yerr=error, fmt="o", color=f"C{number}", capsize=3, label=name)
        axes.set(xlabel="seconds per picture (median, one at a time)", ylabel=BY_KEY[key].title, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")  # with several decades, labels of all ticks would overlap
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    _save(figure, path)


def closest(pairs: Sequence[tuple[float, Image.Image, Image.Image]], path: Path) -> None:
    """Write a sheet with one column for each pair: cosine, generated picture, nearest training image."""
    rows = [[generated for _, generated, _ in pairs], [image for _, _, image in pairs]]
    columns = [f"{cosine:.3f}" for cosine, _, _ in pairs]
    save_picture(contact_sheet(rows, ["generated", "nearest training image"], columns, cell=CELL), path)


def quality_against_cost(rows: Sequence[Row], path: Path) -> None:
    """Draw seconds per picture against CLIP score and against the distance to the converged picture.

    Each line connects the numbers of steps of one sampler with otherwise equal settings. The first row is the default.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    quality, distance = figure.subplots(1, 2)
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.setting.steps):
        lines.setdefault(_line_name(row.setting, rows[0].setting), []).append(row)
    for number, (name, line) in enumerate(lines.items()):
        points = [(row, row.quality.quality) for row in line]
        _draw_line(quality, points, name, f"C{number}")
        distances = [(row, row.quality.distance_to_converged) for row in line]
        _draw_line(distance, [(row, y) for row, y in distances if y is not None], name, f"C{number}")
    quality.set_ylabel(BY_KEY["clip_score"].label)
    distance.set_ylabel("RMS difference from the converged picture")
    for axes in (quality, distance):
        axes.set(xlabel="seconds per picture (median); the labels are numbers of steps", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    quality.legend(fontsize=7)
    _save(figure, path)


def sweep_heat_map(table: pd.DataFrame, key: str, path: Path) -> None:
    """Draw the score `key` of a sweep's candidates, one panel for each checkpoint, with a frame around the best."""
    checkpoints = table["checkpoint"].unique()
    figure = Figure(figsize=(1.5 + 3.5 * len(checkpoints), 3.8), layout="constrained")
    best = table.iloc[int(table[key].argmax())]
    for axes, checkpoint in zip(figure.subplots(1, len(checkpoints), squeeze=False)[0], checkpoints, strict=True):
        rows = table[table["checkpoint"] == checkpoint]
        grid = rows.pivot(index="scale", columns="guidance_scale", values=key)
        axes.imshow(grid, cmap="Blues", vmin=table[key].min(), vmax=table[key].max(), origin="lower", aspect="auto")
        axes.set_xticks(range(grid.shape[1]), labels=[f"{value:g}" for value in grid.columns])
        axes.set_yticks(range(grid.shape[0]), labels=[f"{value:g}" for value in grid.index])
        middle = (table[key].min() + table[key].max()) / 2
        for (row, column), value in np.ndenumerate(grid.to_numpy()):
            colour = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
        if checkpoint == best["checkpoint"]:
            corner = (grid.columns.get_loc(best["guidance_scale"]) - 0.5, grid.index.get_loc(best["scale"]) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="tab:orange", linewidth=3))
        axes.set(xlabel="guidance scale", ylabel="adapter weight", title=Path(checkpoint).name)
    figure.suptitle(BY_KEY[key].title)
    _save(figure, path)


def pair_sheet(rows: Sequence[Sequence[Image.Image]], seeds: Sequence[int], path: Path) -> None:
    """Write all pictures of one class, the base's above the adapter's, in their own size up to twice a cell's."""
    cell = min(2 * CELL, rows[0][0].width)
    save_picture(contact_sheet(rows, ["base", "adapter"], [str(seed) for seed in seeds], cell=cell), path)


def remove_folder(folder: Path) -> None:
    """Remove a folder of pictures that an earlier run wrote, if there is one."""
    shutil.rmtree(folder, ignore_errors=True)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a JPEG if the name ends in .jpg, else a PNG; atomically."""
    buffer = io.BytesIO()
    if path.suffix == ".jpg":
        image.save(buffer, format="JPEG", quality=92)
    else:
        image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV file, atomically."""
    write_atomically(path, for_spreadsheet(table).to_csv(index=False).encode())


def _line_name(setting: Setting, default: Setting) -> str:
    """The sampler, the batch size, and everything else in which a setting differs from the default."""
    differences = {
        "adapter fused": setting.fused,
        f"guidance {setting.guidance}": setting.guidance != default.guidance,
        setting.dtype: setting.dtype != default.dtype,
        "compiled": setting.compiled,
        f"{setting.vae} VAE": setting.vae != "full",
    }
    words = [word for word, applies in differences.items() if applies]
    return ", ".join([setting.scheduler, f"batch {setting.batch}", *words])


def _draw_line(axes: Axes, points: Sequence[tuple[Row, float]], name: str, colour: str) -> None:
    """Draw (row, y) points at their seconds per picture, each labelled with its number of steps."""
    seconds = [row.cost.p50_s / row.setting.batch for row, _ in points]
    axes.plot(seconds, [y for _, y in points], marker="o", color=colour, label=name)
    for x, (row, y) in zip(seconds, points, strict=True):
        axes.annotate(str(row.setting.steps), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
