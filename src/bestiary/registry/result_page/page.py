"""The result as one HTML page without scripts or other files: reports/index.html, to send to a friend."""

from __future__ import annotations

import base64
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from bestiary.evaluation.report import Estimate, EvaluationReport, Score, describe_proof, heading, table_rows
from bestiary.files import write_atomically
from bestiary.registry.registering import Registration, Submission
from bestiary.samplers import DrawingDefaults
from bestiary.subjects import Subjects

PICTURE_BYTES = 450_000  # at most, of each of the page's pictures as JPEG: three of them stay below 2 MB in base64
QUALITIES = (85, 75, 60, 45)
DOCUMENTATION = "docs/evaluation.md"
MARK = '<meta name="adapter-sha256" content="{}">'  # says in the page which adapter it is about


@dataclass(frozen=True)
class Source:
    """What the adapter was made from. A hash is None where the adapter's file does not say it."""

    base: str
    base_revision: str | None
    base_sha256: str
    data_sha256: str | None  # of the images, their captions and how they were encoded


@dataclass(frozen=True)
class Picture:
    """A picture in the page: the file's content as a data URL, and its width in pixels."""

    url: str
    width: int


def write_page(path: Path, submission: Submission, registration: Registration) -> None:
    """Write the page of a registered adapter to `path`, with the pictures of its evaluation.

    Raises BestiaryError when the adapter cannot be read or the disk is full.
    """
    from bestiary.diffusion.adapter import read_provenance
    from bestiary.diffusion.base import base_sha256

    source = Source(
        submission.base,
        submission.base_revision,
        base_sha256(submission.base, submission.base_revision),
        read_provenance(submission.adapter).data_sha256,
    )
    page = render(submission.evaluation, registration, source, submission.defaults, submission.pictures.parent)
    write_atomically(path, page.encode())


def render(
    report: EvaluationReport,
    registration: Registration,
    source: Source,
    defaults: DrawingDefaults,
    pictures: Path,
) -> str:
    """The page as HTML. `pictures` is the folder reports/evaluate; a sheet that is missing there is left out."""
    subjects = [Subjects.read_from(pictures).of(folder) for folder in report.per_class]
    proof = report.only_subject
    folder = next(iter(report.proofs), "")
    rows = [
        (cells, verdict(score, report.delta[score.key]))
        for score, cells in zip(report.table, table_rows(report), strict=True)
    ]
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            registration=registration,
            source=source,
            defaults=defaults,
            subjects=subjects,
            proof=proof,
            heading=heading(report),
            rows=rows,
            sentences=list(describe_proof(proof)) if proof else [],
            copied=report.memorisation.adapter.copied.describe(),
            sheet=read_picture(pictures / "sheet.png"),
            contexts=read_picture(pictures / "contexts" / f"{folder}.png") if proof else None,
            closest=read_picture(pictures / "memorisation.png"),
            commands=commands(registration, proof.name if proof else subjects[0].name),
            documentation=DOCUMENTATION,
        )
    )


def environment() -> Environment:
    """Jinja2 with this folder's templates."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of folders come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def verdict(score: Score, difference: Estimate) -> str:
    """What a difference and its interval say in words.

    >>> verdict(Score("cmmd", "CMMD", "", higher_is_better=False), Estimate(mean=-2.1, ci95=(-2.5, -1.7)))
    'better'
    >>> verdict(Score("top1", "recognised", ""), Estimate(mean=1.0, ci95=(-0.5, 2.5)))
    'no certain difference'
    """
    low, high = difference.ci95
    if low <= 0 <= high:
        return "no certain difference"
    return "better" if (low > 0) == score.higher_is_better else "worse"


def commands(registration: Registration, subject: str) -> list[tuple[str, str]]:
    """What to type to use the adapter, each with its purpose."""
    uri, name = f"models:/{registration.name}/{registration.version}", shlex.quote(subject)
    return [
        (f"bestiary generate {name} --adapter {uri} --count 4", "Draw with the registered version"),
        (f"bestiary pull {uri} --out my-adapter", "Copy the adapter into a folder, which you can pass on"),
        (f"bestiary generate {name} --adapter my-adapter --count 4", "Draw with a copy of the adapter"),
    ]


def read_picture(file: Path) -> Picture | None:
    """The picture as a JPEG of at most PICTURE_BYTES; None if there is no such file."""
    if not file.is_file():
        return None
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    while True:
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=quality, optimize=True)
            if len(buffer.getvalue()) <= PICTURE_BYTES:
                data = base64.b64encode(buffer.getvalue()).decode()
                return Picture(f"data:image/jpeg;base64,{data}", image.width)
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)


def is_about(page: Path, adapter_sha256: str) -> bool:
    """Whether there is a page at this path, and it is about this adapter."""
    return page.is_file() and MARK.format(adapter_sha256) in page.read_text(encoding="utf-8")
