"""What cleaning reports about images: the table of findings, a contact sheet per kind, and a person's overrides."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from bestiary.data.contact_sheets import contact_sheet
from bestiary.data.folder import link
from bestiary.data.images import UnreadableImageError, open_rgb
from bestiary.errors import BestiaryError

Action = Literal["converted", "repaired", "flagged", "quarantined", "kept"]
Decision = Literal["keep", "drop"]

SHEET_COLUMNS, SHEET_ROWS = 6, 8
QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation about one image, with its evidence. Paths are relative to the raw images."""

    path: str
    class_folder: str
    kind: str
    detail: str
    action: Action
    other: str = ""  # path of the image it was compared with


def write_findings(folder: Path, findings: Sequence[Finding], raw: Path) -> None:
    """Write findings.csv, a contact sheet `<kind>.png` per kind, and links to the quarantined files, to `folder`."""
    with (folder / "findings.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "kind", "detail", "action"])
        table.writerows((f.path, f.class_folder, f.kind, f.detail, f.action) for f in findings)
    by_kind: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
        if finding.action == "quarantined":
            target = folder / QUARANTINE / finding.path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                link(raw / finding.path, target)
    for kind, members in by_kind.items():
        _sheet(members[: SHEET_COLUMNS * SHEET_ROWS], raw).save(folder / f"{kind.replace(' ', '_')}.png")


def read_overrides(path: Path) -> dict[str, Decision]:
    """Return the decision (keep or drop) for each image path in the CSV table `path,decision`.

    A missing file holds no decisions. Raises BestiaryError that names the file and the line when a line is wrong.
    """
    if not path.exists():
        return {}
    decisions: dict[str, Decision] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        if next(rows, None) != ["path", "decision"]:
            raise BestiaryError(f"{path} has no header. Its first line must be: path,decision")
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != 2 or row[1].strip() not in ("keep", "drop"):
                raise BestiaryError(
                    f"{where} is not a decision: {','.join(row)!r}. Write <class>/<file>,keep or <class>/<file>,drop."
                )
            name, decision = row[0].strip(), row[1].strip()
            if decisions.setdefault(name, "keep" if decision == "keep" else "drop") != decision:
                raise BestiaryError(f"{where} contradicts an earlier line about {name}. Delete one of the two lines.")
    return decisions


def count_kinds(findings: Iterable[Finding]) -> dict[str, int]:
    """Return the number of findings of each kind, sorted by kind.

    >>> count_kinds([Finding("cat/1.jpg", "cat", "blank", "contrast 0.0", "quarantined")])
    {'blank': 1}
    """
    return dict(sorted(Counter(finding.kind for finding in findings).items()))


def _sheet(members: Sequence[Finding], raw: Path) -> Image.Image:
    """Draw each finding's image under its path and detail, beside the image it was compared with."""
    cells = []
    for finding in members:
        pictures = [_small_image(raw / path) for path in (finding.path, finding.other) if path]
        labels = [finding.path, finding.detail] if finding.other else [f"{finding.path} {finding.detail}"]
        cells.append(contact_sheet([pictures], column_labels=labels, cell=160))
    size = max(cell.width for cell in cells), max(cell.height for cell in cells)
    columns = min(SHEET_COLUMNS, len(cells))
    sheet = Image.new("RGB", (columns * size[0], -(-len(cells) // columns) * size[1]), "white")
    for index, cell in enumerate(cells):
        bottom = (index // columns + 1) * size[1] - cell.height
        sheet.paste(cell, (index % columns * size[0] + (size[0] - cell.width) // 2, bottom))
    return sheet


def _small_image(path: Path) -> Image.Image:
    """Open an image, or a grey square in place of one that is unreadable."""
    try:
        image = open_rgb(path)
    except UnreadableImageError:
        return Image.new("RGB", (160, 160), "lightgrey")
    image.thumbnail((160, 160))
    return image
