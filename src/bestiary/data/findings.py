"""What cleaning reports about images: the table of findings, a contact sheet per kind, and a person's overrides."""

from __future__ import annotations

import codecs
import csv
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from bestiary.data.contact_sheets import contact_sheet, with_title
from bestiary.data.folder import link
from bestiary.data.images import open_rgb
from bestiary.data.names import printable
from bestiary.errors import BestiaryError
from bestiary.image_files import UnreadableImageError
from bestiary.tables import spreadsheet_text, typed_text

Action = Literal["converted", "repaired", "flagged", "quarantined", "kept", "left out"]
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
    score: float | None = None  # 0 to 1: how doubtful the image is by this check; None where a check measures nothing


def write_findings(folder: Path, findings: Sequence[Finding], raw: Path) -> None:
    """Write findings.csv, a contact sheet `<kind>.png` per kind, and links to the quarantined files, to `folder`.

    A sheet shows the most doubtful images first, each class in its turn. Files that were left out before cleaning are
    in the table only.
    """
    with (folder / "findings.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "kind", "detail", "action", "score"])
        for f in findings:
            texts = map(spreadsheet_text, (f.path, f.class_folder, f.kind, f.detail, f.action))
            table.writerow([*texts, "" if f.score is None else f"{f.score:.4f}"])
    by_kind: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.action != "left out":
            by_kind[finding.kind].append(finding)
        if finding.action == "quarantined":
            target = folder / QUARANTINE / finding.path
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                link(raw / finding.path, target)
    for kind, members in by_kind.items():
        shown = spread(members)[: SHEET_COLUMNS * SHEET_ROWS]
        sheet = _sheet(shown, raw, f"{kind}: {len(shown)} of {len(members)}")
        sheet.save(folder / f"{kind.replace(' ', '_')}.png")


def spread(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings in rounds, one of each class in a round, the most doubtful first in a class and in a round.

    >>> made = [Finding(path, path[0], "blank", "", "flagged", score=score) for path, score in
    ...         [("a/1", 0.9), ("a/2", 0.8), ("b/1", 0.1), ("b/2", 0.2)]]
    >>> [finding.path for finding in spread(made)]
    ['a/1', 'b/2', 'a/2', 'b/1']
    """

    def doubt(finding: Finding) -> tuple[float, str]:
        return -(finding.score or 0.0), finding.path

    turns: Counter[str] = Counter()
    rounds: list[tuple[int, Finding]] = []
    for finding in sorted(findings, key=doubt):
        rounds.append((turns[finding.class_folder], finding))
        turns[finding.class_folder] += 1
    return [finding for _, finding in sorted(rounds, key=lambda pair: (pair[0], doubt(pair[1])))]


def read_overrides(path: Path) -> dict[str, Decision]:
    """Return the decision (keep or drop) for each image path in the CSV table `path,decision`.

    Commas, semicolons and tabs separate its columns, as spreadsheets write them. A missing file holds no decisions.
    Raises BestiaryError that names the file and the line when a line is wrong, or the encoding when it is not Unicode.
    """
    if not path.exists():
        return {}
    text = _decode(path)
    delimiter = next((each for each in ";\t" if each in text.partition("\n")[0]), ",")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    decisions: dict[str, Decision] = {}
    try:
        if [cell.strip().casefold() for cell in next(rows, [])] != ["path", "decision"]:
            raise BestiaryError(f"{path} has no header. Its first line must be: path,decision")
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{path}, line {rows.line_num}"
            decision = row[1].strip().casefold() if len(row) == 2 else ""
            if decision not in ("keep", "drop"):
                raise BestiaryError(
                    f"{where} is not a decision: {printable(','.join(row)[:200])!r}. Write <class>/<file>,keep or "
                    "<class>/<file>,drop."
                )
            name = unicodedata.normalize("NFC", typed_text(row[0].strip()).replace("\\", "/"))
            if decisions.setdefault(name, "keep" if decision == "keep" else "drop") != decision:
                raise BestiaryError(
                    f"{where} contradicts an earlier line about {printable(name)}. Delete one of the two lines."
                )
    except csv.Error as error:
        raise BestiaryError(f"{path}, line {rows.line_num} is not CSV: {error}. Correct the line.") from None
    return decisions


def _decode(path: Path) -> str:
    """Return the text of a file in UTF-8 or UTF-16. Raises BestiaryError for any other encoding."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BestiaryError(
            f"{path}, line {line} is not in UTF-8. Save the file in UTF-8; a spreadsheet calls this format CSV UTF-8."
        ) from None
    if "\0" in text:
        raise BestiaryError(
            f"{path} is not in UTF-8. Save the file in UTF-8; a spreadsheet calls this format CSV UTF-8."
        )
    return text


def count_kinds(findings: Iterable[Finding]) -> dict[str, int]:
    """Return the number of findings of each kind, sorted by kind.

    >>> count_kinds([Finding("cat/1.jpg", "cat", "blank", "contrast 0.0", "quarantined")])
    {'blank': 1}
    """
    return dict(sorted(Counter(finding.kind for finding in findings).items()))


def _sheet(members: Sequence[Finding], raw: Path, title: str) -> Image.Image:
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
    return with_title(sheet, title)


def _small_image(path: Path) -> Image.Image:
    """Open an image, or a grey square in place of one that is unreadable."""
    try:
        image = open_rgb(path)
    except UnreadableImageError:
        return Image.new("RGB", (160, 160), "lightgrey")
    image.thumbnail((160, 160))
    return image
