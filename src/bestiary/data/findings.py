"""What cleaning says of the images: the table of findings, a picture sheet a kind, and a person's last word."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from bestiary.data.folder import link
from bestiary.data.images import UnreadableImageError, contact_sheet, open_rgb
from bestiary.errors import BestiaryError

Action = Literal["converted", "repaired", "flagged", "quarantined", "kept"]
Decision = Literal["keep", "drop"]

SHEET_COLUMNS, SHEET_ROWS = 6, 8
QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found about one image, with its evidence. Paths are relative to the raw images."""

    path: str
    class_folder: str
    kind: str
    detail: str
    action: Action
    other: str = ""  # the image that it is compared with


def write_findings(folder: Path, findings: Sequence[Finding], raw: Path) -> None:
    """Write findings.csv, a sheet `<kind>.png` for each kind, and links to the quarantined files, into `folder`."""
    with (folder / "findings.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "kind", "detail", "action"])
        table.writerows((f.path, f.class_folder, f.kind, f.detail, f.action) for f in findings)
    kinds: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
        if finding.action == "quarantined":
            target = folder / QUARANTINE / finding.path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                link(raw / finding.path, target)
    for kind, members in kinds.items():
        _sheet(members[: SHEET_COLUMNS * SHEET_ROWS], raw).save(folder / f"{kind.replace(' ', '_')}.png")


def _sheet(members: Sequence[Finding], raw: Path) -> Image.Image:
    """One picture a finding, its path and detail above it; beside it the image that it was compared with."""
    cells = []
    for finding in members:
        pictures = [_picture(raw / path) for path in (finding.path, finding.other) if path]
        labels = [finding.path, finding.detail] if finding.other else [f"{finding.path} {finding.detail}"]
        cells.append(contact_sheet([pictures], column_labels=labels, cell=160))
    size = max(cell.width for cell in cells), max(cell.height for cell in cells)
    columns = min(SHEET_COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * size[0], -(-len(cells) // columns) * size[1]), "white")
    for index, cell in enumerate(cells):
        bottom = (index // columns + 1) * size[1] - cell.height
        sheet.paste(cell, (index % columns * size[0] + (size[0] - cell.width) // 2, bottom))
    return sheet


def _picture(path: Path) -> Image.Image:
    try:
        image = open_rgb(path)
    except UnreadableImageError:
        return Image.new("RGB", (160, 160), "lightgrey")
    image.thumbnail((160, 160))
    return image


def read_overrides(path: Path) -> dict[str, Decision]:
    """The decisions of a table `path,decision` (keep or drop). Raises BestiaryError that names a wrong line."""
    if not path.exists():
        return {}
    decisions: dict[str, Decision] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        if next(rows, None) != ["path", "decision"]:
            raise BestiaryError(f"{path} must begin with the line path,decision.")
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != 2 or row[1].strip() not in ("keep", "drop"):
                raise BestiaryError(f"{where}: write <class>/<file>,keep or <class>/<file>,drop.")
            name, decision = row[0].strip(), row[1].strip()
            if decisions.setdefault(name, "keep" if decision == "keep" else "drop") != decision:
                raise BestiaryError(f"{where}: {name} is both kept and dropped.")
    return decisions


def count_kinds(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings of each kind there are."""
    counts: defaultdict[str, int] = defaultdict(int)
    for finding in findings:
        counts[finding.kind] += 1
    return dict(sorted(counts.items()))
