"""What the reports show: figures, sheets of pictures, tables."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from bestiary.data.contact_sheets import contact_sheet
from bestiary.evaluation.scoring import Pictures
from bestiary.files import write_atomically

CELL = 128  # pixels a picture on a sheet
SHEET_SEEDS = 4  # pictures of a class on the sheet of all classes


@dataclass(frozen=True)
class Drawn:
    """Pictures, and what the judge sees in them."""

    images: Sequence[Image.Image]
    seen: Pictures


def confusion_matrix(counts: pd.DataFrame, path: Path) -> None:
    """What was asked for (rows) against what the judge sees (columns), as a heat map."""
    figure = Figure(figsize=(3 + 0.22 * counts.shape[1], 3 + 0.22 * counts.shape[0]), layout="constrained")
    axes = figure.subplots()
    numbers = counts.to_numpy()
    share = numbers / numbers.sum(axis=1, keepdims=True)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(counts.shape[1]), labels=list(counts.columns), rotation=90)
    axes.set_yticks(range(len(counts)), labels=list(counts.index))
    if len(counts) <= 30:  # more would be too small to read
        for row, column in zip(*np.nonzero(numbers), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, numbers[row, column], ha="center", va="center", color=colour, fontsize=7)
    axes.set(xlabel="the judge sees", ylabel="asked for", title="Pictures of the adapter")
    _save(figure, path)


def class_differences(per_class: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Adapter minus base for each class, with 95 % intervals, the largest gain on top."""
    names = sorted(per_class, key=lambda name: float(per_class[name]["delta"]["clip_score"]["mean"]))
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("clip_score", "top1"), ("CLIP score", "top-1, points"), strict=True):
        deltas = [per_class[name]["delta"][key] for name in names]
        means = [delta["mean"] for delta in deltas]
        # A percentile interval of a skewed sample may leave out its mean.
        below = [max(0.0, delta["mean"] - delta["ci95"][0]) for delta in deltas]
        above = [max(0.0, delta["ci95"][1] - delta["mean"]) for delta in deltas]
        axes.errorbar(means, range(len(names)), xerr=[below, above], fmt="o", markersize=4, capsize=2)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set(xlabel=f"adapter - base: {label}")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_yticks(range(len(names)), labels=names)
    _save(figure, path)


def base_beside_adapter(rows: Sequence[tuple[str, Sequence[Image.Image], Sequence[Image.Image]]], path: Path) -> None:
    """One row an animal (name, pictures of the base, pictures of the adapter from the same noise)."""
    columns = [f"{name} {index + 1}" for name in ("base", "adapter") for index in range(len(rows[0][1]))]
    pictures = [[*base, *adapter] for _, base, adapter in rows]
    cell = CELL if len(rows) <= 40 else CELL // 2  # a hundred animals still fit on a screen
    save_picture(contact_sheet(pictures, [name for name, _, _ in rows], columns, cell=cell), path)


def closest(pairs: Sequence[tuple[float, Image.Image, Image.Image]], path: Path) -> None:
    """Pairs (cosine, generated picture, nearest training image), one a column."""
    rows = [[generated for _, generated, _ in pairs], [image for _, _, image in pairs]]
    columns = [f"{cosine:.3f}" for cosine, _, _ in pairs]
    save_picture(contact_sheet(rows, ["generated", "nearest in training"], columns, cell=CELL), path)


def quality_against_cost(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds a picture against CLIP score and against the distance to the converged picture, a line a scheduler."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"quality": "CLIP score", "distance_to_converged": "RMS difference from the converged picture"}
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["steps"])):
        name = ", ".join([row["scheduler"], f"batch {row['batch']}", *_unusual(row, rows[0])])
        lines.setdefault(name, []).append(row)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            there = [
                (row["p50_s"] / row["batch"], row[key], str(row["steps"])) for row in points if row[key] is not None
            ]
            axes.plot([x for x, _, _ in there], [y for _, y, _ in there], marker="o", color=f"C{number}", label=name)
            for x, y, steps in there:
                axes.annotate(steps, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.set(xlabel="seconds a picture (median); the numbers are steps", ylabel=label, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    _save(figure, path)


def sweep_heat_map(table: pd.DataFrame, key: str, path: Path) -> None:
    """The score `key` of each combination that a sweep tried, a panel a checkpoint, the best one framed."""
    checkpoints = table["checkpoint"].unique()
    figure = Figure(figsize=(1.5 + 3.5 * len(checkpoints), 3.8), layout="constrained")
    best = table.iloc[int(table[key].argmax())]
    for axes, checkpoint in zip(figure.subplots(1, len(checkpoints), squeeze=False)[0], checkpoints, strict=True):
        mine = table[table["checkpoint"] == checkpoint]
        grid = mine.pivot(index="scale", columns="guidance_scale", values=key)
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
        axes.set(xlabel="guidance scale", ylabel="adapter scale", title=Path(checkpoint).name)
    figure.suptitle(
        {"clip_score": "CLIP score", "margin": "CLIP score over the other animals", "top1": "top-1, %"}[key]
    )
    _save(figure, path)


def pair_sheet(rows: Sequence[Sequence[Image.Image]], seeds: Sequence[int], path: Path) -> None:
    """All pictures of one class: those of the base above those of the adapter, in their size up to twice a cell's."""
    cell = min(2 * CELL, rows[0][0].width)
    save_picture(contact_sheet(rows, ["base", "adapter"], [str(seed) for seed in seeds], cell=cell), path)


def empty(folder: Path) -> None:
    """Remove a folder of pictures that earlier work left."""
    shutil.rmtree(folder, ignore_errors=True)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG or, by its name, a JPEG; whole or not at all."""
    buffer = io.BytesIO()
    if path.suffix == ".jpg":
        image.save(buffer, format="JPEG", quality=92)
    else:
        image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def _unusual(row: Mapping[str, Any], default: Mapping[str, Any]) -> tuple[str, ...]:
    """What sets a setting apart from the others of its sampler, in words."""
    words = {
        "adapter fused": row["fused"],
        f"guidance {row['guidance']}": row["guidance"] != default["guidance"],
        row["dtype"]: row["dtype"] != default["dtype"],
        "compiled": row["compiled"],
        f"{row['vae']} VAE": row["vae"] != "full",
    }
    return tuple(word for word, applies in words.items() if applies)


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write a CSV, whole or not at all."""
    write_atomically(path, table.to_csv(index=False).encode())


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
